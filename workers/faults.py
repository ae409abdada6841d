"""Named points at which a test may end or freeze this process; without IMAGEMILL_CRASH_AT each is one comparison.

IMAGEMILL_CRASH_AT is "<point>:<times>[:<signal>]", such as "after-put:2" or "before-commit:1:STOP", or several of these
with commas between; IMAGEMILL_CRASH_FOLDER is where processes count together how often each has happened.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

POINTS = (
    "claimed",  # a shard is leased, nothing read yet
    "fetched",  # an image's bytes are read
    "inferred",  # a batch has run
    "kept",  # a file that was made is put, its item not recorded
    "before-put",
    "after-put",  # the result object is there, nothing committed
    "before-commit",
    "after-commit",  # committed, and nobody told
    "before-ack",  # the ticket is done, Celery does not know
)


def _parse(text: str) -> dict[str, tuple[int, str]]:
    plans = {}
    for word in text.split(",") if text else ():
        name, times, *rest = word.split(":")
        plans[name] = (int(times), rest[0] if rest else "KILL")
    return plans


_PLANS = _parse(os.environ.get("IMAGEMILL_CRASH_AT", ""))


def point(name: str) -> None:
    """End this process here if a test asked for it."""
    if not _PLANS or name not in _PLANS:
        return
    times, how = _PLANS[name]
    folder = Path(os.environ["IMAGEMILL_CRASH_FOLDER"])
    for i in range(times):
        try:
            (folder / f"{name}.{i}").touch(exist_ok=False)
        except FileExistsError:
            continue
        os.kill(os.getpid(), getattr(signal, f"SIG{how}"))
        return

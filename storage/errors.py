"""Every error imagemill raises on purpose; the class says what the caller does next.

ImagemillError
├── BadInput          the request is wrong: say so, exit 2, nothing was changed
├── Misconfigured     a URL, credential, revision or library is wrong: say the remedy, exit 1
├── Unavailable       a database, broker or store does not answer: wait, retry, or release without blame
│   └── StoreFull     no space left: release without blame, and say so
├── NotFound          the object, job or key does not exist
├── Conflict          someone else holds it now: stop quietly and throw the work away
└── ItemFailed        this one image cannot be done: becomes a failure row, never reaches the shard
"""

from __future__ import annotations


class ImagemillError(Exception):
    """Root of the tree. The message is one line: what was expected, what came, what to do next."""


class BadInput(ImagemillError):
    """The user asked for something that cannot be: exit code 2."""


class Misconfigured(ImagemillError):
    """The installation, not the request, is wrong: exit code 1."""


class Unavailable(ImagemillError):
    """A server does not answer, or not yet. Trying again later may work."""


class StoreFull(Unavailable):
    """The disk or bucket takes no more bytes."""


class NotFound(ImagemillError):
    """The named thing does not exist."""


class Conflict(ImagemillError):
    """A compare-and-set found another owner, fence or state than ours."""


class ItemFailed(ImagemillError):
    """One item cannot be computed.

    Args:
        stage: where it failed: "fetch", "decode", "prepare", "infer" or "write".
        reason: stable code of letters and hyphens, such as "truncated" or "too-many-pixels".
        message: for people; made into one line of at most 1000 letters that every database and file takes.
        retry: True when the cause may pass (a timeout), so that the next run tries the item again.
    """

    def __init__(self, stage: str, reason: str, message: str, *, retry: bool = False) -> None:
        message = one_line(message)
        super().__init__(message)
        self.stage, self.reason, self.message, self.retry = stage, reason, message, retry

    def __reduce__(self) -> tuple[object, ...]:
        return (_item_failed, (self.stage, self.reason, self.message, self.retry))


def one_line(text: str, limit: int = 1000) -> str:
    """A text as one line that may be stored anywhere.

    Messages quote what libraries say about hostile bytes: Postgres refuses a NUL, and all refuse half a surrogate pair.
    """
    return " ".join(text.replace("\0", " ").encode(errors="replace").decode().split())[:limit]


def _item_failed(stage: str, reason: str, message: str, retry: bool) -> ItemFailed:
    return ItemFailed(stage, reason, message, retry=retry)

"""Says which database a job's objects belong to: jobs have small numbers, and several databases may share a store."""

from __future__ import annotations

from storage.objects import Store

_FOLDER = "owners"


def sign(store: Store, job_id: int, created_at: float) -> None:
    """Leave this database's mark on a job's objects, before the first of them.

    Args:
        created_at: of the job's row; two databases that give one number have not given it in the same microsecond.
    """
    store.put(_mark(job_id, created_at), b"")


def is_shared(store: Store, job_id: int, created_at: float) -> bool:
    """Whether another database has a job of this number here, so that what no row refers to may be that one's."""
    return any(stat.key != _mark(job_id, created_at) for stat in store.list(f"{_FOLDER}/{job_id}/"))


def _mark(job_id: int, created_at: float) -> str:
    return f"{_FOLDER}/{job_id}/{created_at:.6f}"

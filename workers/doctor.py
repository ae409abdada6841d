"""Looks at everything imagemill depends on, and says the remedy for what is wrong."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from jobs import broker, queue
from storage import migrate
from storage.database import Database
from storage.errors import Conflict, ImagemillError
from storage.objects import open_store
from storage.settings import Settings, load, masked
from workers import devices, models, runtimes


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    detail: str


def examine() -> list[Finding]:
    """Every check once; one that fails does not keep the others from running."""
    try:
        settings = load()
    except ImagemillError as error:
        return [Finding("settings", False, str(error))]
    checks: list[tuple[str, Callable[[Settings], str]]] = [
        ("database", _database),
        ("store", _store),
        ("broker", _broker),
        ("devices", _devices),
        ("runtimes", _runtimes),
        ("families", _families),
    ]
    return [_checked(what, check, settings) for what, check in checks]


def _checked(what: str, check: Callable[[Settings], str], settings: Settings) -> Finding:
    try:
        return Finding(what, True, check(settings))
    except ImagemillError as error:
        return Finding(what, False, str(error))


def _database(settings: Settings) -> str:
    db = Database(settings.database, patience_s=3)
    try:
        migrate.check(db, create=not settings.database_url)
    finally:
        db.close()
    return f"{masked(settings.database)} at revision {migrate.HEAD}"


def _store(settings: Settings) -> str:
    """What the store really does, tried on an object of our own."""
    store = open_store(settings.store, settings)
    key = f"doctor/{uuid.uuid4().hex}"
    try:
        store.put(key, b"imagemill")
        if store.get(key) != b"imagemill":
            return f"{store.url} gives back other bytes than it was given"
        conditional = _refuses_second_put(store, key)
    finally:
        store.delete([key])
    more = "" if conditional else "; it ignores If-None-Match, which imagemill does not rely on"
    return f"{store.url} can be read and written{more}"


def _refuses_second_put(store: object, key: str) -> bool:
    try:
        store.put(key, b"other", if_absent=True)  # type: ignore[attr-defined]
    except Conflict:
        return True
    return False


def _broker(settings: Settings) -> str:
    if settings.embedded:
        return f"embedded: {broker.server_program()}"
    return f"{masked(settings.broker)}: {queue.check(settings)}"


def _devices(settings: Settings) -> str:
    return ", ".join(f"{d.name} ({d.memory_gb:g} GB)" if d.memory_gb else d.name for d in devices.find("auto"))


def _runtimes(settings: Settings) -> str:
    have = [name for name in runtimes.names() if runtimes.get(name).installed()]
    return (
        ", ".join(have) if have else "none; this machine can submit jobs; to compute: pip install 'imagemill[worker]'"
    )


def _families(settings: Settings) -> str:
    detectors = "" if importlib.util.find_spec("ultralytics") else " (yolo needs: pip install 'imagemill[worker]')"
    return ", ".join(models.families()) + detectors

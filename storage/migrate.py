"""Where migrations/ is, which revision a database has, and how to bring it up to date."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from storage.database import Database, Tx
from storage.errors import Misconfigured
from storage.settings import masked

HEAD = "0001"  # the newest revision in migrations/
_PATIENCE_S = 2
_one_at_a_time = threading.Lock()  # alembic keeps what it is doing in a global of its module


def folder() -> Path:
    """The migrations: the checkout's when there is one, else those installed under sys.prefix."""
    checkout = Path(__file__).resolve().parent.parent / "migrations"
    installed = Path(sys.prefix) / "share" / "imagemill" / "migrations"
    for path in (checkout, installed):
        if (path / "env.py").is_file():
            return path
    raise Misconfigured(f"no migrations in {checkout} or {installed}; install imagemill again")


def current(database: Database) -> str | None:
    """The revision a database is at, or None when it has no tables yet."""

    def look(tx: Tx) -> str | None:
        # Alembic's own way to ask this would be a sixth of the time of a short command.
        if not sa.inspect(tx).has_table("alembic_version"):
            return None
        return tx.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()

    # A connection that breaks is no reason to give up; a server that is not there should be said soon.
    return database.ask(look, _PATIENCE_S)


def upgrade(database: Database) -> tuple[str | None, str]:
    """Bring a database to the newest revision; returns (before, after). Several processes may call it at once."""
    before, newest = current(database), HEAD
    if before == newest:
        return before, newest
    from alembic import command
    from alembic.config import Config

    _check_known(database, before, newest)
    config = Config()
    config.set_main_option("script_location", str(folder()).replace("%", "%%"))

    def run(tx: Any) -> None:
        config.attributes["connection"] = tx
        command.upgrade(config, "head")

    with _one_at_a_time:
        database.transact(run)
    return before, newest


def check(database: Database, *, create: bool) -> None:
    """Raise Misconfigured unless the database is at this code's revision.

    Args:
        create: make the tables of a database that has none (a laptop's own SQLite file).
    """
    revision, newest = current(database), HEAD
    if revision == newest:
        return
    if revision is None and create:
        upgrade(database)
        return
    _check_known(database, revision, newest)
    found = "has no tables yet" if revision is None else f"is at revision {revision}"
    raise Misconfigured(
        f"the database {masked(database.url)} {found}, this imagemill needs {newest}; run: imagemill db upgrade"
    )


def _check_known(database: Database, revision: str | None, newest: str) -> None:
    """Raise Misconfigured for a revision that a newer imagemill, or none, has made."""
    from alembic.script import ScriptDirectory

    known = {script.revision for script in ScriptDirectory(str(folder())).walk_revisions()}
    if revision is not None and revision not in known:
        raise Misconfigured(
            f"the database {masked(database.url)} is at revision {revision}, which this imagemill does not know (it "
            f"knows up to {newest}); install the newer imagemill that made it"
        )

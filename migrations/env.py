"""Alembic's entry: runs the migrations on the connection it is handed, or on IMAGEMILL_DATABASE_URL."""

from __future__ import annotations

from alembic import context

from storage.database import Database
from storage.settings import load
from storage.tables import metadata


def run() -> None:
    connection = context.config.attributes.get("connection")
    if connection is not None:
        _migrate(connection)
    else:
        Database(load().database).transact(_migrate)


def _migrate(connection: object) -> None:
    if connection.dialect.name == "postgresql":  # type: ignore[attr-defined]
        # Two processes that upgrade at once take turns; the second finds nothing to do.
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7305808869230650207)")  # type: ignore[attr-defined]
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    context.run_migrations()


run()

"""The migrations make the tables of storage/tables.py, whoever runs them and how often."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from storage import migrate, tables
from storage.database import Database, Tx
from storage.errors import Misconfigured
from tests.support import count, ended, execute, new_worker, opened, python, together


@pytest.fixture
def empty(database_url: str) -> Iterator[Database]:
    """A database without tables."""
    db = Database(database_url)
    yield db
    db.close()


def differences(db: Database) -> list[Any]:
    """What alembic would change to make the database equal to the tables."""

    def work(tx: Tx) -> list[Any]:
        options = {"compare_type": True, "compare_server_default": _default_differs if db.is_sqlite else True}
        return list(compare_metadata(MigrationContext.configure(tx, opts=options), tables.metadata))

    return db.transact(work)


def _default_differs(context: Any, column: Any, other: Any, inspected: str, default: Any, rendered: str) -> bool:
    # SQLite keeps the brackets of DEFAULT (''), which alembic takes for a difference.
    return (inspected or "").strip("()'") != (rendered or "").strip("()'")


def schema(db: Database) -> dict[str, Any]:
    """What the database says of itself: columns with defaults, keys, indexes, checks and options."""
    # Looking takes many statements, and db.engine's transactions may not stand still for long, as a busy machine may.
    engine = sa.create_engine(db.engine.url)
    inspector = sa.inspect(engine)
    found: dict[str, Any] = {}
    for table in inspector.get_table_names():
        if table == "alembic_version":
            continue
        columns = [{k: str(v) for k, v in column.items()} for column in inspector.get_columns(table)]
        found[table] = (
            sorted(columns, key=str),
            inspector.get_pk_constraint(table),
            sorted(inspector.get_foreign_keys(table), key=str),
            sorted(inspector.get_unique_constraints(table), key=str),
            sorted((str(index["name"]), index["column_names"]) for index in inspector.get_indexes(table)),
        )
    engine.dispose()
    if not db.is_sqlite:
        options = sa.text("select relname, reloptions from pg_class where relkind = 'r' and reloptions is not null")
        found["options"] = sorted((name, sorted(values)) for name, values in db.query(options))
        indexes = sa.text("select indexname, indexdef from pg_indexes where schemaname = 'public'")
        found["indexes"] = sorted((n, d) for n, d in db.query(indexes) if not n.startswith("alembic"))
    else:
        indexes = sa.text("select name, sql from sqlite_master where type = 'index' and sql is not null")
        found["indexes"] = sorted((name, "".join(sql.split())) for name, sql in db.query(indexes))
    return found


def test_the_migrations_make_the_tables(empty: Database) -> None:
    migrate.upgrade(empty)
    assert differences(empty) == []


def test_the_comparison_sees_a_difference(empty: Database) -> None:
    migrate.upgrade(empty)
    execute(empty, sa.text("drop index ix_event_job_id"))
    assert differences(empty)


def test_the_migrations_make_what_create_all_makes(empty: Database) -> None:
    migrate.upgrade(empty)
    migrated = schema(empty)
    empty.transact(lambda tx: tables.metadata.drop_all(tx))
    empty.transact(lambda tx: tables.metadata.create_all(tx))
    assert schema(empty) == migrated


def test_sqlite_numbers_rows_by_itself(empty: Database) -> None:
    migrate.upgrade(empty)
    for _ in range(2):
        execute(empty, sa.insert(tables.event).values(at=0, action="x"))
    assert [row.id for row in empty.query(sa.select(tables.event.c.id).order_by(tables.event.c.id))] == [1, 2]


def test_the_newest_revision_is_the_one_that_is_named() -> None:
    from alembic.script import ScriptDirectory

    assert ScriptDirectory(str(migrate.folder())).get_current_head() == migrate.HEAD


def test_upgrade_twice(empty: Database) -> None:
    assert migrate.current(empty) is None
    assert migrate.upgrade(empty) == (None, migrate.HEAD)
    new_worker(empty)
    assert migrate.upgrade(empty) == (migrate.HEAD, migrate.HEAD)
    assert migrate.current(empty) == migrate.HEAD
    assert count(empty, tables.worker) == 1


def test_upgrades_by_threads_at_once(database_url: str) -> None:
    def work(number: int) -> str:
        db = Database(database_url)
        try:
            return migrate.upgrade(db)[1]
        finally:
            db.close()

    assert set(together(work, 6)) == {migrate.HEAD}
    db = Database(database_url)
    assert differences(db) == []
    assert count(db, sa.table("alembic_version")) == 1
    db.close()


def test_upgrades_by_processes_at_once(database_url: str) -> None:
    code = "import sys; from storage import database, migrate; migrate.upgrade(database.Database(sys.argv[1]))"
    assert ended([python(code, database_url) for _ in range(3)]) == [0, 0, 0]


def test_an_interrupted_upgrade_leaves_nothing(empty: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    from alembic import command

    real = command.upgrade

    def broken(*args: Any) -> None:
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "upgrade", broken)
    with pytest.raises(KeyboardInterrupt):
        migrate.upgrade(empty)
    assert migrate.current(empty) is None
    assert sa.inspect(empty.engine).get_table_names() == []
    monkeypatch.undo()
    migrate.upgrade(empty)
    assert differences(empty) == []


def test_downgrade_and_upgrade_again(empty: Database) -> None:
    from alembic import command
    from alembic.config import Config

    migrate.upgrade(empty)
    config = Config()
    config.set_main_option("script_location", str(migrate.folder()).replace("%", "%%"))

    def down(tx: Tx) -> None:
        config.attributes["connection"] = tx
        command.downgrade(config, "base")

    empty.transact(down)
    assert sa.inspect(empty.engine).get_table_names() == ["alembic_version"]
    assert migrate.upgrade(empty) == (None, migrate.HEAD)
    assert differences(empty) == []


# --- check ----------------------------------------------------------------------------------------------------------


def one_line(action: Any) -> str:
    """The message of the Misconfigured that an action raises."""
    with pytest.raises(Misconfigured) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert "postgres:" not in str(caught.value) or "***" in str(caught.value)
    return str(caught.value)


def test_check_of_a_database_without_tables(empty: Database) -> None:
    message = one_line(lambda: migrate.check(empty, create=False))
    assert "has no tables yet" in message
    assert message.endswith("run: imagemill db upgrade")
    migrate.check(empty, create=True)
    migrate.check(empty, create=False)


def test_an_unknown_revision_asks_for_a_newer_imagemill(empty: Database) -> None:
    migrate.upgrade(empty)
    execute(empty, sa.text("update alembic_version set version_num = '9999'"))
    for action in (
        lambda: migrate.check(empty, create=False),
        lambda: migrate.check(empty, create=True),
        lambda: migrate.upgrade(empty),
    ):
        message = one_line(action)
        assert "9999" in message
        assert "install the newer imagemill" in message


def test_an_old_revision_names_the_remedy(empty: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    migrate.upgrade(empty)
    monkeypatch.setattr(migrate, "HEAD", "0002")
    message = one_line(lambda: migrate.check(empty, create=True))
    assert f"is at revision {migrate.current(empty)}" in message
    assert "needs 0002" in message
    assert message.endswith("run: imagemill db upgrade")


def test_tables_of_a_stranger(empty: Database) -> None:
    execute(empty, sa.text("create table job (id integer primary key)"))
    message = one_line(lambda: migrate.check(empty, create=True))
    assert "job" in message


def test_alembic_s_own_command_uses_the_environment(
    database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from alembic import command
    from alembic.config import Config

    from storage import settings

    monkeypatch.setenv("IMAGEMILL_DATABASE_URL", database_url)
    settings.load.cache_clear()
    config = Config()
    config.set_main_option("script_location", str(migrate.folder()).replace("%", "%%"))
    command.upgrade(config, "head")
    with opened(database_url) as db:
        assert differences(db) == []


def test_a_file_of_another_program_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "i.db").write_text("dear diary, " * 100)
    with pytest.raises(Misconfigured):
        migrate.check(Database(f"sqlite:///{tmp_path}/i.db", 0.5), create=True)
    assert (tmp_path / "i.db").read_text().startswith("dear diary")
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(tmp_path / "i.db").execute("select 1 from sqlite_master")

"""Transactions that survive locks, killed backends and lost answers; errors as one line; the database's clock."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from storage import database, migrate, tables
from storage.database import Database, Tx, bulk_insert, db_now
from storage.errors import ImagemillError, Misconfigured, StoreFull, Unavailable
from storage.tables import event, item_label, worker
from tests.faultproxy import FaultProxy
from tests.services import HOST, Postgres, free_ports
from tests.support import count, ended, execute, new_worker, opened, python, together
from tests.times import soon

LABEL_COLUMNS = ("item_id", "label", "recipe_id", "objects", "top_score")


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    """A database with tables."""
    with opened(database_url) as database:
        yield database


@pytest.fixture
def pg(postgres_url: str) -> Iterator[Database]:
    """A Postgres database with tables."""
    with opened(postgres_url) as database:
        yield database


def add_event(tx: Tx, action: str) -> None:
    tx.execute(sa.insert(event).values(at=db_now(), action=action))


# --- the clock ----------------------------------------------------------------------------------------------------


def test_clock_agrees_with_ours_and_keeps_fractions(db: Database) -> None:
    before = time.time()
    seen = [db.query(sa.select(db_now()))[0][0] for _ in range(20)]
    assert all(isinstance(value, float) for value in seen)
    assert before - 1 < seen[0] <= seen[-1] < time.time() + 1
    assert len({value % 1 for value in seen}) > 1


def test_clock_moves_within_a_transaction(db: Database) -> None:
    def work(tx: Tx) -> float:
        first = tx.execute(sa.select(db_now())).scalar_one()
        time.sleep(0.05)
        return float(tx.execute(sa.select(db_now())).scalar_one() - first)

    assert 0.03 < db.transact(work) < 1


def test_clock_can_be_stored_and_compared(db: Database) -> None:
    worker_id = new_worker(db)
    assert count(db, worker, worker.c.heartbeat_at <= db_now(), worker.c.heartbeat_at > db_now() - 5) == 1
    assert count(db, worker, worker.c.heartbeat_at < db_now() - 5) == 0
    assert abs(db.query(sa.select(worker.c.heartbeat_at).where(worker.c.id == worker_id))[0][0] - time.time()) < 2


# --- transactions -------------------------------------------------------------------------------------------------


def test_a_transaction_that_raises_changes_nothing(db: Database) -> None:
    def work(tx: Tx) -> None:
        add_event(tx, "lost")
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        db.transact(work)
    assert caught.value.__cause__ is not caught.value
    assert count(db, event) == 0


def test_errors_of_this_house_pass_unchanged(db: Database) -> None:
    def work(tx: Tx) -> None:
        raise Misconfigured("as it is")

    with pytest.raises(Misconfigured, match=r"^as it is$"):
        db.transact(work)


def test_outages_are_tried_again_until_patience_ends(database_url: str) -> None:
    with opened(database_url, patience_s=0.3) as db:
        tries: list[int] = []

        def work(tx: Tx) -> None:
            tries.append(1)
            raise Unavailable("not yet")

        started = time.monotonic()
        with pytest.raises(Unavailable):
            db.transact(work)
        assert len(tries) > 2
        took_s = time.monotonic() - started
        assert took_s > 0.1
        assert soon(took_s, 2)


@pytest.mark.parametrize("ask", ["transact", "read"])
def test_what_failed_after_longer_than_patience_is_tried_again(database_url: str, ask: str) -> None:
    """As on a machine that stood still in a transaction, until the server ended it."""
    tries = []

    def work(tx: Tx) -> int:
        tries.append(tx)
        if len(tries) == 1:
            time.sleep(0.4)
            raise Unavailable("terminating connection due to idle-in-transaction timeout")
        return 7

    with opened(database_url, patience_s=0.2) as db:
        assert (db.transact(work) if ask == "transact" else db.ask(work, 0.2)) == 7
    assert len(tries) == 2


def test_a_full_disk_is_not_tried_again(db: Database) -> None:
    tries: list[int] = []

    def work(tx: Tx) -> None:
        tries.append(1)
        raise StoreFull("full")

    with pytest.raises(StoreFull):
        db.transact(work)
    assert len(tries) == 1


def test_reads_are_consistent_while_others_write(db: Database) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            db.transact(lambda tx: [add_event(tx, "pair"), add_event(tx, "pair")])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(count(db, event) % 2 == 0 for _ in range(50))
    finally:
        stop.set()
        writer.join()


def test_threads_count_without_losing_one(db: Database) -> None:
    new_worker(db)

    def work(number: int) -> None:
        for _ in range(25):
            db.transact(_read_then_write)

    def _read_then_write(tx: Tx) -> None:
        query = sa.select(worker.c.done_items).with_for_update()
        seen = tx.execute(query).scalar_one()
        tx.execute(sa.update(worker).values(done_items=seen + 1))

    together(work, 8)
    assert db.query(sa.select(worker.c.done_items))[0][0] == 200


# --- unique violations ----------------------------------------------------------------------------------------------


def test_threads_of_a_process_take_turns_at_sqlite(tmp_path: Path) -> None:
    """One that waits for another of its own process is not refused, and does not sleep past the other's end."""
    inside, waited = threading.Event(), []

    def hold(tx: Tx) -> None:
        inside.set()
        time.sleep(0.5)

    with opened(f"sqlite:///{tmp_path / 'turns.db'}", patience_s=0.1) as db:
        thread = threading.Thread(target=db.transact, args=(hold,))
        thread.start()
        inside.wait()
        started = time.monotonic()
        db.transact(lambda tx: waited.append(time.monotonic() - started))
        thread.join()
    assert waited[0] > 0.3


def test_unique_violation_is_an_integrity_error(db: Database) -> None:
    worker_id = new_worker(db)
    row = sa.insert(worker).from_select(["id"], sa.select(sa.literal(worker_id)))
    with pytest.raises(IntegrityError):
        execute(db, row)


def test_unique_violation_in_a_bulk_insert_is_an_integrity_error(db: Database) -> None:
    rows = [(1, "dog", 1, 1, 0.5), (2, "dog", 1, 1, 0.5)]
    db.transact(lambda tx: bulk_insert(tx, item_label, LABEL_COLUMNS, rows))
    again = [(i, "dog", 1, 1, 0.5) for i in range(3, 2000)] + rows
    with pytest.raises(IntegrityError) as raised:
        db.transact(lambda tx: bulk_insert(tx, item_label, LABEL_COLUMNS, again))
    assert "item_label" in str(raised.value)
    assert len(str(raised.value)) < 1000
    assert count(db, item_label) == 2


def test_bulk_insert_of_nothing(db: Database) -> None:
    db.transact(lambda tx: bulk_insert(tx, item_label, LABEL_COLUMNS, []))


@pytest.mark.parametrize("number", [1, 63, 999, 1000, 2107])
@pytest.mark.parametrize("alike", [1, 64, 5000])  # neighbours with the same value
def test_bulk_insert_of_any_number(db: Database, number: int, alike: int) -> None:
    rows = [(i, f"label {i // alike}", 1, i // alike, 0.25 + (i // alike % 2)) for i in range(number)]
    db.transact(lambda tx: bulk_insert(tx, item_label, LABEL_COLUMNS, rows))
    got = db.query(sa.text("select item_id, label, recipe_id, objects, top_score from item_label order by item_id"))
    assert [tuple(row) for row in got] == rows


def test_bulk_inserts_of_all_numbers_share_a_few_statements(db: Database) -> None:
    """Each connection keeps those that it has run, and the largest is megabytes."""
    seen = set()
    sa.event.listen(db.engine, "before_cursor_execute", lambda _c, _cursor, text, *_: seen.add(text))
    for number in range(1, 250, 7):
        rows = [(1000 * number + i, "dog", 1, 1, 0.5) for i in range(number)]
        db.transact(lambda tx, rows=rows: bulk_insert(tx, item_label, LABEL_COLUMNS, rows))
    assert len([text for text in seen if "item_label" in text]) <= 5  # of 1, 4, 16, 64 and 128 rows


def test_bulk_insert_keeps_numbers_and_nothing_apart(db: Database) -> None:
    columns = ("at", "action", "job_id", "detail")
    rows = [(float(i), "a", None if i % 2 else 1, "") for i in range(128)] + [(0.5, "b", None, "1")] * 64
    db.transact(lambda tx: bulk_insert(tx, event, columns, rows))
    assert [tuple(row) for row in db.query(sa.text("select at, action, job_id, detail from event order by id"))] == rows


def test_bulk_insert_takes_hostile_text(db: Database) -> None:
    labels = ["tab\tnew\nline", "back\\slash\\N", "\\.", "quote'\"", "", "日本 🐕", "null"]
    rows = [(i, label, 1, 1, 0.25) for i, label in enumerate(labels)]
    db.transact(lambda tx: bulk_insert(tx, item_label, LABEL_COLUMNS, rows))
    got = db.query(sa.text("select label from item_label order by item_id"))
    assert [row[0] for row in got] == labels


def test_a_value_the_driver_refuses_is_no_outage(pg: Database) -> None:
    started = time.monotonic()
    for work in (
        lambda tx: bulk_insert(tx, item_label, LABEL_COLUMNS, [(1, "nul\0", 1, 1, 0.5)]),
        lambda tx: tx.execute(sa.insert(event).values(at=0, action="nul\0")),
    ):
        with pytest.raises(sa.exc.DataError):
            pg.transact(work)
    assert soon(time.monotonic() - started, 2)


# --- Postgres: real deadlocks, serialization failures, killed backends --------------------------------------------


def test_a_deadlock_is_run_again_whole(pg: Database) -> None:
    first, second = new_worker(pg), new_worker(pg)
    tries: list[int] = []
    met = threading.Barrier(2)

    def cross(number: int) -> None:
        order = (first, second) if number == 0 else (second, first)

        def work(tx: Tx) -> None:
            tries.append(number)
            add = sa.update(worker).values(done_items=worker.c.done_items + 1)
            tx.execute(add.where(worker.c.id == order[0]))
            if tries.count(number) == 1:
                met.wait(10)
            tx.execute(add.where(worker.c.id == order[1]))

        pg.transact(work)

    together(cross, 2)
    assert len(tries) == 3, "one of the two must have been chosen as the victim, once"
    assert [row[0] for row in pg.query(sa.select(worker.c.done_items))] == [2, 2]


def test_a_serialization_failure_is_run_again_whole(pg: Database) -> None:
    new_worker(pg)
    tries: list[int] = []
    met = threading.Barrier(2)

    def count_up(number: int) -> None:
        def work(tx: Tx) -> None:
            tries.append(number)
            tx.exec_driver_sql("set transaction isolation level serializable")
            seen = tx.execute(sa.select(worker.c.done_items)).scalar_one()
            if tries.count(number) == 1:
                met.wait(10)
            tx.execute(sa.update(worker).values(done_items=seen + 1))

        pg.transact(work)

    together(count_up, 2)
    assert len(tries) == 3
    assert pg.query(sa.select(worker.c.done_items))[0][0] == 2


def kill_backends(server: Postgres, database: Database) -> None:
    """End every connection of one database, as a failover does."""
    name = database.url.rpartition("/")[2]
    others = f"from pg_stat_activity where datname = '{name}' and pid <> pg_backend_pid()"
    server.execute(f"select pg_terminate_backend(pid) {others}")


@pytest.mark.parametrize("how", ["statement", "copy", "commit"])
def test_a_killed_backend_is_survived(postgres: Postgres, pg: Database, how: str) -> None:
    tries: list[int] = []

    def work(tx: Tx) -> None:
        tries.append(1)
        add_event(tx, "once")
        if len(tries) == 1:
            kill_backends(postgres, pg)
        if how == "statement":
            tx.execute(sa.select(sa.literal(1)))
        if how == "copy":
            bulk_insert(tx, item_label, LABEL_COLUMNS, [(1, "dog", 1, 1, 0.5)])

    pg.transact(work)
    assert len(tries) == 2
    assert count(pg, event) == 1


def test_idle_connections_killed_in_the_pool_are_replaced(postgres: Postgres, pg: Database) -> None:
    together(lambda n: count(pg, event), 4)
    kill_backends(postgres, pg)
    assert count(pg, event) == 0
    with pg.read() as tx:
        assert tx.execute(sa.select(sa.literal(7))).scalar_one() == 7


def test_queries_are_tried_again_after_a_kill(postgres: Postgres, pg: Database) -> None:
    """None is lost, however often connections are killed; one whose answer was lost may be there twice."""
    done, kills = threading.Event(), list[int]()

    def kill() -> None:
        while not done.wait(0.2):
            kill_backends(postgres, pg)
            kills.append(1)

    def slowly(tx: Tx) -> None:
        add_event(tx, "x")
        tx.execute(sa.text("select pg_sleep(0.1)"))  # so that most kills find one under way

    def ask(number: int) -> None:
        while len(kills) < 4:
            count(pg, event)
            pg.transact(slowly)
            written.append(number)

    killer, written = threading.Thread(target=kill), list[int]()
    killer.start()
    try:
        together(ask, 2)
    finally:
        done.set()
        killer.join()
    assert len(written) >= 2
    assert count(pg, event) >= len(written)


def test_threads_beyond_the_pool_wait_their_turn(pg: Database) -> None:
    together(lambda n: [pg.transact(lambda tx: add_event(tx, "x")) for _ in range(5)], 20)
    assert count(pg, event) == 100


# --- SQLite: locks, threads, processes ------------------------------------------------------------------------------


@contextlib.contextmanager
def write_lock(path: Path) -> Iterator[sqlite3.Connection]:
    """Hold SQLite's write lock."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as holder:
        holder.execute("begin immediate")
        yield holder


def test_a_locked_sqlite_is_waited_for(tmp_path: Path) -> None:
    with opened(f"sqlite:///{tmp_path}/i.db") as db, write_lock(tmp_path / "i.db") as holder:
        timer = threading.Timer(0.5, holder.rollback)
        timer.start()
        started = time.monotonic()
        db.transact(lambda tx: add_event(tx, "late"))
        took_s = time.monotonic() - started
        assert took_s > 0.3
        assert soon(took_s, 5)
        timer.join()
        assert count(db, event) == 1


def test_a_lock_held_for_too_long_is_an_outage_within_bounded_time(tmp_path: Path) -> None:
    with opened(f"sqlite:///{tmp_path}/i.db", patience_s=0.5) as db, write_lock(tmp_path / "i.db"):
        started = time.monotonic()
        with pytest.raises(Unavailable, match="held by another process"):
            db.transact(lambda tx: add_event(tx, "never"))
        assert soon(time.monotonic() - started, 3)
        assert count(db, event) == 0, "reading goes on"


WRITE_MANY = """
import sys, sqlalchemy as sa
from storage.database import Database, db_now
from storage.tables import event
db = Database(sys.argv[1])
for _ in range(50):
    db.transact(lambda tx: tx.execute(sa.insert(event).values(at=db_now(), action="x")) and None)
    db.query(sa.select(event.c.id))
"""


def test_processes_share_one_sqlite_file(tmp_path: Path) -> None:
    with opened(f"sqlite:///{tmp_path}/i.db") as db:
        crowd = [python(WRITE_MANY, db.url) for _ in range(2)]
        together(lambda n: [db.transact(lambda tx: add_event(tx, "x")) for _ in range(25)], 4)
        assert ended(crowd) == [0, 0]
        assert count(db, event) == 200
        assert db.query(sa.text("pragma integrity_check"))[0][0] == "ok"
        assert db.query(sa.text("pragma journal_mode"))[0][0] == "wal"


def test_new_sqlite_file_opened_by_many_at_once(tmp_path: Path) -> None:
    def work(number: int) -> str:
        db = Database(f"sqlite:///{tmp_path}/deep/folder/i.db")
        try:
            return migrate.upgrade(db)[1]
        finally:
            db.close()

    assert set(together(work, 8)) == {migrate.HEAD}


def test_foreign_keys_hold_on_both(db: Database) -> None:
    values = {"number": 1, "state": "ready", "size": 1, "replaces": 0, "manifest_key": "m", "job_id": 12345}
    with pytest.raises(IntegrityError):
        execute(db, sa.insert(sa.table("shard", *map(sa.column, values))).values(values))


# --- what is wrong is said in one line ------------------------------------------------------------------------------


def say(url: str, patience_s: float = 0.5) -> ImagemillError:
    """The error that opening and asking a database raises; one line, in bounded time, without the password."""
    started = time.monotonic()
    with pytest.raises(ImagemillError) as caught:  # noqa: PT012 (both may raise)
        db = Database(url, patience_s)
        try:
            migrate.check(db, create=True)
        finally:
            db.close()
    assert soon(time.monotonic() - started, 15)
    assert "\n" not in str(caught.value)
    assert "s3cr3t" not in str(caught.value)
    return caught.value


def test_missing_database(postgres: Postgres) -> None:
    error = say(postgres.url_of("nowhere"))
    assert isinstance(error, Misconfigured)
    assert 'database "nowhere" does not exist' in str(error)
    assert postgres.password not in str(error)


@pytest.mark.parametrize("in_rows", [False, True], ids=["after a statement", "in the rows of a bulk insert"])
def test_whoever_is_frozen_in_a_transaction_holds_nobody_up(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, in_rows: bool
) -> None:
    """A stopped process keeps its locks until the server ends its session; when it goes on, it does its work again.

    The server ends sessions that wait for a statement, not those that wait for more data of one, as COPY does.
    """
    assert database._IDLE_MS <= 15_000, "what is said of a rescue: the lease and 15 s"
    monkeypatch.setattr(database, "_IDLE_MS", 500)
    asleep, tries = threading.Event(), []

    class Sleepy(list[tuple[object, ...]]):
        """Rows, between two of which the process stops."""

        def __getitem__(self, at: object) -> Sleepy:
            return self

        def __iter__(self) -> Iterator[tuple[object, ...]]:
            for number, row in enumerate(super().__iter__()):
                if number == 1:
                    sleep()
                yield row

    def sleep() -> None:
        asleep.set()
        time.sleep(5 if len(tries) == 1 else 0)

    def sleepy(tx: Tx) -> None:
        tries.append(1)
        tx.execute(sa.update(worker).values(model="sleeper"))
        if in_rows:
            bulk_insert(tx, item_label, LABEL_COLUMNS, Sleepy((i, "dog", 1, 1, 0.5) for i in range(3)))
        else:
            sleep()

    with opened(postgres_url) as db:
        new_worker(db)
        sleeper = threading.Thread(target=lambda: db.transact(sleepy))
        sleeper.start()
        assert asleep.wait(10)
        db.transact(lambda tx: tx.execute(sa.update(worker).values(queue="seen")) and None)
        assert sleeper.is_alive(), "it was waited for"
        sleeper.join()
        row = db.query(sa.select(worker.c.model, worker.c.queue))[0]
        assert (row.model, row.queue, len(tries)) == ("sleeper", "seen", 2)
        assert count(db, item_label) == (3 if in_rows else 0)


@pytest.mark.parametrize("table", tables.metadata.sorted_tables, ids=str)
def test_rows_of_every_table_can_be_inserted_in_bulk(postgres_url: str, table: sa.Table) -> None:
    """There is an array of each column's type."""
    with opened(postgres_url) as db, db.read() as tx:
        for column in table.columns:
            tx.exec_driver_sql("SELECT %b::" + database._pg_type(column.type, tx.dialect) + "[]", (None,))


def test_wrong_password_and_user(postgres: Postgres) -> None:
    for user in ("postgres", "nobody"):
        error = say(f"postgresql://{user}:s3cr3t@{HOST}:{postgres.port}/postgres")
        assert isinstance(error, Misconfigured)
        assert "IMAGEMILL_DATABASE_URL" in str(error)


def test_unreachable_port() -> None:
    (port,) = free_ports(1)
    error = say(f"postgresql://u:s3cr3t@{HOST}:{port}/db")
    assert isinstance(error, Unavailable)
    assert "refused" in str(error)


def test_a_server_that_does_not_answer(postgres: Postgres) -> None:
    with FaultProxy(postgres.port) as proxy:
        proxy.blackhole()
        error = say(f"postgresql://postgres:{postgres.password}@{HOST}:{proxy.port}/postgres")
    assert isinstance(error, Unavailable)


def test_no_permission(postgres: Postgres, postgres_url: str) -> None:
    postgres.execute("create role reader login password 's3cr3t'")
    try:
        name = postgres_url.rpartition("/")[2]
        error = say(f"postgresql://reader:s3cr3t@{HOST}:{postgres.port}/{name}")
        assert isinstance(error, Misconfigured)
        assert "permission denied" in str(error)
    finally:
        postgres.execute("drop role reader")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "mysql://u:s3cr3t@h/db",
        "sqlite://",
        "sqlite:///:memory:",
        "postgresql://u:s3cr3t@h:port/db",
        "postgresql://u:s3cr3t@127.0.0.1:99999/db",
        "postgresql://u:s3cr3t@127.0.0.1:1/db?colour=s3cr3t",
        "postgresql://u:s3cr3t@127.0.0.1:1/db?sslmode=colourful",
        "postgresql://u:s3cr3t@[::1/db",
    ],
)
def test_urls_that_cannot_be(url: str) -> None:
    assert isinstance(say(url), Misconfigured)


def test_a_corrupt_sqlite_file(tmp_path: Path) -> None:
    (tmp_path / "i.db").write_bytes(os.urandom(10_000))
    error = say(f"sqlite:///{tmp_path}/i.db")
    assert isinstance(error, Misconfigured)
    assert "not an imagemill database" in str(error)


def test_a_damaged_sqlite_file(tmp_path: Path) -> None:
    with opened(f"sqlite:///{tmp_path}/i.db"):
        pass
    data = bytearray((tmp_path / "i.db").read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    (tmp_path / "i.db").write_bytes(data)
    db = Database(f"sqlite:///{tmp_path}/i.db", 0.5)
    with pytest.raises(Misconfigured):
        db.query(sa.text("select * from event, worker, job, item"))
    db.close()


@contextlib.contextmanager
def no_root() -> Iterator[None]:
    """Act as the account nobody where the tests run as root, whom no permission stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    for parent in (tmp_path, *tmp_path.parents):
        with contextlib.suppress(PermissionError):
            parent.chmod(parent.stat().st_mode | 0o011)
    folder.chmod(0o555)
    with no_root():
        assert isinstance(say(f"sqlite:///{folder}/i.db"), Misconfigured)
        assert isinstance(say(f"sqlite:///{folder}/deeper/i.db"), Misconfigured)


def test_a_read_only_file(tmp_path: Path) -> None:
    with opened(f"sqlite:///{tmp_path}/i.db") as db:
        pass
    for parent in (tmp_path, *tmp_path.parents):
        with contextlib.suppress(PermissionError):
            parent.chmod(parent.stat().st_mode | 0o011)
    (tmp_path / "i.db").chmod(0o444)
    with no_root():
        db = Database(f"sqlite:///{tmp_path}/i.db", 0.5)
        with pytest.raises(Misconfigured, match=r"readonly|unable to open"):
            db.transact(lambda tx: add_event(tx, "never"))
        db.close()


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    assert isinstance(say(f"sqlite:///{tmp_path}"), Misconfigured)


def test_a_database_without_tables_names_the_remedy(database_url: str) -> None:
    db = Database(database_url, 0.5)
    with pytest.raises(Misconfigured, match="imagemill db upgrade"):
        count(db, event)
    with pytest.raises(Misconfigured, match="imagemill db upgrade"):
        db.transact(lambda tx: add_event(tx, "never"))
    db.close()


def test_a_full_sqlite_is_said_to_be_full(tmp_path: Path) -> None:
    with opened(f"sqlite:///{tmp_path}/i.db") as db:

        def work(tx: Tx) -> None:
            tx.exec_driver_sql("pragma max_page_count = 1")
            bulk_insert(tx, item_label, LABEL_COLUMNS, [(i, "x" * 500, 1, 1, 0.5) for i in range(2000)])

        with pytest.raises(StoreFull):
            db.transact(work)

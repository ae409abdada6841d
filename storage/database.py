"""One SQL database, SQLite or Postgres: connections, whole-transaction retry, the database's clock, bulk inserts.

All times are seconds since the epoch as floats, by the database's own clock, so both databases store and compare
the same numbers and no worker's clock matters.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.ext.compiler import compiles

from storage.errors import ImagemillError, Misconfigured, StoreFull, Unavailable
from storage.settings import masked

T = TypeVar("T")
Tx = sa.Connection

_UPGRADE = "run: imagemill db upgrade"
_IDLE_MS = 10_000  # in a transaction, ms; whoever is frozen in one holds locks that the others wait for
_WAL_PAGES = 4000  # of 4 kB, before SQLite takes the log into its file: each time is two more waits for the disk
# In one statement of SQLite, which takes 32,766 values. These sizes only: each connection keeps the statements that it
# has run, and one of a thousand rows of eighteen columns is 2.6 MB.
_ROWS = (1024, 512, 256, 128, 64, 16, 4, 1)
_MANY = 64  # rows, of which it is worth while to look for what they have in common

# SQLSTATEs after which the whole transaction may simply run again: serialization failure, deadlock, lock and statement
# timeouts, a server that shuts down, starts up, fails over or has no connection left (postgresql.org, appendix A).
_PG_AGAIN = ("40001", "40P01", "55P03", "57014", "57P01", "57P02", "57P03", "57P05", "25P03", "53300", "25006", "08")
_PG_REFUSED = ("28000", "28P01", "3D000", "42501")
# What a connection is refused with carries no SQLSTATE in psycopg, only text.
_PG_REFUSED_TEXTS = (
    *("password authentication failed", "does not exist", "no pg_hba.conf entry", "not permitted to log in"),
    *("invalid connection option", "connection is bad: invalid", "does not support SSL", "certificate verify failed"),
)
_PG_UNDEFINED = ("42P01", "42703", "3F000")


class db_now(sa.sql.functions.FunctionElement[float]):
    """The database's clock: seconds since the epoch. On Postgres it moves within a transaction."""

    type = sa.Float(53)
    inherit_cache = True


@compiles(db_now, "postgresql")
def _pg_now(element: Any, compiler: Any, **kw: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


@compiles(db_now, "sqlite")
def _sqlite_now(element: Any, compiler: Any, **kw: Any) -> str:
    # unixepoch('subsec') is NULL before SQLite 3.42.
    return "((julianday('now') - 2440587.5) * 86400.0)"


class Database:
    """The SQL index behind a URL. Safe to use from several threads.

    Args:
        url: sqlite:///path or postgresql://user:password@host/name.
        patience_s: how long a transaction is tried again after the server has not answered, before Unavailable. It
            counts from the first failure: a machine that stood still for longer than that tries again, too.
        session: what its sessions are called on the server, for others who have to end them.
    """

    def __init__(self, url: str, patience_s: float = 10, session: str = "imagemill") -> None:
        self.url, self.patience_s = url, patience_s
        self.engine = _engine(url, patience_s, session)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        # SQLite has one writer at a time, and lets the others sleep and ask again; threads of one process need not.
        self._turn = threading.Lock() if self.is_sqlite else contextlib.nullcontext()

    @contextlib.contextmanager
    def read(self) -> Iterator[Tx]:
        """A read-only transaction. The errors of the library are translated; it is not tried again."""
        try:
            with self.engine.connect() as connection:
                yield connection
        except (DBAPIError, sa.exc.TimeoutError) as error:
            known = self._translated(error)
            if known is error:
                raise
            raise known from error

    def transact(self, work: Callable[[Tx], T]) -> T:
        """Run `work` in one write transaction; on a lost connection or lock run all of it again, within patience.

        The answer to a COMMIT may be lost, so `work` may run again after it has succeeded: it must find that out itself
        (a fence, a unique token) or be harmless twice.
        """
        deadline, pause = 0.0, 0.02
        while True:
            try:
                with self._turn, self._writing() as connection, connection.begin():
                    return work(connection)
            except Exception as error:
                known = self._translated(error)
                passing = isinstance(known, Unavailable) and not isinstance(known, StoreFull)
                deadline = deadline or time.monotonic() + self.patience_s
                if not passing or time.monotonic() + pause > deadline:
                    if known is error:
                        raise
                    raise known from error
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, 2.0)

    def query(self, statement: sa.Executable, values: Mapping[str, Any] | None = None) -> Sequence[Any]:
        """All rows of one SELECT, tried again like a transaction.

        Args:
            values: what the statement binds by name.
        """
        return self.ask(lambda tx: tx.execute(statement, values).fetchall(), self.patience_s)

    def now(self) -> float:
        """The database's clock, in seconds since the epoch; asked once, not again."""
        return self.ask(lambda tx: float(tx.execute(sa.select(db_now())).scalar_one()), 0)

    def ask(self, question: Callable[[Tx], T], patience_s: float) -> T:
        """What `question` reads in a transaction of its own, asked again for so long while there is no answer."""
        deadline = 0.0
        while True:
            try:
                with self.read() as tx:
                    return question(tx)
            except Unavailable:
                deadline = deadline or time.monotonic() + patience_s
                if time.monotonic() >= deadline:
                    raise
                time.sleep(random.uniform(0.05, 0.3))

    def close(self) -> None:
        """Close the pooled connections."""
        self.engine.dispose()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Tx]:
        with self.engine.connect() as connection:
            yield connection.execution_options(imagemill_write=True)

    def _translated(self, error: Exception) -> Exception:
        if isinstance(error, ImagemillError):
            return error
        if isinstance(error, sa.exc.TimeoutError):
            return Unavailable(f"all connections to the database {masked(self.url)} are in use")
        cause = (error.orig or error) if isinstance(error, DBAPIError) else error
        if type(cause).__module__.startswith("psycopg"):
            return _from_psycopg(cause, self.url, error)
        if type(cause).__module__ == "sqlite3":
            return _from_sqlite(cause, self.url, error)
        return error


def bulk_insert(tx: Tx, table: sa.Table, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert many rows in few statements. A column's values are all of one Python type, or None.

    Raises the same errors as any other statement, such as IntegrityError for a row that is there already.
    """
    if not rows:
        return
    sqlite = tx.dialect.name == "sqlite"
    start = 0
    for size in _ROWS if sqlite else (len(rows),):
        while len(rows) - start >= size:
            by_column = list(zip(*rows[start : start + size], strict=True))
            # Half of the columns say the same of a whole shard. Values, above all None and bools, which go through
            # sqlite3's adapters, take longer to bind than to store: bound once, a row took 2.5 us instead of 9.
            alike = tuple(size >= _MANY and column.count(column[0]) == size for column in by_column)
            once = [column[0] for column, is_alike in zip(by_column, alike, strict=True) if is_alike]
            others = [column for column, is_alike in zip(by_column, alike, strict=True) if not is_alike]
            if sqlite:
                statement = _sqlite_insert(table.name, tuple(columns), alike, size)
                values = tuple(chain(once, *others))
            else:
                kinds = tuple(_pg_type(table.c[name].type, tx.dialect) for name in columns)
                statement = _postgres_insert(table.name, tuple(columns), kinds, alike)
                values = (*once, *map(list, others))
            try:
                tx.exec_driver_sql(statement, values)
            except DBAPIError as error:
                # As it stands in messages: a hundred thousand letters of question marks would explain nothing.
                error.statement, error.params = f'INSERT INTO "{table.name}"', None
                raise
            start += size


# With executemany the interpreter's lock is let go and taken again for every row, which beside busy threads means to
# wait for each. On Postgres a COPY, or a pipeline, would be faster; but a client that is frozen in the midst of one
# keeps its locks for ever: its session waits for data, which counts as busy, and no timeout of the server ends it. The
# rows of a statement are sent all at once, and a session that waits for the next statement is idle. (A client
# that is frozen while the kernel takes this one message is left to `jobs.leases.end_sessions`.)


@lru_cache(maxsize=8 * len(_ROWS))
def _sqlite_insert(table: str, columns: tuple[str, ...], alike: tuple[bool, ...], rows: int) -> str:
    """An insert of so many rows: binds what is alike in all of them once, then the other columns one after another."""
    once, others = itertools.count(1), itertools.count()
    firsts = [
        (next(once), 0) if is_alike else (1 + sum(alike) + rows * next(others), 1) for is_alike in alike
    ]  # of each column its first value's number, and how far it is to the next row's
    each = (", ".join(f"?{first + row * step}" for first, step in firsts) for row in range(rows))
    return f'INSERT INTO "{table}" ({_quoted(columns)}) VALUES ({"), (".join(each)})'  # noqa: S608


@lru_cache(maxsize=64)
def _postgres_insert(table: str, columns: tuple[str, ...], kinds: tuple[str, ...], alike: tuple[bool, ...]) -> str:
    """An insert of any number of rows: binds what is alike in all of them, then an array for each other column.

    In binary, which is half the work of text.
    """
    both = list(zip(columns, kinds, alike, strict=True))
    once = ", ".join(f"%b::{kind}" if is_alike else f'of_rows."{name}"' for name, kind, is_alike in both)
    arrays = ", ".join(f"%b::{kind}[]" for _, kind, is_alike in both if not is_alike)
    others = _quoted([name for name, _, is_alike in both if not is_alike])
    return f'INSERT INTO "{table}" ({_quoted(columns)}) SELECT {once} FROM unnest({arrays}) AS of_rows ({others})'  # noqa: S608


def _pg_type(kind: Any, dialect: sa.Dialect) -> str:
    """A column's type as it stands in a cast."""
    name: str = kind.compile(dialect=dialect)
    return name.partition(" COLLATE ")[0]


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _engine(url: str, patience_s: float, session: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):
        raise Misconfigured(_expected(url)) from None
    try:
        if parsed.get_backend_name() == "sqlite" and parsed.database and ":memory:" not in url:
            return _sqlite_engine(parsed, patience_s)
        if parsed.get_backend_name() == "postgresql":
            return _postgres_engine(parsed, session)
    except (NoSuchModuleError, ValueError):
        pass
    raise Misconfigured(_expected(url))


def _expected(url: str) -> str:
    return f"cannot use {masked(url)!r} as a database: expected sqlite:///path or postgresql://user:password@host/name"


def _sqlite_engine(url: sa.URL, patience_s: float) -> sa.Engine:
    assert url.database is not None
    with contextlib.suppress(OSError):
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url, connect_args={"timeout": patience_s}, pool_size=8, pool_use_lifo=True)

    @sa.event.listens_for(engine, "connect")
    def _prepare(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"wal_autocheckpoint={_WAL_PAGES}"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Tx) -> None:
        # A transaction that reads first and writes later would fail, not wait, when another writer came between.
        writes = connection.get_execution_options().get("imagemill_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgres_engine(url: sa.URL, session: str) -> sa.Engine:
    return sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,
        pool_size=4,
        max_overflow=8,
        connect_args={
            "connect_timeout": 5,
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "prepare_threshold": None,  # prepared statements break behind PgBouncer in transaction mode
            "application_name": session,
            "options": f"-c lock_timeout=15000 -c statement_timeout=120000 "
            f"-c idle_in_transaction_session_timeout={_IDLE_MS}",
        },
    )


def _from_psycopg(cause: BaseException, url: str, error: Exception) -> Exception:
    state = getattr(cause, "sqlstate", None) or ""
    text = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    if state in _PG_UNDEFINED:
        return Misconfigured(f"the database {masked(url)} lacks a table or column of this version; {_UPGRADE}")
    if state == "42P07":
        return Misconfigured(_stranger(url, text))
    if state in _PG_REFUSED or (not state and any(words in text for words in _PG_REFUSED_TEXTS)):
        return Misconfigured(f"Postgres refused {masked(url)}: {text}; check IMAGEMILL_DATABASE_URL")
    if state in ("53100", "53200"):
        return StoreFull(f"Postgres has no space left: {text}")
    # Without a state it never reached the server: the connection is lost, or the driver refuses a value.
    lost = not state and type(cause).__name__ in ("OperationalError", "InterfaceError", "ConnectionTimeout")
    if state.startswith(_PG_AGAIN) or lost:
        return Unavailable(f"cannot reach the database {masked(url)}: {text}")
    return error


def _stranger(url: str, text: str) -> str:
    return f"the database {masked(url)} has tables of another program ({text}); give imagemill one of its own"


def _from_sqlite(cause: BaseException, url: str, error: Exception) -> Exception:
    text = str(cause)
    if "locked" in text or "busy" in text:
        return Unavailable(f"the database {masked(url)} is held by another process for too long")
    if "disk is full" in text or "disk I/O error" in text:
        return StoreFull(f"no space left for the database {masked(url)}; free some and run the same command again")
    if "unable to open" in text or "readonly" in text:
        return Misconfigured(f"cannot open the database {masked(url)}: {text}; check the folder and its permissions")
    if "no such table" in text or "no such column" in text or "has no column" in text:
        return Misconfigured(f"the database {masked(url)} lacks a table or column of this version; {_UPGRADE}")
    if "already exists" in text:
        return Misconfigured(_stranger(url, text))
    if "not a database" in text or "malformed" in text:
        return Misconfigured(f"{masked(url)} is not an imagemill database: {text}; move the file away")
    return error

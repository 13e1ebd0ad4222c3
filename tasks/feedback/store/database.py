"""The database of the preference store: SQLite under the home, or Postgres by its address.

Writers of a project take turns on both: SQLite has one writer at a time anyway, and on Postgres a
transaction that writes first locks the row of its project. So no transaction meets half of another,
two never insert the same thing, and none waits for another in a circle.
"""

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, Engine, create_engine, event, inspect, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session

from rlhf_core import redaction
from rlhf_core.errors import ConfigError, UserError
from tasks.feedback.store.tables import Project

MIGRATIONS = Path(__file__).parent / "migrations"
HEAD = "0002"  # the present version of the tables
BUSY_SECONDS = 30.0  # how long a writer waits for another
# Threads of the page's server; each may hold a connection for a moment.
CONNECTIONS = {"pool_size": 10, "max_overflow": 40}

# What a database says, in its own words or by the code of Postgres, and what to do about it.
_FAILURES = {
    "disk is full": "its disk is full; free some space there, and do it again",
    "53100": "its disk is full; free some space there, and do it again",
    "No space left": "its disk is full; free some space there, and do it again",
    "readonly database": "it cannot be written; check the rights of the file and of its folder",
    "25006": "it is read-only; use the primary server",
    "unable to open": "it cannot be opened; check the path, and the rights of the folder",
    "malformed": "the file is damaged; restore it from a back-up with `rlhf restore`",
    "not a database": "the file is no SQLite database; check RLHF_FEEDBACK_DATABASE",
    "disk I/O error": "the file cannot be read or written; check the disk, then restore a back-up",
    "database is locked": "another program has held it for too long; end that, and do it again",
    "55P03": "another program has held it for too long; end that, and do it again",
    "53300": "the server has too many connections; raise its max_connections",
    "42501": "this user has no rights there; make it the owner of the database",
}


class StoreError(UserError):
    """The database of the preference store cannot be used; nothing half-done is in it."""


class Database:
    """An engine, and transactions on it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file."""
        return self.engine.dialect.name == "sqlite"

    @property
    def name(self) -> str:
        """Its address, without the password."""
        return self.engine.url.render_as_string(hide_password=True)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that changes nothing.

        Raises: StoreError when the database cannot be read.
        """
        with self.explained(), Session(self.engine) as session:
            yield session

    @contextmanager
    def writing(self, project: int | None = None) -> Iterator[Session]:
        """A transaction that is committed at the end of the block, or undone if it raises.

        Args:
            project: whose turn it takes; None = of nothing that two could do at once.

        Raises: StoreError when the database cannot be written.
        """
        with self.explained(), Session(self.engine) as session, session.begin():
            if self.is_sqlite:
                session.connection(execution_options={"sqlite_begin": "IMMEDIATE"})
            if project is not None:
                self.take_turn(session, project)
            yield session

    def take_turn(self, session: Session, project: int) -> None:
        """Wait until no other transaction writes to a project; none will until this one ends."""
        if not self.is_sqlite:  # where its turn has come as soon as it begins
            turn = select(Project.id).where(Project.id == project)
            session.execute(turn.with_for_update(key_share=True))

    def migrate(self) -> None:
        """Bring the tables to the present version; safe while others do the same.

        Raises: StoreError when they are those of a later version, or of another program.
        """
        with self.explained():
            if self._version() == HEAD:
                return
            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS))
            with self.engine.connect().execution_options(sqlite_begin="IMMEDIATE") as connection:
                config.attributes["connection"] = connection
                try:
                    command.upgrade(config, "head")
                except CommandError as error:
                    raise StoreError(self._foreign()) from error

    def _version(self) -> str | None:
        """The version of the tables; None if there are none."""
        tables = inspect(self.engine).get_table_names()
        if "alembic_version" not in tables:
            if clash := {"projects", "judgments"} & set(tables):
                raise StoreError(
                    f"The database {self.name} has a table {min(clash)} of another program: give "
                    "the preference store a database of its own in RLHF_FEEDBACK_DATABASE."
                )
            return None
        with Session(self.engine) as session:
            version: str | None = session.scalar(text("SELECT version_num FROM alembic_version"))
            return version

    def _foreign(self) -> str:
        if "judgments" in inspect(self.engine).get_table_names():
            return (
                f"The preference store {self.name} was written by a later version of this program "
                f"(its tables are of version {self._version()}, and this one knows {HEAD}): "
                "install that version."
            )
        return (
            f"The database {self.name} is that of another program, such as MLflow: give the "
            "preference store a database of its own in RLHF_FEEDBACK_DATABASE."
        )

    def erase(self, *tables: str) -> bool:
        """Have the database overwrite what was deleted from some tables.

        SQLite zeroes it at once, but keeps the log beside the file until it is emptied. Postgres
        keeps old rows until the table is written anew.

        Returns: whether it is done; somebody who reads for long keeps the log of SQLite.
        """
        with self.explained(), self.engine.connect() as connection:
            if self.is_sqlite:
                raw = connection.connection.dbapi_connection
                assert raw is not None
                busy, *_ = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                return not busy
            free = connection.execution_options(isolation_level="AUTOCOMMIT")
            for table in tables:
                free.execute(text(f"VACUUM FULL {table}"))
        return True

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Make one sentence of what a user or the machine can cause; a defect stays as it is."""
        try:
            yield
        except PoolTimeoutError as error:
            raise StoreError(
                f"The preference store {self.name} is busy: too many ask it at once."
            ) from error
        except DBAPIError as error:
            if reason := _reason(error, self.is_sqlite):
                raise StoreError(f"The preference store {self.name} failed: {reason}.") from error
            raise


def _reason(error: DBAPIError, sqlite: bool) -> str:
    said = str(error.orig).strip()
    code = getattr(error.orig, "pgcode", None) or ""
    for sign, reason in _FAILURES.items():
        if sign == code or (len(sign) > 5 and sign in said):
            return reason
    # Without a code, or with one of these, it is the connection that failed.
    away = not code or code[:2] in ("08", "28", "57") or code == "3D000"
    if not sqlite and away and (error.connection_invalidated or _is_operational(error)):
        first = said.splitlines()[0] if said else "it closed the connection"
        return f"it does not answer ({first}); check the server and RLHF_FEEDBACK_DATABASE"
    return ""


def _is_operational(error: DBAPIError) -> bool:
    return type(error).__name__ in ("OperationalError", "InterfaceError")


def open_database(url: str, *, migrate: bool = True) -> Database:
    """Open a database, and make its tables or bring them up to date.

    Args:
        url: sqlite:///PATH or postgresql+psycopg2://USER:PASSWORD@HOST:PORT/NAME.

    Raises: ConfigError for an address that is none; StoreError if the database cannot be used.
    """
    try:
        parsed = make_url(url)
        if parsed.password:
            redaction.remember([parsed.password])
        database = Database(_engine(parsed))
    except (ArgumentError, NoSuchModuleError, ImportError, ValueError) as error:
        raise ConfigError(
            f"RLHF_FEEDBACK_DATABASE is no address of a database ({error}); write "
            "sqlite:///PATH, or postgresql+psycopg2://USER:PASSWORD@HOST:PORT/NAME with the extra "
            "`stack` installed"
        ) from error
    if migrate:
        try:
            database.migrate()
        except BaseException:
            database.close()
            raise
    return database


def _engine(url: URL) -> Engine:
    kind = url.get_backend_name()
    if kind == "sqlite":
        return _sqlite(url)
    if kind not in ("postgresql", "postgres"):
        raise ValueError(f"{kind} is neither sqlite nor postgresql")
    return create_engine(
        url.set(drivername="postgresql+psycopg2"),
        json_serializer=_json,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": 10,
            "options": f"-c lock_timeout={BUSY_SECONDS:.0f}s -c timezone=UTC",
            "application_name": "rlhf feedback",
        },
        **CONNECTIONS,
    )


def _sqlite(url: URL) -> Engine:
    where = url.render_as_string(hide_password=True)
    in_memory = not url.database or url.database == ":memory:"
    if not in_memory and not str(url.database).startswith("file:"):
        assert url.database is not None
        path = Path(url.database)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not path.exists():  # names of people are in it
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise StoreError(
                f"The preference store {where} cannot be made ({error}); check "
                "RLHF_FEEDBACK_DATABASE or RLHF_HOME, and the rights of the folder."
            ) from error
    more = {} if in_memory else CONNECTIONS
    engine = create_engine(
        url,
        json_serializer=_json,
        connect_args={"timeout": BUSY_SECONDS},
        **more,
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # the driver's own BEGIN comes too late
        cursor = connection.cursor()
        _use_wal(cursor)
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA secure_delete=ON")  # a name that is deleted is gone from the file
        cursor.execute("PRAGMA cache_size=-16000")  # KiB
        cursor.execute("PRAGMA journal_size_limit=67108864")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        how = connection.get_execution_options().get("sqlite_begin", "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {how}")

    return engine


def _use_wal(cursor: sqlite3.Cursor) -> None:
    """Write ahead, so that readers and a writer do not wait for each other.

    SQLite does not wait by itself when several switch a new file at once.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


# Letters of all scripts as they are; control characters, NUL too, are escaped in any case.
_json = partial(json.dumps, ensure_ascii=False)

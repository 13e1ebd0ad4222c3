"""The database of the preference store: SQLite under the home, or Postgres by its address."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import Session

from rlhf_core import redaction
from rlhf_core.errors import ConfigError, UserError

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_SECONDS = 30.0  # how long a writer waits for another


class Database:
    """An engine, and transactions on it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that changes nothing."""
        with Session(self.engine) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction that is committed at the end of the block, or undone if it raises.

        SQLite has one writer at a time: the transaction takes its turn at once, so that it never
        fails half way because another came first.
        """
        with Session(self.engine) as session, session.begin():
            if self.is_sqlite:
                session.connection(execution_options={"sqlite_begin": "IMMEDIATE"})
            yield session

    def migrate(self) -> None:
        """Bring the tables to the present version; safe while others do the same."""
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        with self.engine.connect().execution_options(sqlite_begin="IMMEDIATE") as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def open_database(url: str, *, migrate: bool = True) -> Database:
    """Open a database, and make its tables or bring them up to date.

    Args:
        url: sqlite:///PATH or postgresql+psycopg2://USER:PASSWORD@HOST:PORT/NAME.

    Raises: ConfigError for an address that is none; UserError if the database cannot be opened.
    """
    try:
        parsed = make_url(url)
        if parsed.password:
            redaction.remember([parsed.password])
        if parsed.get_backend_name() == "sqlite":
            engine = _sqlite(url, parsed.database)
        else:
            engine = create_engine(parsed, pool_pre_ping=True, pool_size=10, max_overflow=20)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise ConfigError(
            f"RLHF_FEEDBACK_DATABASE is no address of a database ({error}); write "
            "sqlite:///PATH, or postgresql+psycopg2://USER:PASSWORD@HOST:PORT/NAME with the extra "
            "`stack` installed"
        ) from error
    database = Database(engine)
    if migrate:
        try:
            database.migrate()
        except OperationalError as error:
            raise UserError(
                f"The preference store {parsed.render_as_string(hide_password=True)} cannot be "
                f"opened ({error.orig}); check RLHF_FEEDBACK_DATABASE."
            ) from error
    return database


def _sqlite(url: str, path: str | None) -> Engine:
    if path and path != ":memory:":
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # the driver's own BEGIN comes too late
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        how = connection.get_execution_options().get("sqlite_begin", "DEFERRED")
        connection.exec_driver_sql(f"BEGIN {how}")

    return engine

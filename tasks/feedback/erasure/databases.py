"""Takes a pseudonym out of the databases of Prefect and MLflow, which have no call for it.

Parameters of runs, logs, artifacts and their like are rows of text or JSON. Each cell that has the
pseudonym is written anew; then the database is written anew, so that no freed page has it either.
Servers may run meanwhile: a writer waits for its turn.
"""

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, IntegrityError

from rlhf_core.errors import UserError
from tasks.feedback.erasure.documents import GONE, Look, without
from tasks.feedback.erasure.names import TEXTS, WHO, Name
from tasks.feedback.erasure.requests import NOBODY

WAIT_SECONDS = 60.0
_LOOK = """
import json, pathlib, sys
from tasks.feedback.erasure.documents import look
from tasks.feedback.erasure.names import Name
asked = json.load(sys.stdin)
name = Name(**asked["name"])
json.dump([look(pathlib.Path(path), name) for path in asked["paths"]], sys.stdout)
"""
_TEXTUAL = ("CHAR", "TEXT", "CLOB", "JSON", "BLOB", "STRING", "BYTEA")


@dataclass
class Cleaned:
    """What was done to a database."""

    place: str
    cells: dict[str, int] = field(default_factory=dict)  # written anew, by table
    words: int = 0  # cells with the same word that need not be the person


def look_apart(paths: Sequence[Path], name: Name) -> dict[Path, Look]:
    """What is in files that this process may have open as databases, seen by another process."""
    if not paths:
        return {}
    done = subprocess.run(
        [sys.executable, "-c", _LOOK],
        input=json.dumps({"name": name.spelled(), "paths": list(map(str, paths))}),
        encoding="ascii",
        stdout=subprocess.PIPE,
        check=True,
    )
    looks = json.loads(done.stdout)
    return {path: Look(*seen) for path, seen in zip(paths, looks, strict=True)}


def clean_file(path: Path, name: Name) -> Cleaned:
    """Take a pseudonym out of a SQLite file."""
    return clean(make_url(f"sqlite:///{path}"), name)


def clean(url: URL, name: Name) -> Cleaned:
    """Take a pseudonym out of a database.

    Raises: UserError when it cannot be reached, or somebody holds it for too long.
    """
    place = url.render_as_string(hide_password=True)
    done = Cleaned(place)
    engine = _engine(url)
    try:
        with engine.begin() as connection:
            for table in inspect(connection).get_table_names():
                changed, words = _clean_table(connection, table, name)
                done.words += words
                if changed:
                    done.cells[table] = changed
        _write_anew(engine, list(done.cells))
    except DBAPIError as error:
        raise UserError(
            f"The database {place} cannot be searched or written ({_first_line(error)}): see that "
            "it runs and that nobody holds it, then erase again to go on."
        ) from error
    finally:
        engine.dispose()
    return done


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(url.set(drivername="postgresql+psycopg2"))
    engine = create_engine(url, connect_args={"timeout": WAIT_SECONDS})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        with closing(connection.cursor()) as cursor:
            cursor.execute("PRAGMA secure_delete=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _clean_table(connection: Connection, table: str, name: Name) -> tuple[int, int]:
    """How many cells were written anew, and how many have the word for something else."""
    sqlite = connection.dialect.name == "sqlite"
    quote = connection.dialect.identifier_preparer.quote
    columns = inspect(connection).get_columns(table)
    textual = [c for c in columns if any(kind in str(c["type"]).upper() for kind in _TEXTUAL)]
    keys = inspect(connection).get_pk_constraint(table)["constrained_columns"]
    row = ["rowid"] if sqlite and not _without_rowid(connection, table) else list(keys)
    if not row:
        row = ["ctid"]
    changed = words = 0
    for column in textual:
        cells = _cells(connection, table, row, column["name"], name)
        for where, value in list(cells):
            new = _new_value(value, column["name"], name)
            if new == value:
                words += 1
                continue
            kind = str(column["type"]).upper()
            cast = f"CAST(:new AS {kind})" if not sqlite and "JSON" in kind else ":new"
            condition = " AND ".join(f"{quote(key)} = :k{n}" for n, key in enumerate(row))
            command = text(
                f"UPDATE {quote(table)} SET {quote(column['name'])} = {cast} WHERE {condition}"
            )
            values = {f"k{n}": value for n, value in enumerate(where)}
            try:
                with connection.begin_nested():
                    connection.execute(command, {"new": new, **values})
            except IntegrityError:  # there may be one of each
                unique = f"{NOBODY[1:-1]}-{secrets.token_hex(8)}"
                connection.execute(command, {"new": unique, **values})
            changed += 1
    return changed, words


def _cells(
    connection: Connection, table: str, row: list[str], column: str, name: Name
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The cells of a column that may have the pseudonym, and their rows."""
    sqlite = connection.dialect.name == "sqlite"
    quote = connection.dialect.identifier_preparer.quote
    as_text = f"CAST({quote(column)} AS TEXT)"
    ways = name.written
    found = "INSTR" if sqlite else "STRPOS"
    condition = " OR ".join(f"{found}({as_text}, :way{n}) > 0" for n in range(len(ways)))
    shown = quote(column) if sqlite else as_text
    rows = ", ".join(map(quote, row)) if row != ["ctid"] else "ctid"
    query = text(f"SELECT {rows}, {shown} FROM {quote(table)} WHERE {condition}")
    for *where, value in connection.execute(query, {f"way{n}": w for n, w in enumerate(ways)}):
        content = value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass")
        if name.stands_in_bytes(content):
            yield tuple(where), value


def _new_value(value: Any, column: str, name: Name) -> Any:
    if isinstance(value, bytes):
        return name.overwritten(value) if name.telling else value
    said = str(value)
    if said[:1] in "{[":
        try:
            before = json.loads(said)
        except ValueError:
            before = None
        if before is not None:
            new = without(before, name, column)
            if new != before:
                said = json.dumps(None if new is GONE else new)
            if not name.telling or not name.stands_in(said):
                return said if new != before else value
            return name.overwritten(said.encode(errors="surrogateescape")).decode()
    if said == name.text:
        attributed = name.telling or column.lower() in WHO
        return NOBODY if attributed and column.lower() not in TEXTS else value
    return name.replaced(said, NOBODY) if name.telling else value


def _without_rowid(connection: Connection, table: str) -> bool:
    sql = connection.execute(
        text("SELECT sql FROM sqlite_master WHERE type = 'table' AND name = :name"), {"name": table}
    ).scalar()
    return sql is None or "WITHOUT ROWID" in sql.upper()


def _write_anew(engine: Engine, tables: list[str]) -> None:
    """Have no page of the database keep what was deleted from it, today or before."""
    if engine.dialect.name != "sqlite":
        free = engine.execution_options(isolation_level="AUTOCOMMIT")
        with free.connect() as connection:
            for table in tables:
                connection.execute(text(f'VACUUM FULL "{table}"'))
        return
    raw = engine.raw_connection()
    try:
        raw.execute("VACUUM")
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        raw.close()


def _first_line(error: DBAPIError) -> str:
    said = str(error.orig).strip()
    return said.splitlines()[0] if said else type(error).__name__

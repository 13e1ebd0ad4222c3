"""The database itself: its versions, what it refuses, and what goes wrong with it."""

import stat
import subprocess
import sys

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from rlhf_core.errors import ConfigError, DataError
from tasks.feedback.store import database as module
from tasks.feedback.store.database import HEAD, MIGRATIONS, StoreError, open_database
from tasks.feedback.store.records import Answer, Ballot, NewPair
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import Base

PAIR = NewPair("p", Answer("a"), Answer("b"))


def test_the_migrations_make_what_the_code_expects(store):
    assert ScriptDirectory(str(MIGRATIONS)).get_heads() == [HEAD]
    with store.database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_an_older_database_is_brought_up_to_date(empty_url, monkeypatch):
    """A database as it was before the first version: one with a table of versions, and no more."""
    database = open_database(empty_url, migrate=False)
    with database.engine.begin() as connection:
        connection.execute(
            text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)")
        )
    database.close()
    store = Store(open_database(empty_url))
    assert store.project("demo", make=True).judgments.add([(PAIR, [Ballot("a")])]) == 1
    store.close()


@pytest.mark.parametrize("table", ["judgments", "snapshots", "snapshot_members", "audit_log"])
@pytest.mark.parametrize("change", ["UPDATE {} SET {}={}", "DELETE FROM {}"])
def test_what_is_kept_for_good_is_neither_changed_nor_deleted(store, project, table, change):
    project.judgments.add([(PAIR, [Ballot("a")])])
    project.snapshots.take()
    column = "snapshot_id" if table == "snapshot_members" else "id"
    command = change.format(table, column, column)
    with (
        pytest.raises(DBAPIError, match="neither changed nor deleted"),
        store.database.engine.begin() as connection,
    ):
        connection.execute(text(command))


def test_a_database_of_a_later_version_is_left_alone(database_url):
    database = open_database(database_url)
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(StoreError, match=r"written by a later version .*9999.* install that"):
        open_database(database_url)


@pytest.mark.parametrize(
    "tables",
    [
        ["CREATE TABLE alembic_version (version_num VARCHAR(32))",
         "INSERT INTO alembic_version VALUES ('5b0e9adcef9c')"],
        ["CREATE TABLE projects (id INTEGER)"],
    ],
)  # fmt: skip
def test_the_database_of_another_program_is_left_alone(empty_url, tables):
    database = open_database(empty_url, migrate=False)
    with database.engine.begin() as connection:
        for command in tables:
            connection.execute(text(command))
    database.close()
    with pytest.raises(StoreError, match="a database of its own"):
        open_database(empty_url)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("nonsense", "is no address of a database"),
        ("mysql://root@127.0.0.1/x", "is no address of a database"),
        ("postgresql://user:s3cret-word@127.0.0.1:1/x", "does not answer"),
    ],
)
def test_an_address_that_leads_nowhere(url, complaint):
    with pytest.raises((ConfigError, StoreError), match=complaint) as caught:
        open_database(url)
    assert "s3cret-word" not in str(caught.value)


def test_files_that_are_no_database(tmp_path):
    (tmp_path / "text.db").write_text("no database at all " * 300)
    with pytest.raises(StoreError, match="is no SQLite database"):
        open_database(f"sqlite:///{tmp_path / 'text.db'}")
    with pytest.raises(StoreError, match="cannot be opened"):
        open_database(f"sqlite:///{tmp_path}")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be made"):
        open_database(f"sqlite:///{tmp_path / 'file' / 'x.db'}")


def test_a_damaged_file_is_named(tmp_path, sqlite_template):
    broken = bytearray(sqlite_template)
    broken[4096:] = b"\xff" * (len(broken) - 4096)
    (tmp_path / "broken.db").write_bytes(broken)
    with pytest.raises(StoreError, match="damaged; restore it from a back-up"):
        Store(open_database(f"sqlite:///{tmp_path / 'broken.db'}")).project("x", make=True)


def test_a_file_that_cannot_be_written(tmp_path, sqlite_template):
    """By a user who may only read it; root may do anything."""
    folder = tmp_path / "readonly"
    folder.mkdir()
    (folder / "f.db").write_bytes(sqlite_template)
    (folder / "f.db").chmod(0o444)
    store = Store(open_database(f"sqlite:///file:{folder / 'f.db'}?mode=ro&uri=true"))
    with pytest.raises(StoreError, match="cannot be written"):
        store.project("x", make=True)
    store.close()


FULL = """
import resource, sys
from tasks.feedback.store.database import StoreError, open_database
from tasks.feedback.store.records import *
from tasks.feedback.store.store import Store
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
project = Store(open_database(sys.argv[1])).project("demo", make=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
put = 0
try:
    for n in range(2000):
        pair = NewPair(f"p{n}", Answer("a" * 999), Answer("b"))
        put += project.judgments.add([(pair, [Ballot("a")])])
except StoreError as error:
    print(put, error)
"""


def test_a_disk_that_is_full_loses_nothing(tmp_path, sqlite_template):
    """A limit on the size of files stands for the disk: writing fails in the same place."""
    (tmp_path / "f.db").write_bytes(sqlite_template)
    url = f"sqlite:///{tmp_path / 'f.db'}"
    done = subprocess.run(
        [sys.executable, "-c", FULL, url], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    put, _, sentence = done.stdout.partition(" ")
    assert "The preference store" in sentence
    assert int(put) > 2
    store = Store(open_database(url))
    assert len(list(store.project("demo").judgments.stream())) == int(put)
    store.close()


def test_names_are_readable_by_their_owner_only(tmp_path):
    path = tmp_path / "home" / "feedback" / "feedback.db"
    open_database(f"sqlite:///{path}").close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_who_waits_too_long_is_told(tmp_path, sqlite_template, monkeypatch):
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.2)
    (tmp_path / "f.db").write_bytes(sqlite_template)
    url = f"sqlite:///{tmp_path / 'f.db'}"
    other = create_engine(url)
    with other.connect() as holding:
        holding.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="has held it for too long"):
            Store(open_database(url)).project("x", make=True)
    other.dispose()


def test_a_server_that_goes_away_is_named_and_found_again(postgres, postgres_template):
    url = postgres.create(postgres_template)
    store = Store(open_database(url))
    project = store.project("demo", make=True)

    def lose_it():
        with store.database.writing() as session:
            backend = session.scalar(text("SELECT pg_backend_pid()"))
            postgres.execute(f"SELECT pg_terminate_backend({backend})")
            session.execute(text("SELECT 1"))

    with pytest.raises(StoreError, match="does not answer"):
        lose_it()
    assert project.judgments.add([(PAIR, [Ballot("a")])]) == 1
    store.close()
    postgres.drop(url)


@pytest.mark.parametrize("name", ["", " x", "x" * 101, "a\nb", "a\0b"])
def test_projects_have_names_that_can_be_shown(store, name):
    with pytest.raises(DataError, match="cannot be called"):
        store.project(name, make=True)

"""A new database has the tables of the installed releases, and nobody's database is replaced."""

import sqlite3
from contextlib import closing

import pytest

from rlhf_core.errors import UserError
from tasks.record.tracking import connect
from tasks.servers import fresh_database
from tasks.servers.fresh_database import create, known_tables
from tasks.servers.make_tables import PACKAGES, tables_of
from tasks.settings import Settings


def tables(script):
    """Each object and its clauses, and the rows; migrations write clauses in any order."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(script)
        found = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
        rows = {
            name: connection.execute(f'SELECT * FROM "{name}"').fetchall()
            for kind, name, _, _ in found
            if kind == "table"
        }
    clauses = {
        (kind, name, of): sorted(line.strip(" \t,") for line in (sql or "").splitlines())
        for kind, name, of, sql in found
    }
    return clauses, rows


@pytest.mark.parametrize("package", PACKAGES)
def test_the_tables_are_those_that_migrations_make(package):
    clauses, rows = tables(known_tables(package).read_text(encoding="utf-8"))
    expected, expected_rows = tables(tables_of(package))
    assert len(clauses) > 100
    assert clauses == expected, f"{package} has changed: python -m tasks.servers.make_tables"
    assert rows == expected_rows
    assert rows["alembic_version"]


def content(path):
    with closing(sqlite3.connect(path)) as connection:
        return "\n".join(connection.iterdump()) + "\n"


@pytest.mark.parametrize("driver", ["sqlite", "sqlite+aiosqlite"])
def test_a_new_database_has_them_and_nothing_else_is_left(tmp_path, driver):
    path = tmp_path / "new.db"
    create("prefect", f"{driver}:///{path}")
    assert content(path) == known_tables("prefect").read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_a_database_that_is_there_stays(tmp_path):
    path = tmp_path / "new.db"
    path.write_bytes(b"")
    create("mlflow", f"sqlite:///{path}")
    assert path.read_bytes() == b""


def test_one_that_another_process_has_made_meanwhile_stays(tmp_path, monkeypatch):
    path = tmp_path / "new.db"
    link = fresh_database.os.link

    def late(new, to):
        path.write_bytes(b"theirs")
        link(new, to)

    monkeypatch.setattr(fresh_database.os, "link", late)
    create("mlflow", f"sqlite:///{path}")
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "url",
    ["postgresql:///x", "sqlite://", "sqlite:///:memory:", "sqlite:///x.db?mode=ro", "http://x"],
)
def test_other_databases_are_not_touched(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    create("prefect", url)
    assert not list(tmp_path.iterdir())


def test_another_release_and_a_folder_that_is_not_there_are_left_to_the_package(
    tmp_path, monkeypatch
):
    create("prefect", f"sqlite:///{tmp_path / 'absent' / 'new.db'}")
    monkeypatch.setattr(fresh_database, "version", lambda package: "0.0.1")
    create("prefect", f"sqlite:///{tmp_path / 'new.db'}")
    assert not list(tmp_path.iterdir())


def test_mlflow_works_on_it(tmp_path, monkeypatch):
    def refuse(engine):
        raise AssertionError("the tables were made by migrations")

    monkeypatch.setattr("mlflow.store.db.utils._initialize_tables", refuse)
    monkeypatch.setattr(
        "mlflow.store.tracking.sqlalchemy_store.mlflow.store.db.utils._initialize_tables", refuse
    )
    client = connect(Settings.model_validate({"RLHF_HOME": tmp_path}))
    experiment = client.create_experiment("x")
    run = client.create_run(experiment).info.run_id
    client.log_metric(run, "loss", 0.5)
    assert client.get_run(run).data.metrics == {"loss": 0.5}
    assert client.get_experiment_by_name("Default") is not None


def test_a_broken_database_is_still_told(tmp_path):
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match="cannot be used"):
        connect(Settings.model_validate({"RLHF_HOME": tmp_path}))

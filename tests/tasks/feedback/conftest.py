"""A preference store on SQLite and on Postgres: each test that takes `store` runs on both."""

import pytest

from tasks.feedback.store.database import open_database
from tasks.feedback.store.store import FeedbackProject, Store


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory) -> bytes:
    """A SQLite file with the tables, and nothing in them."""
    path = tmp_path_factory.mktemp("feedback") / "template.db"
    open_database(f"sqlite:///{path}").close()  # the last connection empties the log beside it
    return path.read_bytes()


@pytest.fixture(scope="session")
def postgres_template(postgres) -> str:
    """The name of a Postgres database with the tables, and nothing in them."""
    url = postgres.create()
    open_database(url).close()
    return url.rpartition("/")[2]


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request, tmp_path):
    """The address of a database of the test's own, without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty' / 'feedback.db'}"
        return
    server = request.getfixturevalue("postgres")
    url = server.create()
    yield url
    server.drop(url)


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request, tmp_path):
    """The address of a database of the test's own, with the tables."""
    if request.param == "sqlite":
        (tmp_path / "feedback.db").write_bytes(request.getfixturevalue("sqlite_template"))
        yield f"sqlite:///{tmp_path / 'feedback.db'}"
        return
    template = request.getfixturevalue("postgres_template")
    server = request.getfixturevalue("postgres")
    url = server.create(template)
    yield url
    server.drop(url)


@pytest.fixture
def store(database_url):
    """A fresh store, once on each kind of database."""
    opened = Store(open_database(database_url))
    yield opened
    opened.close()


@pytest.fixture
def project(store) -> FeedbackProject:
    """A fresh project of it."""
    return store.project("demo", make=True)

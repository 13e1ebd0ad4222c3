"""A project on SQLite alone, for what is about files and no database."""

import pytest

from tasks.feedback.store.database import open_database
from tasks.feedback.store.store import FeedbackProject, Store


@pytest.fixture
def plain_store(tmp_path, sqlite_template):
    """A fresh store."""
    (tmp_path / "plain.db").write_bytes(sqlite_template)
    opened = Store(open_database(f"sqlite:///{tmp_path / 'plain.db'}", migrate=False))
    yield opened
    opened.close()


@pytest.fixture
def plain(plain_store) -> FeedbackProject:
    """A fresh project of it."""
    return plain_store.project("demo", make=True)

"""Who is behind a pseudonym: let in once, and gone for good when forgotten."""

from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from rlhf_core.errors import DataError
from tasks.feedback.store import clock
from tasks.feedback.store.people import InvitationError
from tasks.feedback.store.tables import Base

NAME, ADDRESS = "Wilhelmina Quistgaard", "w.quistgaard@example.org"


def everything(store) -> str:
    with store.database.reading() as session:
        return "".join(
            str(session.execute(table.select()).all()) for table in Base.metadata.sorted_tables
        )


def test_a_forgotten_name_is_nowhere(store, project):
    link = project.people.invite(name=NAME, email=ADDRESS, by="admin")
    who = store.door.who(store.door.enter(link))
    project.people.invite(name=NAME, email=ADDRESS.upper())  # sent twice
    assert NAME in everything(store)
    project.people.forget(who.annotator, "admin")
    left = everything(store)
    assert NAME not in left
    assert ADDRESS not in left.lower()
    assert next(entry.action for entry in project.log()) == "forget"
    if store.database.is_sqlite:
        file = Path(store.database.engine.url.database)
        for path in file.parent.glob(f"{file.name}*"):  # the log beside it too
            assert NAME.encode() not in path.read_bytes(), path
            assert ADDRESS.encode() not in path.read_bytes().lower(), path
    else:
        with store.database.reading() as session:
            session.execute(text("CREATE EXTENSION IF NOT EXISTS pageinspect"))
            for table in ("identities", "invitations"):
                raw = text(
                    f"SELECT string_agg(encode(get_raw_page('{table}', n::int), 'escape'), '') "
                    f"FROM generate_series(0, pg_relation_size('{table}') / 8192 - 1) n"
                )
                assert NAME not in (session.scalar(raw) or "")


def test_a_link_is_for_one_time_and_for_a_while(store, project, monkeypatch):
    link = project.people.invite(days=1)
    store.door.enter(link)
    with pytest.raises(InvitationError):
        store.door.enter(link)
    late = project.people.invite(days=1)
    now = clock.now()
    monkeypatch.setattr(clock, "now", lambda: now + timedelta(days=2))
    with pytest.raises(InvitationError):
        store.door.enter(late)
    with pytest.raises(InvitationError):
        store.door.enter("guess")


@pytest.mark.parametrize(
    "more", [{"name": "x" * 201}, {"email": "x" * 321}, {"days": 0}, {"days": float("nan")},
             {"annotator": 10**9}, {"name": "\ud800"}]
)  # fmt: skip
def test_a_link_that_cannot_be(project, more):
    with pytest.raises(DataError):
        project.people.invite(**more)

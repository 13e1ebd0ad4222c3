"""A person's rows: gone or emptied, with everything that counts them put right."""

import uuid
from pathlib import Path

import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import DBAPIError

from rlhf_core.errors import DataError
from tasks.feedback.erasure import requests, votes
from tasks.feedback.erasure.names import Name
from tasks.feedback.store.database import open_database
from tasks.feedback.store.queue import StaleTaskError
from tasks.feedback.store.records import CHOICES, Answer, Ballot, NewPair, Vote
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import (
    Annotator,
    Assignment,
    Base,
    Judgment,
    Pair,
    Session,
)

NAME, ADDRESS = "Wilhelmina Quistgaard", "w.quistgaard@example.org"


def pair(n: int, **more) -> NewPair:
    return NewPair(f"prompt {n // 2}", Answer(f"one {n}"), Answer(f"two {n}"), **more)


def everything(store) -> str:
    with store.database.reading() as session:
        return "\n".join(
            str(session.execute(table.select()).all()) for table in Base.metadata.sorted_tables
        )


def erased(store, pseudonym: str, project: str = "") -> requests.Request:
    """The steps in the store, one after the other."""
    request = requests.begin(store, pseudonym, project, "admin")
    votes.sign_out(request)
    name = Name(pseudonym, telling=True)
    while (done := votes.erase_rows(request, name)) is None:
        for snapshot in votes.snapshots_of(request):
            request.project.snapshots.rebuild(snapshot, request.annotator, request.id)
    store.erased_rows = done
    return requests.finish(store, request)


def person(store, project, name=NAME, email=ADDRESS):
    """A person who came in by a link, and agreed."""
    session = store.door.enter(project.people.invite(name=name, email=email, by="admin"))
    who = store.door.who(session)
    project.people.agree(who.annotator, version="1", text="yes", licence="CC")
    return session, who


def vote(project, who, choice="left", **more) -> str:
    [task] = project.queue.lease(who.annotator)
    project.queue.vote(
        who.annotator, task.token, Vote(choice=choice, key=uuid.uuid4().hex, seconds=2.0, **more)
    )
    return task.token


def check_counters(store, project) -> None:
    """Votes and leases of every pair, counted from the rows."""
    with store.database.reading() as session:
        here = {"project_id": project.id}
        rows = session.scalars(select(Judgment).filter_by(**here)).all()
        desk = session.scalars(select(Assignment).filter_by(**here)).all()
        replaced = {row.replaces_id for row in rows}
        for one in session.scalars(select(Pair).filter_by(**here)):
            cast = sum(
                row.pair_id == one.id
                and row.vote in CHOICES
                and row.kind in ("fresh", "import")
                and row.id not in replaced
                for row in rows
            )
            leased = sum(
                row.pair_id == one.id and row.state == "open" and row.kind == "fresh"
                for row in desk
            )
            assert (one.votes, one.taken) == (cast, cast + leased)
            assert one.state == ("open" if cast < one.wanted else "done")


def test_a_person_is_nowhere_in_the_store(store, project):
    project.content.add([pair(n, wanted=1) for n in range(4)])
    session, who = person(store, project)
    vote(project, who, note="I, Quistgaard, like it")
    vote(project, who, "skip", reason="too long for Quistgaard")
    project.queue.undo(who.annotator)
    vote(project, who, "tie")
    project.queue.lease(who.annotator, 2)  # two on the desk
    project.people.invite(name=NAME, email=ADDRESS.upper())  # a link that waits
    project.people.invite(by=who.pseudonym)
    project.snapshots.take(who.pseudonym)
    assert who.pseudonym in everything(store)
    request = erased(store, who.pseudonym)
    left = everything(store)
    assert who.pseudonym not in left
    assert "uistgaard" not in left.lower()
    assert store.door.who(session) is None
    check_counters(store, project)
    with store.database.reading() as reading:
        rows = reading.scalars(select(Judgment)).all()
        assert reading.scalars(select(Session)).all() == []
    assert len(rows) == 4  # a vote, a skip, its withdrawal, a tie: that they were there stays
    assert {row.erasure for row in rows} == {request.id}
    assert {(row.annotator_id, row.vote, row.note, row.time) for row in rows} == {
        (None, "withdrawn", "", "")
    }
    assert request.pseudonym is None
    assert request.code is None
    assert store.erased_rows.judgments == 4
    assert store.erased_rows.reopened == 2
    if store.database.is_sqlite:
        votes_file = store.database.engine.url.database
        store.database.erase(*votes.TABLES)
        for end in ("", "-wal"):
            content = Path(votes_file + end).read_bytes()
            assert who.pseudonym.encode() not in content
            assert b"uistgaard" not in content


def test_pairs_want_votes_again_and_others_get_them(store, project):
    project.content.add([pair(0, wanted=1), pair(1, wanted=2)])
    _, first = person(store, project)
    vote(project, first)
    vote(project, first)
    _, other = person(store, project, "Bo", "bo@example.org")
    vote(project, other)  # the one that wants two
    assert project.queue.lease(other.annotator) == []  # and nothing is left
    erased(store, first.pseudonym)
    vote(project, other)
    check_counters(store, project)
    [one, two] = project.judgments.stream()
    assert {one.annotator, two.annotator} == {other.pseudonym}


def test_a_late_vote_is_refused_and_not_kept(store, project):
    project.content.add([pair(0, wanted=1)])
    _, who = person(store, project)
    [task] = project.queue.lease(who.annotator)
    request = requests.begin(store, who.pseudonym, "", "admin")
    votes.sign_out(request)
    late = Vote(choice="left", key="late")
    with pytest.raises(StaleTaskError):  # half way, and at the end
        project.queue.vote(who.annotator, task.token, late)
    assert votes.erase_rows(request, Name(who.pseudonym, telling=True)) is not None
    with pytest.raises(StaleTaskError):
        project.queue.vote(who.annotator, task.token, late)
    assert list(project.judgments.stream()) == []
    check_counters(store, project)


def fill(project, people, pairs=6):
    """Votes of some people in an order of their own, as files bring them."""
    project.judgments.add(
        [
            (
                pair(n, kept={"topic": str(n)}),
                [
                    Ballot("ab"[(n + len(who)) % 2], annotator=who, time=f"t{n}", first="a")
                    for who in people
                    if not (who == "p010" and n == 3)
                ],
            )
            for n in range(pairs)
        ]
    )


def test_rebuilt_snapshots_are_those_of_a_store_that_never_saw_the_person(store, project):
    fill(project, ["p01", "p010", "ada"], 3)
    early = project.snapshots.take()
    fill(project, ["p01", "p010", "ada"])
    late = project.snapshots.take()
    other = store.project("other", make=True)
    fill(other, ["ada", "p010"], 3)
    expected_early = other.snapshots.take()
    fill(other, ["ada", "p010"])
    expected_late = other.snapshots.take()
    erased(store, "p01", "demo")
    assert [one.digest for one in project.snapshots.all()] == [
        expected_late.digest,
        expected_early.digest,
    ]
    assert project.snapshots.find("latest").digest == expected_late.digest
    assert project.snapshots.successor(early.digest) == expected_early.digest
    with pytest.raises(DataError, match=rf"was erased.*{expected_late.digest}"):
        project.snapshots.find(late.digest)
    with pytest.raises(DataError, match="was erased"):
        list(project.snapshots.votes(early.digest[:12]))
    assert project.snapshots.take().digest == expected_late.digest
    names = {one.annotator for one in project.snapshots.votes("latest")}
    assert names == {"ada", "p010"}
    # A snapshot of a project in which nobody was erased is what it was.
    assert other.snapshots.find("latest").digest == expected_late.digest


def test_the_file_of_a_rebuilt_snapshot_is_that_of_the_other_store(store, project, tmp_path):
    fill(project, ["p01", "ada"])
    project.snapshots.take()
    other = store.project("other", make=True)
    fill(other, ["ada"])
    other.snapshots.take()
    erased(store, "p01", "demo")
    project.snapshots.write("latest", tmp_path / "one.jsonl")
    other.snapshots.write("latest", tmp_path / "other.jsonl")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "other.jsonl").read_bytes()


def test_the_last_voter_of_a_snapshot(store, project):
    fill(project, ["p01"])
    old = project.snapshots.take()
    erased(store, "p01")
    assert project.snapshots.all() == []
    assert project.snapshots.successor(old.digest) == ""
    with pytest.raises(DataError, match="no other vote was in it"):
        project.snapshots.find(old.digest)
    with pytest.raises(DataError, match="does not exist"):
        project.snapshots.find("latest")


def test_latest_stays_the_one_that_was_taken_last(store, project):
    fill(project, ["p01", "ada"], 2)
    project.snapshots.take()
    fill(project, ["bo"], 4)
    request = requests.begin(store, "p01", "", "admin")
    # One that has nothing of the person: p01 took all back.
    last = project.snapshots.take()
    with store.database.reading() as session:
        person_votes = session.scalars(
            select(Judgment.id).where(Judgment.annotator_id == request.annotator)
        ).all()
    assert len(person_votes) == 2
    erased(store, "p01")
    assert project.snapshots.find().digest == project.snapshots.successor(last.digest)
    # A second person: what was rebuilt is rebuilt again.
    erased(store, "ada")
    assert project.snapshots.find().digest == project.snapshots.successor(last.digest)
    assert {vote.annotator for vote in project.snapshots.votes("latest")} == {"bo"}


def test_a_snapshot_that_is_taken_meanwhile_is_rebuilt_too(store, project):
    fill(project, ["p01", "ada"])
    request = requests.begin(store, "p01", "", "admin")
    votes.sign_out(request)
    project.snapshots.take()
    name = Name("p01", telling=True)
    assert votes.erase_rows(request, name) is None
    [snapshot] = votes.snapshots_of(request)
    project.snapshots.rebuild(snapshot, request.annotator, request.id)
    project.snapshots.rebuild(snapshot, request.annotator, request.id)  # killed, and again
    done = votes.erase_rows(request, name)
    assert done.judgments == 6
    assert not any(votes.erase_rows(request, name))  # a second time there is nothing to do


def test_two_projects_with_the_same_pseudonym(store, project):
    other = store.project("other", make=True)
    fill(project, ["p01", "ada"])
    fill(other, ["p01", "ada"])
    with pytest.raises(DataError, match=r"each of the projects demo, other.*--project"):
        requests.begin(store, "p01", "", "admin")
    erased(store, "p01", "demo")
    assert {vote.annotator for vote in project.judgments.stream()} == {"ada"}
    assert {vote.annotator for vote in other.judgments.stream()} == {"ada", "p01"}


def test_erasing_twice_and_nobody(store, project):
    fill(project, ["p01", "ada"])
    with pytest.raises(DataError, match=r"nobody in any feedback project is called 'ghost'$"):
        requests.begin(store, "ghost", "", "admin")
    first = requests.begin(store, "p01", "", "admin")
    assert requests.begin(store, "p01", "", "admin").id == first.id  # goes on
    erased(store, "p01")
    with pytest.raises(DataError, match="erasures finished so far: 1; their certificates are in"):
        requests.begin(store, "p01", "", "admin")


def test_a_judge_is_nobody_to_be_erased(store, project):
    with pytest.raises(DataError, match="'judge:rule' is a judge and no person"):
        requests.begin(store, "judge:rule", "", "admin")


def test_a_person_without_votes(store, project):
    _, who = person(store, project)
    erased(store, who.pseudonym)
    assert who.pseudonym not in everything(store)
    with store.database.reading() as session:
        assert session.scalars(select(Annotator)).all() == []


def test_a_hash_that_only_the_code_opens(store, project):
    fill(project, ["p01"])
    begun = requests.begin(store, "p01", "", "admin")
    assert begun.mark == requests.mark_of("p01", begun.code)
    assert begun.mark != requests.mark_of("p01", "")
    done = erased(store, "p01")
    assert done.mark == begun.mark


# ---- what the triggers let through ----

TOMBSTONE = (
    "UPDATE judgments SET annotator_id = NULL, assignment_id = NULL, vote = 'withdrawn', "
    "first = '', margin = 0, seconds = NULL, note = '', reason = '', source = '', time = '', "
    "kept = NULL, key = 'erased-x', erasure = {erasure}{more} WHERE annotator_id = {person}"
)
BAD = [
    ", pair_id = pair_id + 1",
    ", kind = 'gold'",
    ", note = 'kept'",
    ", replaces_id = id",
    ", vote = 'a'",
    ", source = 'file'",
    ", id = id + 1000",
]


def attempt(store, command: str) -> None:
    with store.database.engine.begin() as connection:
        connection.execute(text(command))


@pytest.mark.parametrize("more", BAD)
def test_a_tombstone_has_one_form(store, project, more):
    fill(project, ["p01"], 1)
    request = requests.begin(store, "p01", "", "admin")
    here = {"erasure": request.id, "person": request.annotator}
    base = TOMBSTONE
    for column in ("note = '', ", "vote = 'withdrawn', ", "source = '', "):
        if more.split(" = ")[0].strip(", ") == column.split(" = ")[0]:
            base = base.replace(column, "")
    with pytest.raises(DBAPIError, match="neither changed nor deleted"):
        attempt(store, base.format(more=more, **here))
    attempt(store, TOMBSTONE.format(more="", **here))


def test_only_the_person_of_an_open_erasure(store, project):
    fill(project, ["p01", "ada"], 1)
    request = requests.begin(store, "p01", "", "admin")
    with store.database.reading() as session:
        ada = session.scalar(select(Annotator.id).filter_by(pseudonym="ada"))
    refused = pytest.raises(DBAPIError, match="neither changed nor deleted")
    with refused:
        attempt(store, TOMBSTONE.format(erasure=request.id, person=ada, more=""))
    with refused:
        attempt(store, TOMBSTONE.format(erasure=request.id + 1, person=request.annotator, more=""))
    for command in (
        "UPDATE audit_log SET actor = '(erased)'",
        "UPDATE audit_log SET subject = '(erased)'",
        "UPDATE audit_log SET details = '{}', action = 'x'",
        "UPDATE snapshots SET votes = 0",
        "DELETE FROM judgments WHERE erasure IS NULL",
        "DELETE FROM audit_log",
    ):
        if "snapshots" in command:
            project.snapshots.take("p01")
        with refused:
            attempt(store, command)
    attempt(store, "UPDATE snapshots SET \"by\" = '(erased)'")
    requests.finish(store, request)
    with refused:
        attempt(store, TOMBSTONE.format(erasure=request.id, person=request.annotator, more=""))


def test_a_database_of_the_first_version_is_brought_up_to_date(empty_url, monkeypatch):
    """With votes in it; what was refused then is refused now."""
    from tasks.feedback.store import database as module

    with monkeypatch.context() as patch:
        patch.setattr(module.command, "upgrade", _to_first(module.command.upgrade))
        old = open_database(empty_url)
    engine = create_engine(old.engine.url)
    with engine.begin() as connection:
        for command in OLD_ROWS:
            connection.execute(text(command))
    engine.dispose()
    old.close()
    store = Store(open_database(empty_url))
    project = store.project("demo")
    assert [(one.annotator, one.vote) for one in project.judgments.stream()] == [("p01", "a")]
    with pytest.raises(DBAPIError, match="neither changed nor deleted"):
        attempt(store, "UPDATE judgments SET vote = 'b'")
    taken = project.snapshots.take()
    erased(store, "p01")
    assert list(project.judgments.stream()) == []
    assert project.snapshots.successor(taken.digest) == ""
    store.close()


def _to_first(upgrade):
    return lambda config, _: upgrade(config, "0001")


AT = "'2026-01-01 00:00:00'"
OLD_ROWS = (
    f"INSERT INTO projects VALUES (1, 'demo', '{{}}', {AT})",
    "INSERT INTO prompts (id, project_id, digest, content, source, licence) "
    "VALUES (1, 1, 'd', '\"p\"', '', '')",
    "INSERT INTO responses (id, prompt_id, digest, text, model, sampling, source, licence) "
    "VALUES (1, 1, 'x', 'one', '', '{}', '', ''), (2, 1, 'y', 'two', '', '{}', '', '')",
    "INSERT INTO pairs (id, project_id, prompt_id, response_a_id, response_b_id, digest, state, "
    "priority, wanted, taken, votes, arm, kept, exchanged, created_at) "
    f"VALUES (1, 1, 1, 1, 2, 'z', 'done', 0, 0, 1, 1, '', '{{}}', false, {AT})",
    "INSERT INTO annotators (id, project_id, pseudonym, role, state, via, created_at) "
    f"VALUES (1, 1, 'p01', 'annotator', 'left', 'import', {AT})",
    "INSERT INTO judgments (id, project_id, pair_id, annotator_id, key, kind, vote, first, margin, "
    "note, reason, source, time, kept, at) "
    f"VALUES (1, 1, 1, 1, 'k', 'import', 'a', '', 0, '', '', '', '', '{{}}', {AT})",
)

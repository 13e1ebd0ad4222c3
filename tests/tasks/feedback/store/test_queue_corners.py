"""Leases, votes and undo where things cross, case by case."""

import random
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from rlhf_core.errors import DataError
from tasks.feedback.store import clock
from tasks.feedback.store.drawing import REPEAT_AFTER
from tasks.feedback.store.queue import StaleTaskError
from tasks.feedback.store.records import Answer, Ballot, NewPair, Vote
from tasks.feedback.store.tables import Annotator, Assignment, Judgment, Pair


@pytest.fixture
def time(monkeypatch):
    """A clock that a test moves."""
    moment = [datetime(2026, 1, 1, tzinfo=UTC)]
    monkeypatch.setattr(clock, "now", lambda: moment[0])

    def later(minutes=0.1):
        moment[0] += timedelta(minutes=minutes)

    return later


@pytest.fixture
def queue(project, time):
    project.change("test", {"gold_every": 0, "repeat_every": 0, "lease_minutes": 10})
    return project.queue


@pytest.fixture
def people(store, project):
    links = [project.people.invite() for _ in range(3)]
    return [store.door.who(store.door.enter(link)).annotator for link in links]


def ask(project, number=1, **more):
    pairs = [
        NewPair(f"p{n}", Answer(f"a{n}"), Answer(f"b{n}"), **{"wanted": 1, **more})
        for n in range(number)
    ]
    return [one.id for one in project.content.add(pairs)]


def vote(queue, who, task, key, choice="left"):
    queue.vote(who, task.token, Vote(choice, key))


def counted(project):
    return [(vote.annotator, vote.vote) for vote in project.judgments.stream()]


def test_a_vote_after_the_lease_counts_though_somebody_else_has_the_pair(
    project, queue, people, time
):
    ask(project)
    [late] = queue.lease(people[0])
    time(11)
    [taken] = queue.lease(people[1])
    assert {late.left, late.right} == {taken.left, taken.right}
    vote(queue, people[0], late, "one")
    vote(queue, people[1], taken, "two")
    assert len(counted(project)) == 2
    assert queue.lease(people[2]) == []
    with project.database.reading() as session:
        [pair] = session.scalars(select(Pair))
        assert (pair.taken, pair.votes, pair.state) == (2, 2, "done")


def test_a_task_comes_back_as_it_was_if_nobody_took_it(project, queue, people, time):
    ask(project)
    [before] = queue.lease(people[0])
    time(11)
    assert len(queue.lease(people[1])) == 1  # the lease was over
    assert queue.lease(people[0]) == []
    queue.release(people[1])
    [after] = queue.lease(people[0])
    assert (after.token, after.left, after.right) == (before.token, before.left, before.right)


def test_a_skip_stays_when_somebody_else_has_the_pair(project, queue, people):
    ask(project)
    [task] = queue.lease(people[0])
    vote(queue, people[0], task, "skip", "skip")
    [other] = queue.lease(people[1])
    with pytest.raises(StaleTaskError, match="Somebody else has this pair by now"):
        queue.undo(people[0])
    vote(queue, people[1], other, "skip-2", "skip")
    assert queue.undo(people[0]).token == task.token
    assert queue.lease(people[2]) == []  # it is on a desk again


def test_undo_goes_back_as_far_as_there_are_votes_and_each_counts_anew(project, queue, people):
    ask(project, 3)
    tasks = queue.lease(people[0], 3)
    for n, task in enumerate(tasks):
        vote(queue, people[0], task, f"k{n}")
    assert [queue.undo(people[0]).token for _ in range(3)] == [t.token for t in reversed(tasks)]
    assert queue.undo(people[0]) is None
    assert counted(project) == []
    assert queue.progress(people[0]).done == 0
    for n, task in enumerate(queue.lease(people[0], 3)):  # the one undone last is on top
        assert task.token == tasks[n].token
        vote(queue, people[0], task, f"again{n}", "tie")
    assert [said for _, said in counted(project)] == ["tie"] * 3
    with project.database.reading() as session:
        assert len(session.scalars(select(Judgment)).all()) == 9  # nothing is lost


@pytest.mark.parametrize("kind", ["gold", "repeat"])
def test_control_questions_and_repeats_are_undone_too(
    project, queue, people, monkeypatch, time, kind
):
    ask(project, REPEAT_AFTER + 4)
    if kind == "gold":
        project.content.add([NewPair("g", Answer("yes"), Answer("no"), gold="a")])
    monkeypatch.setattr(random, "random", lambda: 0.0)
    for n in range(REPEAT_AFTER + 2):
        [task] = queue.lease(people[0])
        vote(queue, people[0], task, f"k{n}")
        time()
    project.change("test", {f"{kind}_every": 2})
    votes = len(counted(project))
    [task] = queue.lease(people[0])
    vote(queue, people[0], task, "special")
    assert [vote.kind for vote in project.judgments.stream()][-1] == kind
    assert queue.undo(people[0]).token == task.token
    assert len(counted(project)) == votes
    vote(queue, people[0], task, "special again", "tie")
    assert [(vote.kind, vote.vote) for vote in project.judgments.stream()][-1] == (kind, "tie")


def test_a_repeat_comes_at_a_distance_with_its_sides_exchanged(project, queue, people, time):
    ask(project, 60)
    project.change("test", {"repeat_every": 2})
    seen, sides, repeats = [], {}, 0
    while tasks := queue.lease(people[0]):
        [task] = tasks
        pair = task.prompt
        if pair in sides:
            repeats += 1
            assert (task.left, task.right) == sides[pair][::-1]
            assert len(seen) - seen.index(pair) > REPEAT_AFTER
            assert seen.count(pair) == 1
        sides[pair] = (task.left, task.right)
        seen.append(pair)
        vote(queue, people[0], task, f"k{len(seen)}")
    assert repeats > 10
    assert len(set(seen)) == 60


def test_known_answers_run_out_and_the_queue_has_an_end(project, queue, people):
    ask(project, 20)
    project.content.add(NewPair(f"g{n}", Answer("yes"), Answer("no"), gold="b") for n in range(3))
    project.change("test", {"gold_every": 1})
    shown = []
    while tasks := queue.lease(people[0]):
        shown.append(tasks[0].prompt)
        vote(queue, people[0], tasks[0], f"k{len(shown)}")
    assert sorted(shown) == sorted([f"p{n}" for n in range(20)] + ["g0", "g1", "g2"])
    assert shown[0].startswith("g")
    assert shown[-1].startswith("p")


def test_a_key_is_for_one_vote(project, queue, people):
    ask(project, 2)
    one, two = queue.lease(people[0], 2)
    vote(queue, people[0], one, "key")
    vote(queue, people[0], one, "key")
    assert len(counted(project)) == 1
    with pytest.raises(StaleTaskError, match="used for another vote"):
        vote(queue, people[0], two, "key")
    with pytest.raises(StaleTaskError, match="used for another vote"):
        vote(queue, people[0], one, "key", "right")
    with pytest.raises(StaleTaskError, match="not on your desk"):
        vote(queue, people[1], two, "key")
    with pytest.raises(StaleTaskError, match="has a vote already"):
        vote(queue, people[0], one, "other")
    assert len(counted(project)) == 1


def test_nobody_works_on_what_is_paused_and_the_pairs_are_free_for_others(project, queue, people):
    ask(project, 1)
    [task] = queue.lease(people[0])
    with project.database.writing() as session:
        session.get_one(Annotator, people[0]).state = "paused"
    assert queue.lease(people[0]) == []
    [other] = queue.lease(people[1])  # at once, not when the lease is over
    assert other.prompt == task.prompt
    vote(queue, people[0], task, "late")  # what somebody has decided is kept
    assert queue.undo(people[0]) is None
    project.change("test", {"paused": True})
    assert queue.lease(people[1]) == []
    with project.database.writing() as session:
        session.get_one(Annotator, people[1]).state = "left"
    with pytest.raises(StaleTaskError):
        vote(queue, people[1], other, "gone")


def test_annotators_of_another_project_get_nothing(store, project, queue, people):
    ask(project, 1)
    other = store.project("other", make=True)
    stranger = store.door.who(store.door.enter(other.people.invite())).annotator
    for call in (queue.lease, queue.undo, queue.progress):
        with pytest.raises(StaleTaskError, match="no such annotator"):
            call(stranger)


def test_sooner_means_sooner_also_for_who_is_far_ahead(project, queue, people):
    ask(project, 10, wanted=2)
    for n in range(6):
        [task] = queue.lease(people[0])
        vote(queue, people[0], task, f"k{n}")
    project.content.add([NewPair("now", Answer("x"), Answer("y"), wanted=1, priority=-1)])
    assert queue.lease(people[0])[0].prompt == "now"


def test_a_pair_of_two_batches_is_asked_about_until_both_are_withdrawn(project, queue, people):
    pair = NewPair("p", Answer("a"), Answer("b"), wanted=1)
    one, two = project.content.batch("one", "ask"), project.content.batch("two", "ask")
    for batch in (one, two):
        project.content.add([pair], batch=batch)
    project.content.withdraw(one)
    assert len(queue.lease(people[0])) == 1
    queue.release(people[0])
    project.content.withdraw(two)
    assert queue.lease(people[1]) == []
    project.content.add([NewPair("p", Answer("a"), Answer("b"))])  # seen again, not asked about
    assert queue.lease(people[1]) == []
    project.content.add([pair], batch=two)
    assert len(queue.lease(people[1])) == 1


def test_votes_from_elsewhere_are_those_that_were_asked_for(project, queue, people):
    pair = NewPair("p", Answer("a"), Answer("b"), wanted=2)
    project.content.add([pair])
    project.judgments.add([(pair, [Ballot("a", "ann"), Ballot("b", "bob")])])
    assert queue.lease(people[0]) == []
    with project.database.reading() as session:
        assert session.scalars(select(Pair.state)).all() == ["done"]


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (Vote("nothing", "k"), "is no vote"),
        (Vote("left", ""), "key of a vote"),
        (Vote("left", "k" * 65), "key of a vote"),
        (Vote("left", "k", seconds=float("nan")), "nan seconds"),
        (Vote("left", "k", seconds=-1.0), "-1.0 seconds"),
        (Vote("left", "k", note="\ud800"), "the note of a vote is broken text"),
    ],
)
def test_a_vote_that_cannot_be_is_refused(project, queue, people, said, complaint):
    ask(project)
    [task] = queue.lease(people[0])
    with pytest.raises(DataError, match=complaint):
        queue.vote(people[0], task.token, said)
    assert counted(project) == []


def test_what_somebody_writes_is_kept_to_the_letter(project, queue, people):
    ask(project)
    [task] = queue.lease(people[0])
    note = "NUL \0, ESC \x1b, 汉字, \N{FAMILY}"
    queue.vote(people[0], task.token, Vote("left", "k", note=note, reason="\x1b\0"))
    [kept] = project.judgments.stream()
    assert (kept.note, kept.reason) == (note, "\x1b\0")


def test_what_is_left_counts_down_to_nothing(project, queue, people):
    ask(project, 3)
    left = []
    for n in range(3):
        tasks = queue.lease(people[0], 2)
        left.append(queue.progress(people[0]).left)
        vote(queue, people[0], tasks[0], f"k{n}")
    assert [*left, queue.progress(people[0]).left] == [3, 2, 1, 0]
    with project.database.reading() as session:
        assert {row.state for row in session.scalars(select(Assignment))} == {"voted"}

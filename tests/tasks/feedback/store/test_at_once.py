"""Threads and processes that do the same at the same time: nothing is lost, nothing doubled."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import func, select

from tasks.feedback.store.database import open_database
from tasks.feedback.store.people import InvitationError
from tasks.feedback.store.queue import StaleTaskError
from tasks.feedback.store.records import Answer, Ballot, NewPair, Vote
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import Annotator, Assignment, Invitation, Judgment, Pair

THREADS = 8


def pair(n, **more):
    return NewPair(f"p{n}", Answer(f"a{n}"), Answer(f"b{n}"), **more)


def at_once(*calls):
    """What each call gives, or raises."""

    def kept(call):
        try:
            return call()
        except (StaleTaskError, InvitationError) as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(kept, calls))


def annotators(store, project, number):
    links = [project.people.invite() for _ in range(number)]
    return [store.door.who(store.door.enter(link)).annotator for link in links]


def test_annotators_who_label_at_once_share_the_pairs(store, project):
    project.change("test", {"gold_every": 0, "repeat_every": 0})
    project.content.add(pair(n, wanted=1) for n in range(80))

    def label(who):
        voted = 0
        while tasks := project.queue.lease(who, 2):
            key = f"{who}-{voted}"
            for _ in range(2):  # the answer to the first post was lost
                project.queue.vote(who, tasks[0].token, Vote("left", key))
            voted += 1
        return voted

    people = annotators(store, project, THREADS)
    done = at_once(*(lambda who=who: label(who) for who in people))
    assert sum(done) == 80
    votes = list(project.judgments.stream())
    assert len({vote.pair for vote in votes}) == len(votes) == 80
    with store.database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Assignment)) == 80
        assert set(session.execute(select(Pair.taken, Pair.votes, Pair.state)).tuples()) == {
            (1, 1, "done")
        }


def test_the_same_post_twice_at_once_is_one_vote(store, project):
    project.content.add([pair(1, wanted=1)])
    [who] = annotators(store, project, 1)
    [task] = project.queue.lease(who)
    same = Vote("left", "key")
    made = at_once(*[lambda: project.queue.vote(who, task.token, same)] * THREADS)
    assert made == [None] * THREADS
    other = [lambda n=n: project.queue.undo(who, "undo") for n in range(THREADS)]
    assert {task.token for task in at_once(*other)} == {task.token}
    rivals = [
        lambda n=n: project.queue.vote(who, task.token, Vote("left", f"k{n}"))
        for n in range(THREADS)
    ]
    assert sum(one is None for one in at_once(*rivals)) == 1
    assert len(list(project.judgments.stream())) == 1


def test_the_same_import_at_once_is_one_import(store):
    votes = [(pair(n // 2), [Ballot("a", f"ann {n % 5}", time=str(n))]) for n in range(120)]
    made = at_once(
        *[lambda: store.project("new", make=True).judgments.add(votes, chunk=7)] * THREADS
    )
    assert sum(made) == 120
    assert store.names() == ["new"]
    with store.database.reading() as session:
        counts = [
            session.scalar(select(func.count()).select_from(table))
            for table in (Judgment, Pair, Annotator)
        ]
    assert counts == [120, 60, 5]


def test_a_link_lets_in_one(store, project):
    link = project.people.invite(name="Ann")
    made = at_once(*[lambda: store.door.enter(link)] * THREADS)
    assert sum(isinstance(one, str) for one in made) == 1
    with store.database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Annotator)) == 1
        assert session.scalar(select(Invitation.name)) == ""


def test_a_snapshot_has_the_votes_of_one_moment(store, project):
    """Votes come two by two, each two in one transaction: a snapshot has both or neither."""

    def bring():
        for n in range(0, 60, 2):
            project.judgments.add(
                [(pair(n), [Ballot("a", "ann")]), (pair(n + 1), [Ballot("b", "ann")])]
            )
        return 0

    def take():
        return [project.snapshots.look().votes for _ in range(10)]

    project.judgments.add([(pair(998), [Ballot("a")]), (pair(999), [Ballot("a")])])
    _, seen = at_once(bring, take)
    assert all(votes % 2 == 0 for votes in seen)
    taken = at_once(*[lambda: project.snapshots.take()] * 4)
    assert sum(one.new for one in taken) == 1
    assert {one.votes for one in taken} == {62}


PROCESS = """
import sys
from tasks.feedback.store.database import open_database
from tasks.feedback.store.records import *
from tasks.feedback.store.store import Store

url, first = sys.argv[1], int(sys.argv[2])
sys.stdin.readline()
project = Store(open_database(url)).project("shared", make=True)
votes = ((NewPair(f"p{n}", Answer("a"), Answer("b")), [Ballot("a", "ann")])
         for n in range(first, first + 30))
print(project.judgments.add(votes, chunk=3))
"""


def test_processes_that_meet_a_new_database_at_once(empty_url):
    """All make its tables, the same project, and pairs that overlap."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, empty_url, str(10 * n)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    said = [process.communicate("go\n", timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum(int(out) for out, _ in said) == 40
    store = Store(open_database(empty_url))
    assert len(list(store.project("shared").judgments.stream())) == 40
    store.close()

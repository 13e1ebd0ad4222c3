"""Whatever annotators, admins and imports do, in any order: counters, states and marks are right.

The oracle is a model in plain dictionaries, and sums over the rows.
"""

import itertools
import random
from datetime import UTC, datetime, timedelta

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select

from tasks.feedback.store import clock
from tasks.feedback.store.queue import StaleTaskError
from tasks.feedback.store.records import CHOICES, Answer, Ballot, NewPair, Vote
from tasks.feedback.store.tables import Annotator, Assignment, Judgment, Pair

PEOPLE = st.integers(0, 2)
PAIRS = st.integers(0, 7)
CHOSEN = st.sampled_from(["left", "right", "tie", "both_bad"])
NUMBER = itertools.count()


def pair(n: int, **more) -> NewPair:
    return NewPair(f"prompt {n // 2}", Answer(f"one {n}"), Answer(f"two {n}"), **more)


class Desks(RuleBasedStateMachine):
    store = None  # set by the test

    def __init__(self):
        super().__init__()
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.original = clock.now
        clock.now = lambda: self.now
        random.seed(0)
        self.project = self.store.project(f"p{next(NUMBER)}", make=True)
        self.project.change("test", {"gold_every": 3, "repeat_every": 3, "lease_minutes": 10})
        self.people = [
            self.store.door.who(self.store.door.enter(self.project.people.invite())).annotator
            for _ in range(3)
        ]
        self.desks = {person: [] for person in self.people}
        self.said = []  # (person, token, vote, key), in order, without those taken back
        self.keys = itertools.count()
        self.rows = {}
        self.project.content.add(pair(n, wanted=1 + n % 2) for n in range(4))

    def teardown(self):
        clock.now = self.original

    def do(self):
        self.now += timedelta(seconds=1)

    # ---- what can happen ----

    @rule(
        n=PAIRS, wanted=st.integers(0, 2), priority=st.integers(-1, 1), gold=st.sampled_from("ab ")
    )
    def ask(self, n, wanted, priority, gold):
        gold = None if gold == " " else gold
        self.project.content.add([pair(n, wanted=wanted, priority=priority, gold=gold)])

    @rule(n=PAIRS, wanted=st.integers(1, 2), name=st.sampled_from(["x", "y"]))
    def ask_as_a_batch(self, n, wanted, name):
        batch = self.project.content.batch(name, "ask")
        self.project.content.add([pair(n, wanted=wanted)], batch=batch)

    @rule(name=st.sampled_from(["x", "y"]))
    def withdraw(self, name):
        self.project.content.withdraw(self.project.content.batch(name, "ask"))

    @rule(n=PAIRS, vote=st.sampled_from(CHOICES), name=st.sampled_from(["", "ann", "bob"]))
    def bring(self, n, vote, name):
        self.project.judgments.add([(pair(n), [Ballot(vote, name)])])

    @rule(who=PEOPLE)
    def label_one(self, who):
        """What most people do most of the time."""
        self.lease(who, 2)
        if self.desks[self.people[who]]:
            self.vote(who, "left", False, False)

    @rule(who=PEOPLE, count=st.integers(1, 3))
    def lease(self, who, count):
        person = self.people[who]
        before = self.desks[person]
        tasks = self.project.queue.lease(person, count)
        tokens = [task.token for task in tasks]
        assert len(set(tokens)) == len(tokens) <= count
        shown = {task.token: (task.left, task.right) for task in tasks}
        for task in before:  # whatever is shown again is as it was
            assert shown.get(task.token, (task.left, task.right)) == (task.left, task.right)
        self.desks[person] = tasks + [task for task in before if task.token not in shown]

    @precondition(lambda self: any(self.desks.values()))
    @rule(
        who=PEOPLE, choice=CHOSEN, skip=st.sampled_from([False, False, True]), twice=st.booleans()
    )
    def vote(self, who, choice, skip, twice):
        person = self.people[who]
        if not self.desks[person]:
            return
        self.do()
        task = self.desks[person].pop(0)
        said = Vote("skip" if skip else choice, f"key-{next(self.keys)}", seconds=1.0)
        for _ in range(1 + twice):
            self.project.queue.vote(person, task.token, said)
        self.said.append((person, task, said))
        other = self.people[(who + 1) % 3]
        for whose, key in ((other, said.key), (other, "new"), (person, "new")):
            try:
                self.project.queue.vote(whose, task.token, Vote("left", key))
            except StaleTaskError:
                continue
            raise AssertionError("a vote on a task of somebody else, or a second one")

    @rule(who=PEOPLE, twice=st.booleans())
    def undo(self, who, twice):
        self.do()
        person = self.people[who]
        mine = [entry for entry in self.said if entry[0] == person]
        key = f"undo-{next(self.keys)}"
        try:
            found = self.project.queue.undo(person, key)
        except StaleTaskError:
            assert mine[-1][2].choice == "skip"
            return
        if not mine:
            assert found is None
            return
        _, task, _ = mine[-1]
        assert (found.token, found.left, found.right) == (task.token, task.left, task.right)
        if twice:
            assert self.project.queue.undo(person, key).token == task.token
        self.said.remove(mine[-1])
        self.desks[person].insert(0, found)
        # it is on top of the desk
        assert self.project.queue.lease(person)[0].token == task.token

    @rule(who=PEOPLE)
    def stay_away(self, who):
        """Until all leases are over and somebody else has come."""
        self.now += timedelta(minutes=11)
        self.lease(who, 1)

    @rule(who=PEOPLE)
    def give_up(self, who):
        self.project.queue.release(self.people[who])

    # ---- what is true at any time ----

    @invariant()
    def the_rows_add_up(self):
        with self.store.database.reading() as session:
            here = {"project_id": self.project.id}
            pairs = session.scalars(select(Pair).filter_by(**here)).all()
            judgments = session.scalars(select(Judgment).filter_by(**here)).all()
            desk = session.scalars(select(Assignment).filter_by(**here)).all()
            people = session.scalars(select(Annotator).filter_by(**here)).all()
        replaced = {row.replaces_id for row in judgments}
        current = [row for row in judgments if row.id not in replaced]
        for row in pairs:
            votes = sum(
                one.pair_id == row.id and one.vote in CHOICES and one.kind in ("fresh", "import")
                for one in current
            )
            leases = sum(
                one.pair_id == row.id and one.state == "open" and one.kind == "fresh"
                for one in desk
            )
            assert (row.votes, row.taken) == (votes, votes + leases)
            if row.state != "withdrawn":
                assert row.state == ("open" if votes < row.wanted else "done")
        had = {(one.annotator_id, one.pair_id) for one in desk}
        for person in people:
            if person.mark_id is None:
                continue
            for row in pairs:
                passed = (row.priority, row.id) <= (person.mark_priority, person.mark_id)
                is_free = row.state == "open" and row.taken < row.wanted
                assert not (passed and is_free and (person.id, row.id) not in had)
        kinds = [(one.annotator_id, one.pair_id, one.kind == "repeat") for one in desk]
        assert len(set(kinds)) == len(kinds)
        said = {
            (one.annotator_id, one.assignment_id): one.vote for one in current if one.assignment_id
        }
        for one in desk:
            vote = said.get((one.annotator_id, one.id), "withdrawn")
            state = {"skip": "skipped", "withdrawn": one.state}.get(vote, "voted")
            assert one.state == state
        for row in judgments:  # never changed, never gone
            now = (row.vote, row.first, row.key, row.replaces_id, row.at)
            assert self.rows.setdefault(row.id, now) == now
        assert len(self.rows) == len(judgments)

    @invariant()
    def every_vote_is_there_once(self):
        with self.store.database.reading() as session:
            rows = session.execute(
                select(Assignment.token, Assignment.first, Judgment.vote)
                .join(Judgment, Judgment.assignment_id == Assignment.id)
                .where(
                    Judgment.project_id == self.project.id,
                    Judgment.vote != "withdrawn",
                    Judgment.id.not_in(
                        select(Judgment.replaces_id).where(Judgment.replaces_id.is_not(None))
                    ),
                )
            ).all()
        there = {token: (first, vote) for token, first, vote in rows}
        assert len(there) == len(rows) == len(self.said)
        for _, task, said in self.said:
            first, vote = there[task.token]
            other = "b" if first == "a" else "a"
            assert vote == {"left": first, "right": other}.get(said.choice, said.choice)


def test_whatever_happens_the_rows_add_up(store):
    Desks.store = store
    run_state_machine_as_test(
        Desks,
        settings=settings(
            max_examples=15,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

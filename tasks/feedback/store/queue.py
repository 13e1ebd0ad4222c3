"""Who labels what: leases, drawn sides, control questions, repeats, votes and undo.

A pair is leased to one annotator at a time for each vote that is wanted, and nobody gets a pair
twice, except as a repeat with its sides exchanged. Everything happens in a transaction, so a
server that is killed leaves either all of a vote or nothing.
"""

import random
import secrets
from datetime import timedelta

from sqlalchemy import ColumnElement, exists, func, select, update
from sqlalchemy.orm import Session

from rlhf_core.errors import UserError
from tasks.feedback.store import clock
from tasks.feedback.store.database import Database
from tasks.feedback.store.records import AssignmentKind, Progress, ProjectRules, Task, Vote
from tasks.feedback.store.tables import (
    Annotator,
    Assignment,
    GoldAnswer,
    Judgment,
    Pair,
    Project,
    Prompt,
    Response,
)

REPEAT_AFTER = 10  # tasks between a pair and its repeat


class StaleTaskError(UserError):
    """A vote on a task that is not the annotator's, or has a vote already."""


class Queue:
    """The tasks of a project."""

    def __init__(self, database: Database, project_id: int) -> None:
        self._database = database
        self._project = project_id

    def lease(self, annotator_id: int, count: int = 1) -> list[Task]:
        """The tasks on an annotator's desk, filled up to `count`; fewer if nothing is left.

        Those that were leased before come first and as they were, sides included.
        """
        with self._database.writing() as session:
            rules = self._rules(session)
            person = session.get_one(Annotator, annotator_id)
            if rules.paused or person.state != "active":
                return []
            self._expire(session)
            until = clock.now() + timedelta(minutes=rules.lease_minutes)
            desk = list(
                session.scalars(
                    select(Assignment)
                    .filter_by(annotator_id=annotator_id, state="open")
                    .order_by(Assignment.id)
                )
            )
            for assignment in desk:
                assignment.leased_until = until
            while len(desk) < count:
                drawn = self._draw(session, annotator_id, rules)
                if drawn is None:
                    break
                pair, kind, first = drawn
                desk.append(self._assign(session, annotator_id, pair, kind, first, rules))
            return [self._task(session, assignment) for assignment in desk[:count]]

    def vote(self, annotator_id: int, token: str, vote: Vote) -> None:
        """Keep a vote or a skip. The same key twice is one vote.

        A lease that has expired meanwhile does not matter: what somebody has decided is kept.

        Raises: StaleTaskError when the task is not this annotator's, or has another vote.
        """
        with self._database.writing() as session:
            found = session.scalar(
                select(Assignment).filter_by(token=token, annotator_id=annotator_id)
            )
            if found is None:
                raise StaleTaskError("This task is not on your desk.")
            if session.scalar(
                select(Judgment.id).filter_by(project_id=self._project, key=vote.key)
            ):
                return
            if found.state in ("voted", "skipped"):
                raise StaleTaskError("This task has a vote already.")
            self._settle(session, found, vote)

    def undo(self, annotator_id: int) -> Task | None:
        """Take the last vote or skip back, and put its task on top of the desk again.

        Returns: the task; None if there is nothing to take back.
        """
        with self._database.writing() as session:
            rules = self._rules(session)
            last = session.scalar(
                select(Assignment)
                .where(
                    Assignment.annotator_id == annotator_id,
                    Assignment.state.in_(("voted", "skipped")),
                )
                .order_by(Assignment.ended_at.desc(), Assignment.id.desc())
                .limit(1)
            )
            if last is None:
                return None
            self._withdraw(session, last, rules)
            return self._task(session, last)

    def progress(self, annotator_id: int) -> Progress:
        """How many tasks somebody has done, and how many are free for them."""
        with self._database.reading() as session:
            done = session.scalar(
                select(func.count())
                .select_from(Assignment)
                .where(
                    Assignment.annotator_id == annotator_id,
                    Assignment.state.in_(("voted", "skipped")),
                )
            )
            left = session.scalar(
                select(func.count()).select_from(Pair).where(*self._free(annotator_id))
            )
            return Progress(done or 0, left or 0)

    # ---- drawing ----

    def _draw(
        self, session: Session, annotator_id: int, rules: ProjectRules
    ) -> tuple[Pair, AssignmentKind, str] | None:
        """What comes next: now and then a control question or a repeat, else a fresh pair."""
        if (
            rules.gold_every
            and random.random() < 1 / rules.gold_every
            and (gold := self._gold(session, annotator_id))
        ):
            return gold, "gold", random.choice("ab")
        if (
            rules.repeat_every
            and random.random() < 1 / rules.repeat_every
            and (again := self._repeat(session, annotator_id))
        ):
            pair, first = again
            return pair, "repeat", "b" if first == "a" else "a"
        fresh = session.scalar(
            select(Pair)
            .where(*self._free(annotator_id))
            .order_by(Pair.priority, Pair.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        return None if fresh is None else (fresh, "fresh", random.choice("ab"))

    def _free(self, annotator_id: int) -> list[ColumnElement[bool]]:
        mine = exists().where(
            Assignment.pair_id == Pair.id, Assignment.annotator_id == annotator_id
        )
        return [
            Pair.project_id == self._project,
            Pair.state == "open",
            Pair.taken < Pair.wanted,
            ~mine,
        ]

    def _gold(self, session: Session, annotator_id: int) -> Pair | None:
        mine = exists().where(
            Assignment.pair_id == Pair.id, Assignment.annotator_id == annotator_id
        )
        return session.scalar(
            select(Pair)
            .join(GoldAnswer, GoldAnswer.pair_id == Pair.id)
            .where(Pair.project_id == self._project, ~mine)
            .order_by(Pair.id)
            .limit(1)
        )

    def _repeat(self, session: Session, annotator_id: int) -> tuple[Pair, str] | None:
        recent = (
            select(Assignment.id)
            .filter_by(annotator_id=annotator_id)
            .order_by(Assignment.id.desc())
            .limit(REPEAT_AFTER)
        )
        repeated = (
            select(Assignment.pair_id)
            .filter_by(annotator_id=annotator_id, kind="repeat")
            .subquery()
        )
        found = session.execute(
            select(Pair, Assignment.first)
            .join(Assignment, Assignment.pair_id == Pair.id)
            .where(
                Assignment.annotator_id == annotator_id,
                Assignment.kind == "fresh",
                Assignment.state == "voted",
                Assignment.id.not_in(recent),
                Pair.id.not_in(select(repeated.c.pair_id)),
            )
            .order_by(Assignment.id)
            .limit(1)
        ).first()
        return None if found is None else (found[0], found[1])

    def _assign(
        self,
        session: Session,
        annotator_id: int,
        pair: Pair,
        kind: AssignmentKind,
        first: str,
        rules: ProjectRules,
    ) -> Assignment:
        made = Assignment(
            token=secrets.token_hex(16),
            pair_id=pair.id,
            annotator_id=annotator_id,
            kind=kind,
            first=first,
            state="open",
            leased_until=clock.now() + timedelta(minutes=rules.lease_minutes),
            created_at=clock.now(),
        )
        session.add(made)
        if kind == "fresh":
            pair.taken += 1
        session.flush()
        return made

    def _expire(self, session: Session) -> None:
        """Free the pairs whose lease is over; their tasks leave the desk."""
        over = list(
            session.scalars(
                select(Assignment)
                .join(Pair, Pair.id == Assignment.pair_id)
                .where(
                    Pair.project_id == self._project,
                    Assignment.state == "open",
                    Assignment.leased_until < clock.now(),
                )
            )
        )
        for assignment in over:
            assignment.state = "expired"
            if assignment.kind == "fresh":
                self._release(session, assignment.pair_id)

    def _release(self, session: Session, pair_id: int) -> None:
        session.execute(update(Pair).where(Pair.id == pair_id).values(taken=Pair.taken - 1))

    # ---- votes ----

    def _settle(self, session: Session, assignment: Assignment, vote: Vote) -> None:
        other = "b" if assignment.first == "a" else "a"
        said = {"left": assignment.first, "right": other}.get(vote.choice, vote.choice)
        at = clock.now()
        session.add(
            Judgment(
                project_id=self._project,
                pair_id=assignment.pair_id,
                annotator_id=assignment.annotator_id,
                assignment_id=assignment.id,
                replaces_id=self._current(session, assignment.id),
                key=vote.key,
                kind=assignment.kind,
                vote=said,
                first=assignment.first,
                seconds=vote.seconds,
                note=vote.note,
                reason=vote.reason,
                source=vote.source,
                time=vote.time or at.isoformat(timespec="microseconds"),
                at=at,
            )
        )
        was_expired = assignment.state == "expired"
        skipped = vote.choice == "skip"
        assignment.state, assignment.ended_at = "skipped" if skipped else "voted", at
        if assignment.kind != "fresh":
            return
        pair = session.get_one(Pair, assignment.pair_id, with_for_update=True)
        if skipped:
            pair.taken -= 0 if was_expired else 1
        else:
            pair.taken += 1 if was_expired else 0
            pair.votes += 1
            if pair.votes >= pair.wanted:
                pair.state = "done"

    def _withdraw(self, session: Session, last: Assignment, rules: ProjectRules) -> None:
        current = self._current(session, last.id)
        at = clock.now()
        session.add(
            Judgment(
                project_id=self._project,
                pair_id=last.pair_id,
                annotator_id=last.annotator_id,
                assignment_id=last.id,
                replaces_id=current,
                key=secrets.token_hex(16),
                kind=last.kind,
                vote="withdrawn",
                first=last.first,
                source="page",
                time=at.isoformat(timespec="microseconds"),
                at=at,
            )
        )
        if last.kind == "fresh":
            pair = session.get_one(Pair, last.pair_id, with_for_update=True)
            if last.state == "voted":
                pair.votes -= 1
                if pair.state == "done" and pair.votes < pair.wanted:
                    pair.state = "open"
            else:
                pair.taken += 1
        last.state, last.ended_at = "open", None
        last.leased_until = at + timedelta(minutes=rules.lease_minutes)

    def _current(self, session: Session, assignment_id: int) -> int | None:
        """The judgment of a task that no other replaces."""
        later = select(Judgment.replaces_id).where(
            Judgment.assignment_id == assignment_id, Judgment.replaces_id.is_not(None)
        )
        return session.scalar(
            select(Judgment.id).where(
                Judgment.assignment_id == assignment_id, Judgment.id.not_in(later)
            )
        )

    # ---- reading ----

    def _task(self, session: Session, assignment: Assignment) -> Task:
        pair = session.get_one(Pair, assignment.pair_id)
        prompt = session.get_one(Prompt, pair.prompt_id)
        a = session.get_one(Response, pair.response_a_id).text
        b = session.get_one(Response, pair.response_b_id).text
        left, right = (a, b) if assignment.first == "a" else (b, a)
        return Task(assignment.token, prompt.content, left, right, assignment.leased_until)

    def _rules(self, session: Session) -> ProjectRules:
        return ProjectRules.model_validate(session.get_one(Project, self._project).rules)

"""Who labels what: leases, votes and undo.

A pair is leased to one annotator at a time for each vote that is wanted, and nobody gets a pair
twice, except as a repeat with its sides exchanged. Everything happens in a transaction, so a
server that is killed leaves either all of a vote or nothing.

A task is open (on a desk), voted, skipped, or expired: somebody else may have its pair, and if
nobody took it, it comes back to the desk as it was.
"""

import math
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import exists, func, select
from sqlalchemy.orm import Session, aliased

from rlhf_core.errors import DataError, UserError
from tasks.feedback.store import clock
from tasks.feedback.store.content import check_text
from tasks.feedback.store.database import Database
from tasks.feedback.store.drawing import Draw, count_free, draw, set_marks_back
from tasks.feedback.store.records import Progress, ProjectRules, Task, Vote
from tasks.feedback.store.tables import Annotator, Assignment, Judgment, Pair, Project, Response
from tasks.feedback.store.tables import Prompt as PromptRow

LEFT_AT_MOST = 5_000  # more free pairs than this are not counted
LONGEST_KEY = 64
_CHOICES = ("left", "right", "tie", "both_bad", "skip")


class StaleTaskError(UserError):
    """A vote or an undo that cannot be, as things are: the message says why."""


class Queue:
    """The tasks of a project."""

    def __init__(self, database: Database, project_id: int) -> None:
        self._database = database
        self._project = project_id

    def lease(self, annotator_id: int, count: int = 1) -> list[Task]:
        """The tasks on an annotator's desk, filled up to `count`; fewer if nothing is left.

        Those that were leased before come first and as they were, sides included.
        """
        with self._database.writing(self._project) as session:
            rules, person = self._rules(session), self._person(session, annotator_id)
            if rules.paused or person.state != "active":
                return []
            until = _lease_end(rules)
            desk = self._desk(session, annotator_id)
            for assignment in desk:
                assignment.leased_until = until
            session.flush()
            self._expire(session)
            while len(desk) < count:
                if (again := self._reopen(session, annotator_id)) is None:
                    drawn = draw(session, person, rules)
                    if drawn is None:
                        break
                    again = self._assign(session, annotator_id, drawn)
                again.leased_until = until
                session.flush()
                desk.append(again)
            return self._tasks(session, desk[:count])

    def vote(self, annotator_id: int, token: str, vote: Vote) -> None:
        """Keep a vote or a skip. The same post twice is one vote.

        A lease that has expired meanwhile does not matter: what somebody has decided is kept.

        Raises: StaleTaskError when the task is not this annotator's, or has another vote;
            DataError for a vote that says something impossible.
        """
        _check(vote)
        with self._database.writing(self._project) as session:
            person = self._person(session, annotator_id)
            found = session.scalar(
                select(Assignment).filter_by(
                    token=token, annotator_id=annotator_id, project_id=self._project
                )
            )
            if found is None or person.state == "left":
                raise StaleTaskError("This task is not on your desk.")
            said = _said(found, vote.choice)
            known = session.scalar(
                select(Judgment).filter_by(project_id=self._project, key=vote.key)
            )
            if known is not None:
                if (known.assignment_id, known.vote) == (found.id, said):
                    return
                raise StaleTaskError("The key of this vote was used for another vote.")
            if found.state in ("voted", "skipped"):
                raise StaleTaskError("This task has a vote already.")
            self._settle(session, found, vote, said)

    def undo(self, annotator_id: int, key: str = "") -> Task | None:
        """Take the last vote or skip back, and put its task on top of the desk again.

        Args:
            key: made by whoever sends it: sent twice, it takes one vote back.

        Returns: the task; None if there is nothing to take back, or nobody labels at present.

        Raises: StaleTaskError when the pair of a skip is somebody else's by now.
        """
        key = key or secrets.token_hex(16)
        _check_key(key)
        with self._database.writing(self._project) as session:
            rules, person = self._rules(session), self._person(session, annotator_id)
            if rules.paused or person.state != "active":
                return None
            known = session.scalar(select(Judgment).filter_by(project_id=self._project, key=key))
            if known is not None:
                return self._undone(session, known, annotator_id)
            last = self._last(session, annotator_id)
            if last is None:
                return None
            judgment, assignment = last
            self._withdraw(session, judgment, assignment, key, rules)
            session.flush()
            [task] = self._tasks(session, [assignment])
            return task

    def progress(self, annotator_id: int, since: datetime | None = None) -> Progress:
        """How many tasks somebody has done, in all and since a moment, and how many are left."""
        with self._database.reading() as session:
            person = self._person(session, annotator_id)
            query = (
                select(func.count())
                .select_from(Assignment)
                .where(
                    Assignment.annotator_id == annotator_id,
                    Assignment.state.in_(("voted", "skipped")),
                )
            )
            done = session.scalar(query)
            recent = session.scalar(query.where(Assignment.ended_at >= since)) if since else 0
            left = count_free(session, person, LEFT_AT_MOST + 1) + sum(
                assignment.kind == "fresh" for assignment in self._desk(session, annotator_id)
            )
            return Progress(
                done or 0, min(left, LEFT_AT_MOST), recent or 0, more=left > LEFT_AT_MOST
            )

    def release(self, annotator_id: int) -> None:
        """Take the desk of an annotator away, so that others get its pairs at once."""
        with self._database.writing(self._project) as session:
            self._give_back(session, self._desk(session, annotator_id))

    # ---- the desk ----

    def _desk(self, session: Session, annotator_id: int) -> list[Assignment]:
        """What is on a desk: what was undone last, on top; then in the order of the draws."""
        found = session.scalars(
            select(Assignment).filter_by(annotator_id=annotator_id, state="open")
        )
        return sorted(found, key=lambda row: (-_seconds(row.undone_at), row.id))

    def _reopen(self, session: Session, annotator_id: int) -> Assignment | None:
        """A task that left the desk because its lease was over, and that nobody took."""
        found = session.execute(
            select(Assignment, Pair)
            .join(Pair, Pair.id == Assignment.pair_id)
            .where(
                Assignment.annotator_id == annotator_id,
                Assignment.state == "expired",
                (Assignment.kind != "fresh") | (Pair.taken < Pair.wanted),
                (Pair.state == "open") | ((Assignment.kind != "fresh") & (Pair.state == "done")),
            )
            .order_by(Assignment.id)
            .limit(1)
        ).first()
        if found is None:
            return None
        assignment: Assignment = found[0]
        assignment.state, assignment.ended_at = "open", None
        if assignment.kind == "fresh":
            found[1].taken += 1
        return assignment

    def _assign(self, session: Session, annotator_id: int, drawn: Draw) -> Assignment:
        made = Assignment(
            token=secrets.token_hex(16),
            project_id=self._project,
            pair_id=drawn.pair,
            annotator_id=annotator_id,
            kind=drawn.kind,
            first=drawn.first,
            state="open",
            leased_until=clock.now(),
            created_at=clock.now(),
        )
        session.add(made)
        if drawn.kind == "fresh":
            session.get_one(Pair, drawn.pair).taken += 1
        return made

    def _expire(self, session: Session) -> None:
        """Free the pairs whose lease is over, or whose annotator was paused or has left."""
        absent = exists().where(
            Annotator.id == Assignment.annotator_id, Annotator.state != "active"
        )
        over = session.scalars(
            select(Assignment).where(
                Assignment.project_id == self._project,
                Assignment.state == "open",
                (Assignment.leased_until < clock.now()) | absent,
            )
        ).all()
        self._give_back(session, over)

    def _give_back(self, session: Session, desk: Sequence[Assignment]) -> None:
        for assignment in desk:
            assignment.state, assignment.ended_at = "expired", clock.now()
            assignment.undone_at = None
        session.flush()
        for pair in [assignment.pair_id for assignment in desk if assignment.kind == "fresh"]:
            self._free(session, pair)

    def _free(self, session: Session, pair_id: int) -> None:
        """One less has, or will have, labelled a pair."""
        pair = session.get_one(Pair, pair_id)
        pair.taken -= 1
        session.flush()
        if pair.state == "open" and pair.taken < pair.wanted:
            set_marks_back(session, self._project, pair.priority, pair.id, one=True)

    # ---- votes ----

    def _settle(self, session: Session, assignment: Assignment, vote: Vote, said: str) -> None:
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
        was_open = assignment.state == "open"
        skipped = said == "skip"
        assignment.state = "skipped" if skipped else "voted"
        assignment.ended_at, assignment.undone_at = at, None
        session.flush()
        if assignment.kind != "fresh":
            return
        if skipped:
            if was_open:
                self._free(session, assignment.pair_id)
            return
        pair = session.get_one(Pair, assignment.pair_id)
        pair.taken += 0 if was_open else 1
        pair.votes += 1
        if pair.state == "open" and pair.votes >= pair.wanted:
            pair.state = "done"

    def _last(self, session: Session, annotator_id: int) -> tuple[Judgment, Assignment] | None:
        """The last vote or skip of an annotator that was not taken back."""
        later = aliased(Judgment)
        row = session.execute(
            select(Judgment, Assignment)
            .join(Assignment, Assignment.id == Judgment.assignment_id)
            .where(
                Judgment.annotator_id == annotator_id,
                Judgment.vote != "withdrawn",
                ~exists().where(later.replaces_id == Judgment.id),
            )
            .order_by(Judgment.id.desc())
            .limit(1)
        ).first()
        return None if row is None else (row[0], row[1])

    def _withdraw(
        self,
        session: Session,
        current: Judgment,
        assignment: Assignment,
        key: str,
        rules: ProjectRules,
    ) -> None:
        at = clock.now()
        pair = session.get_one(Pair, assignment.pair_id)
        if assignment.kind == "fresh":
            if assignment.state == "voted":  # the vote becomes a lease
                pair.votes -= 1
                if pair.state == "done" and pair.votes < pair.wanted:
                    pair.state = "open"
            elif pair.state == "open" and pair.taken < pair.wanted:
                pair.taken += 1
            else:
                raise StaleTaskError("Somebody else has this pair by now, so the skip stays.")
        session.add(
            Judgment(
                project_id=self._project,
                pair_id=assignment.pair_id,
                annotator_id=assignment.annotator_id,
                assignment_id=assignment.id,
                replaces_id=current.id,
                key=key,
                kind=assignment.kind,
                vote="withdrawn",
                first=assignment.first,
                source=current.source,
                time=at.isoformat(timespec="microseconds"),
                at=at,
            )
        )
        assignment.state, assignment.ended_at, assignment.undone_at = "open", None, at
        assignment.leased_until = _lease_end(rules)

    def _undone(self, session: Session, known: Judgment, annotator_id: int) -> Task | None:
        """The task of an undo that has come before; None if it has a vote again."""
        if known.annotator_id != annotator_id or known.vote != "withdrawn":
            raise StaleTaskError("The key of this undo was used for a vote.")
        assignment = session.get_one(Assignment, known.assignment_id)
        return self._tasks(session, [assignment])[0] if assignment.state == "open" else None

    def _current(self, session: Session, assignment_id: int) -> int | None:
        """The judgment of a task that no other replaces."""
        later = aliased(Judgment)
        return session.scalar(
            select(Judgment.id).where(
                Judgment.assignment_id == assignment_id,
                ~exists().where(later.replaces_id == Judgment.id),
            )
        )

    # ---- reading ----

    def _tasks(self, session: Session, desk: Sequence[Assignment]) -> list[Task]:
        a, b = aliased(Response), aliased(Response)
        rows = session.execute(
            select(Pair.id, PromptRow.content, a.text, b.text)
            .join(PromptRow, PromptRow.id == Pair.prompt_id)
            .join(a, a.id == Pair.response_a_id)
            .join(b, b.id == Pair.response_b_id)
            .where(Pair.id.in_([assignment.pair_id for assignment in desk]))
        )
        shown = {row[0]: row for row in rows}
        tasks = []
        for assignment in desk:
            _, prompt, one, other = shown[assignment.pair_id]
            left, right = (one, other) if assignment.first == "a" else (other, one)
            tasks.append(Task(assignment.token, prompt, left, right, assignment.leased_until))
        return tasks

    def _rules(self, session: Session) -> ProjectRules:
        return ProjectRules.model_validate(session.get_one(Project, self._project).rules)

    def _person(self, session: Session, annotator_id: int) -> Annotator:
        """An annotator of this project.

        Raises: StaleTaskError for that of another.
        """
        person = session.get(Annotator, annotator_id)
        if person is None or person.project_id != self._project:
            raise StaleTaskError("There is no such annotator in this project.")
        return person


def _lease_end(rules: ProjectRules) -> datetime:
    return clock.now() + timedelta(minutes=rules.lease_minutes)


def _seconds(moment: datetime | None) -> float:
    return 0.0 if moment is None else moment.timestamp()


def _said(assignment: Assignment, choice: str) -> str:
    other = "b" if assignment.first == "a" else "a"
    return {"left": assignment.first, "right": other}.get(choice, choice)


def _check(vote: Vote) -> None:
    if vote.choice not in _CHOICES:
        raise DataError(f"{vote.choice!r} is no vote; a vote is one of {', '.join(_CHOICES)}")
    _check_key(vote.key)
    seconds = vote.seconds
    if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
        raise DataError(f"a vote cannot have taken {seconds} seconds")
    for what in ("note", "reason", "source", "time"):
        check_text(f"the {what} of a vote", getattr(vote, what))


def _check_key(key: str) -> None:
    if not (0 < len(key) <= LONGEST_KEY and key.isascii() and key.isprintable()):
        raise DataError(f"the key of a vote has 1 to {LONGEST_KEY} letters, digits and signs")

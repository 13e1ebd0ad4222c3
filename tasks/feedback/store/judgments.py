"""Votes that were cast elsewhere, put in; and the votes that count, read as a stream."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sqlalchemy import ColumnElement, Select, exists, select
from sqlalchemy.orm import Session, aliased

from rlhf_core.data.encoding import Prompt as PromptText
from tasks.feedback.store import clock
from tasks.feedback.store.content import Content, digest
from tasks.feedback.store.database import Database
from tasks.feedback.store.records import CHOICES, Ballot, NewPair
from tasks.feedback.store.tables import (
    Annotator,
    Batch,
    BatchPair,
    GoldAnswer,
    Judgment,
    Pair,
    Prompt,
    Response,
    SnapshotMember,
)

ROWS = 2000  # fetched at a time
JUDGE = "judge"  # of a batch: its votes are verdicts, and no training data
_EXCHANGED = {"a": "b", "b": "a"}


def judged() -> ColumnElement[bool]:
    """Whether people were asked about the pair of a judgment as judges."""
    return (
        exists()
        .where(BatchPair.pair_id == Judgment.pair_id)
        .where(Batch.id == BatchPair.batch_id, Batch.kind == JUDGE)
    )


class CastVote(NamedTuple):
    """A vote that counts, with everything that training and the reports need."""

    judgment: int
    pair: int
    prompt: PromptText
    response_a: str
    response_b: str
    model_a: str
    model_b: str
    vote: str  # a, b, tie, both_bad; skip only where asked for
    first: str  # a, b or "" (unknown)
    annotator: str  # pseudonym; "" = anonymous
    kind: str  # fresh, gold, repeat, import
    gold: str  # the right answer, if it is known; else ""
    margin: float
    seconds: float | None
    time: str
    note: str
    reason: str
    source: str
    kept: dict[str, str]


class Judgments:
    """The votes of a project."""

    def __init__(self, database: Database, project_id: int) -> None:
        self._database = database
        self._project = project_id

    def add(self, votes: Iterable[tuple[NewPair, list[Ballot]]], *, chunk: int = 500) -> int:
        """Put in votes that were cast elsewhere; one that is there already is not doubled.

        Returns: the number of new votes.
        """
        content = Content(self._database, self._project)
        added, waiting = 0, []
        for pair, ballots in votes:
            waiting.append((pair, ballots))
            if len(waiting) == chunk:
                added += self._add(content, waiting)
                waiting = []
        return added + (self._add(content, waiting) if waiting else 0)

    def _add(self, content: Content, votes: list[tuple[NewPair, list[Ballot]]]) -> int:
        pairs = content.add(pair for pair, _ in votes)
        added = 0
        with self._database.writing() as session:
            for place, (_, ballots) in zip(pairs, votes, strict=True):
                for ballot in ballots:
                    added += self._cast(session, place.id, place.swapped, ballot)
        return added

    def _cast(self, session: Session, pair_id: int, swapped: bool, ballot: Ballot) -> bool:
        pair = session.get_one(Pair, pair_id)
        vote, first = ballot.vote, ballot.first
        if swapped:
            vote = _EXCHANGED.get(vote, vote)  # type: ignore[assignment]
            first = _EXCHANGED.get(first, first)  # type: ignore[assignment]
        key = digest(
            pair.digest, vote, first, ballot.annotator, ballot.time, ballot.source, ballot.ballot
        )
        if session.scalar(select(Judgment.id).filter_by(project_id=self._project, key=key)):
            return False
        session.add(
            Judgment(
                project_id=self._project,
                pair_id=pair_id,
                annotator_id=self._annotator(session, ballot.annotator),
                key=key,
                kind=ballot.kind,
                vote=vote,
                first=first,
                margin=ballot.margin,
                seconds=ballot.seconds,
                note=ballot.note,
                reason=ballot.reason,
                source=ballot.source,
                time=ballot.time,
                at=clock.now(),
            )
        )
        if vote != "skip":
            pair.votes += 1
            pair.taken += 1
        return True

    def _annotator(self, session: Session, pseudonym: str) -> int | None:
        if not pseudonym:
            return None
        found = session.scalar(
            select(Annotator).filter_by(project_id=self._project, pseudonym=pseudonym)
        )
        if found is None:
            found = Annotator(
                project_id=self._project,
                pseudonym=pseudonym,
                via="import",
                state="left",
                created_at=clock.now(),
            )
            session.add(found)
            session.flush()
        return found.id

    def stream(
        self,
        *,
        snapshot: int | None = None,
        skips: bool = False,
        after: int = 0,
        training: bool = False,
    ) -> Iterator[CastVote]:
        """The votes that count, in the order in which they came, a few at a time in memory.

        Args:
            snapshot: only its members; None = those that count now.
            skips: also what was skipped, with its reason.
            after: only judgments with a higher number.
            training: without those on pairs that people were asked about as judges: their prompts
                are those of an evaluation, which no training may see.
        """
        with self._database.reading() as session:
            query = self._query(snapshot, skips).where(Judgment.id > after)
            if training:
                query = query.where(~judged())
            rows = session.execute(query.execution_options(yield_per=ROWS))
            for row in rows:
                yield CastVote(*row)

    def _query(self, snapshot: int | None, skips: bool) -> Select[tuple[object, ...]]:
        a, b = aliased(Response), aliased(Response)
        later = aliased(Judgment)
        query = (
            select(
                Judgment.id,
                Judgment.pair_id,
                Prompt.content,
                a.text,
                b.text,
                a.model,
                b.model,
                Judgment.vote,
                Judgment.first,
                Annotator.pseudonym,
                Judgment.kind,
                GoldAnswer.vote,
                Judgment.margin,
                Judgment.seconds,
                Judgment.time,
                Judgment.note,
                Judgment.reason,
                Judgment.source,
                Pair.kept,
            )
            .join(Pair, Pair.id == Judgment.pair_id)
            .join(Prompt, Prompt.id == Pair.prompt_id)
            .join(a, a.id == Pair.response_a_id)
            .join(b, b.id == Pair.response_b_id)
            .outerjoin(Annotator, Annotator.id == Judgment.annotator_id)
            .outerjoin(GoldAnswer, GoldAnswer.pair_id == Judgment.pair_id)
            .where(Judgment.project_id == self._project)
            .order_by(Judgment.id)
        )
        if snapshot is not None:
            return query.join(SnapshotMember, SnapshotMember.judgment_id == Judgment.id).where(
                SnapshotMember.snapshot_id == snapshot
            )
        counted = (*CHOICES, "skip") if skips else CHOICES
        return query.where(
            Judgment.vote.in_(counted), ~exists().where(later.replaces_id == Judgment.id)
        )

"""Pairs of a project with all that the store knows of them, a few at a time."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Select, func, select
from sqlalchemy.orm import aliased

from rlhf_core.data.encoding import Prompt as PromptText
from tasks.feedback.store.records import Answer, NewPair
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import (
    GoldAnswer,
    Judgment,
    Pair,
    Prompt,
    Response,
    Snapshot,
    SnapshotMember,
)

ROWS = 500  # fetched at a time


class StoredPair(NamedTuple):
    """A pair as it is in the store."""

    id: int
    prompt_id: int
    a_id: int
    b_id: int
    pair: NewPair
    wanted: int
    votes: int

    @property
    def prompt(self) -> PromptText:
        """What was asked."""
        return self.pair.prompt


def pairs(
    project: FeedbackProject, *, only_open: bool = False, snapshot: str = ""
) -> Iterator[StoredPair]:
    """All pairs, those of a prompt together; or only those that want votes, or have one in a
    snapshot."""
    query = _query().where(Pair.project_id == project.id).order_by(Pair.prompt_id, Pair.id)
    if only_open:
        query = query.where(Pair.state == "open")
    if snapshot:
        digest = project.snapshots.find(snapshot).digest
        members = (
            select(Judgment.pair_id)
            .join(SnapshotMember, SnapshotMember.judgment_id == Judgment.id)
            .join(Snapshot, Snapshot.id == SnapshotMember.snapshot_id)
            .where(Snapshot.project_id == project.id, Snapshot.digest == digest)
        )
        query = query.where(Pair.id.in_(members))
    with project.database.reading() as session:
        for row in session.execute(query.execution_options(yield_per=ROWS)):
            yield _pair(row)


def by_id(project: FeedbackProject, ids: Iterable[int]) -> Mapping[int, StoredPair]:
    """Some pairs of a project by their numbers; those that it does not have are missing."""
    wanted = sorted(set(ids))
    found: dict[int, StoredPair] = {}
    with project.database.reading() as session:
        for start in range(0, len(wanted), ROWS):
            some = Pair.id.in_(wanted[start : start + ROWS])
            for row in session.execute(_query().where(Pair.project_id == project.id, some)):
                found[row[0]] = _pair(row)
    return found


def count(project: FeedbackProject) -> int:
    """How many pairs a project has."""
    with project.database.reading() as session:
        query = select(func.count()).select_from(Pair).filter_by(project_id=project.id)
        return session.scalar(query) or 0


def _query() -> Select[Any]:
    a, b = aliased(Response), aliased(Response)
    answers = (
        column
        for side in (a, b)
        for column in (*(side.id, side.text, side.model, side.sampling, side.source, side.licence),)
    )
    return (
        select(
            *(Pair.id, Pair.prompt_id, Prompt.content, Prompt.source, Prompt.licence),
            *answers,
            *(Pair.kept, GoldAnswer.vote, Pair.wanted, Pair.votes),
        )
        .join(Prompt, Prompt.id == Pair.prompt_id)
        .join(a, a.id == Pair.response_a_id)
        .join(b, b.id == Pair.response_b_id)
        .outerjoin(GoldAnswer, GoldAnswer.pair_id == Pair.id)
    )


def _pair(row: Any) -> StoredPair:
    id_, prompt_id, prompt, source, licence, *rest = row
    a_id, *a = rest[:6]
    b_id, *b = rest[6:12]
    kept, gold, wanted, votes = rest[12:]
    pair = NewPair(prompt, Answer(*a), Answer(*b), source, licence, kept, gold)
    return StoredPair(id_, prompt_id, a_id, b_id, pair, wanted, votes)

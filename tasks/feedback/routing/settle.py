"""What a judge said, kept as its votes, and each pair sent on: to nobody, or to people.

Votes and the way of a pair are one transaction, so a process that is killed leaves both or neither.
A judge has one vote on a pair in each order, for good: its key in the store is made of these.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, and_, exists, func, insert, select, update
from sqlalchemy.orm import Session, aliased

from rlhf_core.errors import DataError
from rlhf_core.judges.judge import Pair as Question
from rlhf_core.judges.judge import Verdict
from rlhf_core.labelling.router import Way
from rlhf_core.redaction import masked
from tasks.feedback.routing.judging import Heard
from tasks.feedback.store import clock
from tasks.feedback.store.content import chunks, digest
from tasks.feedback.store.drawing import set_marks_back
from tasks.feedback.store.records import Answer, NewPair
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import (
    AUDITED,
    HOLD_OUT,
    JUDGE,
    JUDGED,
    MACHINE,
    Annotator,
    BatchPair,
    Judgment,
    Pair,
    Prompt,
    Response,
)

CHUNK = 500
LONGEST_NOTE = 2000  # characters of a judge's reason


class Unjudged(NamedTuple):
    """A pair that nobody has been asked about."""

    id: int
    digest: str
    question: Question


class Counts(NamedTuple):
    """What became of the pairs of a batch."""

    alone: int  # answered by the judge without people
    audited: int  # the judge is sure, and people answer them all the same
    unsure: int  # the judge is not, and people answer them
    unheard: int  # that only people answer: no usable answer of the judge, asked before, held out


def _judged(pair: Any = Pair) -> ColumnElement[bool]:
    return exists().where(Judgment.pair_id == pair.id, Judgment.kind == MACHINE)


def _untouched() -> ColumnElement[bool]:
    """Nobody was asked, nobody voted, and no judge has answered."""
    return and_(Pair.wanted == 0, Pair.votes == 0, Pair.taken == 0, Pair.arm == "", ~_judged())


def _held_out() -> ColumnElement[bool]:
    """Another pair on the same prompt is in the hold-out."""
    other = aliased(Pair)
    return exists().where(other.prompt_id == Pair.prompt_id, other.arm == HOLD_OUT)


def unjudged(project: FeedbackProject, batch: int) -> list[int]:
    """The pairs of a batch that a judge has to answer, by number.

    Prompts that are held out are left to people, since nothing may be trained on them.
    """
    query = (
        select(Pair.id)
        .join(BatchPair, BatchPair.pair_id == Pair.id)
        .where(BatchPair.batch_id == batch, _untouched(), ~_held_out())
    )
    with project.database.reading() as session:
        return list(session.scalars(query.order_by(Pair.id)))


def questions(project: FeedbackProject, pairs: Sequence[int]) -> list[Unjudged]:
    """Pairs as a judge reads them."""
    a, b = aliased(Response), aliased(Response)
    query = (
        select(Pair.id, Pair.digest, Prompt.content, a.text, b.text)
        .join(Prompt, Prompt.id == Pair.prompt_id)
        .join(a, a.id == Pair.response_a_id)
        .join(b, b.id == Pair.response_b_id)
        .where(Pair.id.in_(pairs))
        .order_by(Pair.id)
    )
    with project.database.reading() as session:
        return [Unjudged(row[0], row[1], Question(*row[2:])) for row in session.execute(query)]


def claim(project: FeedbackProject, judge: str) -> None:
    """Make the annotator, if there is none.

    Raises: DataError when people vote under this pseudonym.
    """
    with project.database.writing(project.id) as session:
        _annotator(session, project.id, judge)


def settle(
    project: FeedbackProject,
    judge: str,
    heard: Sequence[tuple[Unjudged, Heard, Way]],
    *,
    source: str,
    wanted: int,
    priority: int,
) -> None:
    """Keep what a judge said, and send the pairs on.

    A pair that somebody has asked people about meanwhile stays with people.

    Args:
        judge: pseudonym of it.
        source: of the votes.
        wanted: votes of people on the pairs that they get; priority: their place in the queue.

    Raises: DataError when people vote under this pseudonym.
    """
    ways = {pair.id: way for pair, _, way in heard}
    with project.database.writing(project.id) as session:
        _keep(session, project, _annotator(session, project.id, judge), heard, source)
        free = set(
            session.scalars(
                select(Pair.id).where(
                    Pair.id.in_(list(ways)), Pair.wanted == 0, Pair.votes == 0, Pair.arm == ""
                )
            )
        )
        alone = [pair for pair in ways if pair in free and ways[pair] == "judge"]
        session.execute(update(Pair).where(Pair.id.in_(alone)).values(arm=JUDGED))
        audited = [pair for pair in ways if pair in free and ways[pair] == "audit"]
        _have_audited(session, project.id, audited, wanted, min(priority, 0))
        unsure = [pair for pair in ways if pair in free and ways[pair] == "unsure"]
        project.content.put(session, _as_asked(session, unsure, wanted, priority))


def ask_people_about_the_rest(
    project: FeedbackProject, batch: int, *, wanted: int, priority: int
) -> int:
    """Put the pairs of a batch that no judge has answered into the queue of people.

    Returns: how many there were.
    """
    query = (
        select(Pair.id)
        .join(BatchPair, BatchPair.pair_id == Pair.id)
        .where(BatchPair.batch_id == batch, _untouched())
        .order_by(Pair.id)
    )
    with project.database.reading() as session:
        pairs = list(session.scalars(query))
    for some in chunks(pairs, CHUNK):
        with project.database.reading() as session:
            asked = _as_asked(session, some, wanted, priority)
        project.content.add(asked)
    return len(pairs)


def counts(project: FeedbackProject, batch: int) -> Counts:
    """What became of the pairs of a batch."""
    judged = _judged().label("judged")
    query = (
        select(Pair.arm, judged, func.count())
        .join(BatchPair, BatchPair.pair_id == Pair.id)
        .where(BatchPair.batch_id == batch)
        .group_by(Pair.arm, judged)
    )
    found = {"alone": 0, "audited": 0, "unsure": 0, "unheard": 0}
    with project.database.reading() as session:
        for arm, heard, number in session.execute(query):
            named = {JUDGED: "alone", AUDITED: "audited"}.get(arm)
            found[named or ("unsure" if heard else "unheard")] += number
    return Counts(**found)


# ---- in a transaction ----


def _annotator(session: Session, project: int, name: str) -> int:
    found = session.scalar(select(Annotator).filter_by(project_id=project, pseudonym=name))
    if found is None:
        found = Annotator(
            project_id=project,
            pseudonym=name,
            role="annotator",
            state="left",  # nobody comes in as a machine
            via=JUDGE,
            created_at=clock.now(),
        )
        session.add(found)
        session.flush()
    if found.via != JUDGE:
        raise DataError(
            f"an annotator of the project is called '{name}', and is no machine: give judge.name "
            "another name"
        )
    return found.id


def _keep(
    session: Session,
    project: FeedbackProject,
    annotator: int,
    heard: Sequence[tuple[Unjudged, Heard, Way]],
    source: str,
) -> None:
    at = clock.now()
    rows: dict[str, dict[str, Any]] = {}
    for pair, said, _ in heard:
        sides: tuple[tuple[str, Verdict], ...] = (("a", said.a_first), ("b", said.b_first))
        for first, verdict in sides:
            if said.opinion is None or verdict.winner is None:
                continue  # both orders or none: half an answer would be one of its side
            key = digest(MACHINE, pair.digest, annotator, first)
            rows[key] = {
                "project_id": project.id,
                "pair_id": pair.id,
                "annotator_id": annotator,
                "key": key,
                "kind": MACHINE,
                "vote": verdict.winner,
                "first": first,
                "margin": 0.0,
                "note": _note(verdict.reason),
                "reason": "",
                "source": source,
                "time": "",
                "at": at,
            }
    for some in chunks(rows, CHUNK):
        query = select(Judgment.key).where(
            Judgment.project_id == project.id, Judgment.key.in_(some)
        )
        there = set(session.scalars(query))
        if new := [rows[key] for key in some if key not in there]:
            session.execute(insert(Judgment.__table__), new)  # type: ignore[arg-type]


def _note(reason: str) -> str:
    return masked(reason)[:LONGEST_NOTE].encode(errors="replace").decode()


def _have_audited(
    session: Session, project: int, pairs: Sequence[int], wanted: int, priority: int
) -> None:
    """Pairs of an audit are asked about before others: the error is known early, and no order of
    the queue decides on which of them it is measured."""
    for some in chunks(pairs, CHUNK):
        session.execute(
            update(Pair)
            .where(Pair.id.in_(some))
            .values(wanted=wanted, priority=priority, state="open", arm=AUDITED)
        )
    if pairs:
        set_marks_back(session, project, priority, min(pairs))


def _as_asked(session: Session, pairs: Sequence[int], wanted: int, priority: int) -> list[NewPair]:
    """Pairs of the store as those that people are to be asked about."""
    a, b = aliased(Response), aliased(Response)
    query = (
        select(Prompt.content, a.text, a.model, b.text, b.model)
        .select_from(Pair)
        .join(Prompt, Prompt.id == Pair.prompt_id)
        .join(a, a.id == Pair.response_a_id)
        .join(b, b.id == Pair.response_b_id)
        .where(Pair.id.in_(pairs))
        .order_by(Pair.id)
    )
    return [
        NewPair(
            row[0], Answer(row[1], row[2]), Answer(row[3], row[4]), wanted=wanted, priority=priority
        )
        for row in session.execute(query)
    ]

"""What an annotator gets next: now and then a control question or a repeat, else a fresh pair.

Pairs come in the order of their priority, then of their number. A search begins behind the mark of
the annotator: no pair before it is free for them. So it takes no longer after 20,000 pairs than
after none. Whatever frees a pair sets marks back.
"""

import random
from typing import NamedTuple

from sqlalchemy import ColumnElement, exists, func, literal, select, tuple_, update
from sqlalchemy.orm import Session

from tasks.feedback.store.records import AssignmentKind, ProjectRules
from tasks.feedback.store.tables import Annotator, Assignment, GoldAnswer, Pair

REPEAT_AFTER = 10  # tasks between a pair and its repeat, at least
REPEAT_WITHIN = 200  # and at most


class Draw(NamedTuple):
    """A pair for an annotator, and how it is shown."""

    pair: int
    kind: AssignmentKind
    first: str


def draw(session: Session, person: Annotator, rules: ProjectRules) -> Draw | None:
    """What comes next; None when no pair is free for this annotator.

    Control questions and repeats come between fresh pairs only, so that the queue has an end.
    """
    fresh = _fresh(session, person)
    if fresh is None:
        return None
    if _now_and_then(rules.gold_every) and (gold := _gold(session, person)) is not None:
        return Draw(gold, "gold", random.choice("ab"))
    if _now_and_then(rules.repeat_every) and (again := _repeat(session, person)) is not None:
        pair, first = again
        return Draw(pair, "repeat", "b" if first == "a" else "a")
    person.mark_priority, person.mark_id = fresh
    return Draw(fresh[1], "fresh", random.choice("ab"))


def count_free(session: Session, person: Annotator, at_most: int) -> int:
    """How many pairs are free for an annotator, counted up to a limit."""
    some = select(Pair.id).where(*_free(person)).limit(at_most).subquery()
    return session.scalar(select(func.count()).select_from(some)) or 0


def set_marks_back(
    session: Session, project_id: int, priority: int, pair_id: int, *, one: bool = False
) -> None:
    """A pair has become free, and perhaps others behind it: searches have to begin before it.

    Args:
        one: no other pair; who had it before need not look again.
    """
    passed = [
        Annotator.project_id == project_id,
        Annotator.mark_id.is_not(None),
        tuple_(Annotator.mark_priority, Annotator.mark_id)
        >= tuple_(literal(priority), literal(pair_id)),
    ]
    if one:
        passed.append(
            ~exists().where(Assignment.annotator_id == Annotator.id, Assignment.pair_id == pair_id)
        )
    session.execute(
        update(Annotator)
        .where(*passed)
        .values(mark_priority=priority, mark_id=pair_id - 1)
        .execution_options(synchronize_session="fetch")
    )


def _now_and_then(every: int) -> bool:
    return bool(every) and random.random() < 1 / every


def _fresh(session: Session, person: Annotator) -> tuple[int, int] | None:
    """Priority and number of the first pair that is free for somebody."""
    query = select(Pair.priority, Pair.id).where(*_free(person))
    found = session.execute(query.order_by(Pair.priority, Pair.id).limit(1)).first()
    if found is not None:
        return found.priority, found.id
    # Whatever is free now, this annotator has had. It need not be looked through again.
    last = session.execute(
        select(Pair.priority, Pair.id)
        .where(Pair.project_id == person.project_id, Pair.state == "open", Pair.taken < Pair.wanted)
        .order_by(Pair.priority.desc(), Pair.id.desc())
        .limit(1)
    ).first()
    if last is not None:
        person.mark_priority, person.mark_id = last.priority, last.id
    return None


def _free(person: Annotator) -> list[ColumnElement[bool]]:
    conditions = [
        Pair.project_id == person.project_id,
        Pair.state == "open",
        Pair.taken < Pair.wanted,
        ~_had(person),
    ]
    if person.mark_id is not None:
        mark = tuple_(literal(person.mark_priority), literal(person.mark_id))
        conditions.append(tuple_(Pair.priority, Pair.id) > mark)
    return conditions


def _had(person: Annotator) -> ColumnElement[bool]:
    return exists().where(Assignment.pair_id == Pair.id, Assignment.annotator_id == person.id)


def _gold(session: Session, person: Annotator) -> int | None:
    """A pair with a known answer that somebody has not had."""
    # There are few known answers and many pairs, so the search goes through the former.
    asked = exists().where(
        Pair.id == GoldAnswer.pair_id,
        Pair.project_id == person.project_id,
        Pair.state != "withdrawn",
    )
    had = exists().where(
        Assignment.pair_id == GoldAnswer.pair_id, Assignment.annotator_id == person.id
    )
    query = select(GoldAnswer.pair_id).where(asked, ~had).order_by(GoldAnswer.pair_id)
    return session.scalar(query.limit(1))


def _repeat(session: Session, person: Annotator) -> tuple[int, str] | None:
    """A pair that somebody voted on a while ago and has had once, and what was on the left."""
    latest = (
        select(Assignment.id, Assignment.pair_id, Assignment.first, Assignment.kind)
        .add_columns(Assignment.state)
        .where(Assignment.annotator_id == person.id)
        .order_by(Assignment.id.desc())
        .limit(REPEAT_WITHIN)
    )
    rows = session.execute(latest).all()
    repeated = {row.pair_id for row in rows if row.kind == "repeat"}
    could = [
        (row.pair_id, row.first)
        for row in rows[REPEAT_AFTER:]
        if row.kind == "fresh" and row.state == "voted" and row.pair_id not in repeated
    ]
    return random.choice(could) if could else None

"""How far a project is: votes an hour, the queue, and the batches that somebody waits for."""

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, case, func, select

from tasks.feedback.admin.people import counts
from tasks.feedback.store import clock
from tasks.feedback.store.database import Database
from tasks.feedback.store.records import CHOICES
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import (
    AUDITED,
    JUDGED,
    MACHINE,
    Annotator,
    Assignment,
    Batch,
    BatchPair,
    Judgment,
    Pair,
)

DAYS, HOURS = 14, 24
BATCHES = 25  # on a page


class Throughput(NamedTuple):
    """Votes that were cast on the page."""

    days: Mapping[date, int]  # the last `DAYS`, oldest first
    hours: Mapping[datetime, int]  # the last `HOURS`, oldest first
    last_hour: int  # in the last 60 minutes
    total: int  # since the beginning, with those that were imported
    imported: int
    people: int  # who voted in the last 60 minutes


class QueueState(NamedTuple):
    """Pairs that are asked about."""

    open: int
    done: int
    withdrawn: int
    leased: int  # on somebody's desk now
    missing: int  # votes until all open pairs are done
    alone: int = 0  # pairs that a machine answers without people
    audited: int = 0  # pairs that it is sure of, and people answer too


class BatchState(NamedTuple):
    """A batch, and how much of it is done."""

    id: int
    name: str
    kind: str
    created: datetime
    waits: bool  # a flow run waits for it
    done: int
    withdrawn: int
    pairs: int
    then: str = ""  # the deployment that it starts
    number: int = 0  # of the round of the loop that it begins
    started: datetime | None = None
    problem: str = ""  # why it has not started what follows
    stopped: bool = False
    sampling: bool = False  # its answers are not all there yet, or that was interrupted

    @property
    def follows(self) -> bool:
        """Whether it is still to start something."""
        return bool(self.then) and self.started is None and not self.stopped


def throughput(project: FeedbackProject) -> Throughput:
    """Votes by hour and day, in UTC."""
    now = clock.now()
    hour = now.replace(minute=0, second=0, microsecond=0)
    first_day = now.date() - timedelta(days=DAYS - 1)
    since = datetime(first_day.year, first_day.month, first_day.day, tzinfo=UTC)
    here = [
        *(Judgment.project_id == project.id, Judgment.kind != MACHINE),
        *(Judgment.vote.in_(CHOICES), counts()),
    ]
    with project.database.reading() as session:
        label = _hour(project.database)
        rows = session.execute(
            select(label, func.count())
            .where(*here, Judgment.kind != "import", Judgment.at >= since)
            .group_by(label)
        ).all()
        last, people = session.execute(
            select(func.count(), func.count(Judgment.annotator_id.distinct())).where(
                *here, Judgment.kind != "import", Judgment.at >= now - timedelta(hours=1)
            )
        ).one()
        total, imported = session.execute(
            select(
                func.count(), func.coalesce(func.sum(case((Judgment.kind == "import", 1))), 0)
            ).where(*here)
        ).one()
    by_hour = {
        datetime.strptime(text, "%Y-%m-%d %H").replace(tzinfo=UTC): count for text, count in rows
    }
    by_day: Counter[date] = Counter()
    for at, count in by_hour.items():
        by_day[at.date()] += count
    days = [first_day + timedelta(days=n) for n in range(DAYS)]
    hours = [hour - timedelta(hours=n) for n in reversed(range(HOURS))]
    return Throughput(
        {day: by_day[day] for day in days},
        {at: by_hour.get(at, 0) for at in hours},
        last,
        total,
        int(imported),
        people,
    )


def _hour(database: Database) -> ColumnElement[Any]:
    if database.is_sqlite:
        return func.strftime("%Y-%m-%d %H", Judgment.at)
    return func.to_char(func.timezone("UTC", Judgment.at), "YYYY-MM-DD HH24")


def queue_state(project: FeedbackProject) -> QueueState:
    """The pairs by state, and how many are on a desk."""
    with project.database.reading() as session:
        rows = session.execute(
            select(Pair.state, func.count(), func.sum(Pair.wanted - Pair.votes))
            .where(Pair.project_id == project.id, Pair.wanted > 0)
            .group_by(Pair.state)
        ).all()
        routed = dict(
            session.execute(
                select(Pair.arm, func.count())
                .where(Pair.project_id == project.id, Pair.arm.in_((JUDGED, AUDITED)))
                .group_by(Pair.arm)
            )
            .tuples()
            .all()
        )
        leased = session.scalar(
            select(func.count())
            .select_from(Assignment)
            .join(Annotator, Annotator.id == Assignment.annotator_id)
            .where(
                Annotator.project_id == project.id,
                Assignment.state == "open",
                Assignment.leased_until > clock.now(),
            )
        )
    states = {state: (count, int(missing or 0)) for state, count, missing in rows}
    return QueueState(
        states.get("open", (0, 0))[0],
        states.get("done", (0, 0))[0],
        states.get("withdrawn", (0, 0))[0],
        leased or 0,
        states.get("open", (0, 0))[1],
        routed.get(JUDGED, 0),
        routed.get(AUDITED, 0),
    )


def batches(project: FeedbackProject, page: int = 0) -> list[BatchState]:
    """A page of batches, newest first."""
    with project.database.reading() as session:
        found = session.scalars(
            select(Batch)
            .filter_by(project_id=project.id)
            .order_by(Batch.id.desc())
            .limit(BATCHES)
            .offset(page * BATCHES)
        ).all()
        rows = session.execute(
            select(BatchPair.batch_id, Pair.state, func.count())
            .join(Pair, Pair.id == BatchPair.pair_id)
            .where(BatchPair.batch_id.in_([batch.id for batch in found]))
            .group_by(BatchPair.batch_id, Pair.state)
        ).all()
        states: dict[int, Counter[str]] = {}
        for id_, state, count in rows:
            states.setdefault(id_, Counter())[state] = count
        return [
            BatchState(
                batch.id,
                batch.name,
                batch.kind,
                batch.created_at,
                bool(batch.flow_run) and batch.resumed_at is None,
                states.get(batch.id, Counter())["done"],
                states.get(batch.id, Counter())["withdrawn"],
                sum(states.get(batch.id, Counter()).values()),
                *_following(batch),
            )
            for batch in found
        ]


def _following(batch: Batch) -> tuple[str, int, datetime | None, str, bool, bool]:
    kept = batch.details
    stopped = bool(kept.get("stopped"))
    return (
        str(kept.get("then", "")),
        int(kept.get("round", 0)),
        None if stopped else batch.resumed_at,
        str(kept.get("problem", "")),
        stopped,
        "then" in kept and "asked" not in kept and batch.resumed_at is None,
    )

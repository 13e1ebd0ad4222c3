"""Batches of pairs that somebody waits for: how far they are, and what people said on them.

A pair is answered when enough people have voted on it. It is given up when nobody is left to ask:
at least two people skipped it, or everybody who is active has seen it. A batch is complete when
enough pairs are answered or given up, or its time is over. Its verdicts are then written down once,
so that whoever asks later, on whatever machine, is told the same, also if votes come in late.

Those are the batches of judges. In a batch whose votes are trained on, the queue says what is
answered, and such a batch is complete in the same sense once everything is in it that was to be.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import exists, func, select, update
from sqlalchemy.orm import Session, aliased

from rlhf_core.errors import DataError
from rlhf_core.judges.judge import Winner
from rlhf_core.settings.judge import PeopleConfig
from tasks.feedback.asking.votes import opened
from tasks.feedback.store import clock
from tasks.feedback.store.database import Database
from tasks.feedback.store.drawing import set_marks_back
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import (
    ASK,
    JUDGE,
    JUDGED,
    MACHINE,
    Annotator,
    Batch,
    BatchPair,
    GoldAnswer,
    Judgment,
    Pair,
)
from tasks.settings import Settings

SKIPS = 2  # by so many people, and a pair is given up
MOST = 500  # ids in one condition


@dataclass(frozen=True)
class Said:
    """What people said on a pair, in the order in which the store has its answers."""

    winner: Winner | None  # None: not enough of them
    votes: int  # that count
    agreed: bool | None  # whether all said the same; None for fewer than two
    notes: str = ""
    skipped: int = 0  # by so many people
    given_up: bool = False


@dataclass(frozen=True)
class Standing:
    """How far a batch is."""

    name: str
    project: str
    pairs: int
    answered: int
    given_up: int
    until: datetime  # then it goes on with what there is
    needed: int  # pairs answered or given up that are enough
    complete: bool
    flow_run: str  # in Prefect, that waits, or that it has started; empty = none
    then: str = ""  # the deployment that it starts once it is complete

    @property
    def waiting(self) -> int:
        """The pairs without a verdict that may get one."""
        return self.pairs - self.answered - self.given_up


def majority(votes: Sequence[str]) -> Winner:
    """What most people said; both_bad is a tie, and so is a draw.

    >>> majority(["a", "a", "b"]), majority(["a", "b"]), majority(["a", "both_bad", "tie"])
    ('a', 'tie', 'tie')
    """
    count = Counter("tie" if vote == "both_bad" else vote for vote in votes)
    if count["a"] > max(count["b"], count["tie"]):
        return "a"
    return "b" if count["b"] > max(count["a"], count["tie"]) else "tie"


# ---- what people said ----


def said_on(
    project: FeedbackProject, pairs: Sequence[int], config: PeopleConfig
) -> dict[int, Said]:
    """What people said on pairs, by their number in the store."""
    with project.database.reading() as session:
        left_out = _left_out(session, project.id, config)
        active = set(
            session.scalars(
                select(Annotator.id).filter_by(
                    project_id=project.id, state="active", role="annotator", via="page"
                )
            )
        )
        votes: dict[int, dict[object, tuple[str, str]]] = defaultdict(dict)
        skips: dict[int, set[int | None]] = defaultdict(set)
        for start in range(0, len(pairs), MOST):
            for row in session.execute(_counting(project.id, pairs[start : start + MOST])):
                if row.annotator_id in left_out:
                    continue
                if row.vote == "skip":
                    skips[row.pair_id].add(row.annotator_id)
                    continue
                # The last word of a person is what counts; a nameless vote is one of its own.
                person = f"unknown {row.id}" if row.annotator_id is None else row.annotator_id
                votes[row.pair_id][person] = (row.vote, row.note)
    return {
        pair: _sum_up(votes[pair], skips[pair] - votes[pair].keys(), active, config)
        for pair in pairs
    }


def _counting(project: int, pairs: Sequence[int]) -> Any:
    later = aliased(Judgment)
    return (
        select(Judgment.id, Judgment.pair_id, Judgment.annotator_id, Judgment.vote, Judgment.note)
        .where(
            Judgment.project_id == project,
            Judgment.pair_id.in_(pairs),
            Judgment.kind.not_in(("repeat", MACHINE)),
            Judgment.vote != "withdrawn",
            ~exists().where(later.replaces_id == Judgment.id),
        )
        .order_by(Judgment.id)
    )


def _sum_up(
    votes: Mapping[object, tuple[str, str]],
    skipped: set[Any],
    active: set[int],
    config: PeopleConfig,
) -> Said:
    words = ["tie" if vote == "both_bad" else vote for vote, _ in votes.values()]
    notes = "; ".join(note for _, note in votes.values() if note)
    enough = len(words) >= config.votes_per_pair
    nobody_left = bool(skipped) and not active - skipped - votes.keys()
    return Said(
        winner=majority(words) if enough else None,
        votes=len(words),
        agreed=len(set(words)) == 1 if len(words) > 1 else None,
        notes=notes,
        skipped=len(skipped),
        given_up=not enough and (len(skipped) >= SKIPS or nobody_left),
    )


def _left_out(session: Session, project: int, config: PeopleConfig) -> set[int]:
    """The annotators whose votes do not count."""
    found: set[int] = set()
    if not config.count_paused:
        found |= set(
            session.scalars(select(Annotator.id).filter_by(project_id=project, state="paused"))
        )
    if config.min_gold > 0:
        later = aliased(Judgment)
        right: dict[int, list[bool]] = defaultdict(list)
        for person, vote, answer in session.execute(
            select(Judgment.annotator_id, Judgment.vote, GoldAnswer.vote)
            .join(GoldAnswer, GoldAnswer.pair_id == Judgment.pair_id)
            .where(
                Judgment.project_id == project,
                Judgment.annotator_id.is_not(None),
                Judgment.kind == "gold",
                Judgment.vote.in_(("a", "b", "tie", "both_bad")),
                ~exists().where(later.replaces_id == Judgment.id),
            )
        ):
            right[person].append(("tie" if vote == "both_bad" else vote) == answer)
        found |= {p for p, told in right.items() if sum(told) < config.min_gold * len(told)}
    return found


# ---- batches ----


def pairs_of(database: Database, batch: int) -> list[int]:
    """The pairs of a batch."""
    with database.reading() as session:
        query = select(BatchPair.pair_id).where(BatchPair.batch_id == batch)
        return list(session.scalars(query.order_by(BatchPair.pair_id)))


def needed(pairs: int, config: PeopleConfig) -> int:
    """How many of the pairs are enough."""
    by_share = -int(-pairs * config.enough // 1)
    return min(by_share, config.enough_pairs) if config.enough_pairs else by_share


def stand(project: FeedbackProject, batch: int) -> Standing:
    """How far a batch is; pairs whose votes do not count are asked about again."""
    with project.database.reading() as session:
        row = session.get_one(Batch, batch)
        config = PeopleConfig.model_validate(row.details["people"])
        name, flow_run, created = row.name, row.flow_run, row.created_at
        closed = "verdicts" in row.details
        trains, kept = row.kind == ASK, dict(row.details)
    if trains:
        return _stand_to_train(project, batch, config, name, flow_run, created, kept)
    pairs = pairs_of(project.database, batch)
    said = said_on(project, pairs, config)
    answered = sum(each.winner is not None for each in said.values())
    given_up = sum(each.given_up for each in said.values())
    until = created + timedelta(days=config.days)
    least = needed(len(pairs), config)
    done = closed or answered + given_up >= least or clock.now() >= until
    if not done:
        _ask_again(project, said, config)
    return Standing(
        name=name,
        project=project.name,
        pairs=len(pairs),
        answered=answered,
        given_up=given_up,
        until=until,
        needed=least,
        complete=done,
        flow_run=flow_run,
    )


def _stand_to_train(
    project: FeedbackProject,
    batch: int,
    config: PeopleConfig,
    name: str,
    flow_run: str,
    created: datetime,
    kept: Mapping[str, Any],
) -> Standing:
    """How far a batch is whose votes are trained on."""
    with project.database.reading() as session:
        rows = session.execute(
            select(Pair.id, Pair.state)
            .join(BatchPair, BatchPair.pair_id == Pair.id)
            .where(BatchPair.batch_id == batch, Pair.arm != JUDGED)  # which nobody is asked about
        ).all()
    said = said_on(project, [row.id for row in rows if row.state == "open"], config)
    states = Counter(row.state for row in rows)
    answered = states["done"] + sum(each.winner is not None for each in said.values())
    given_up = states["withdrawn"] + sum(each.given_up for each in said.values())
    until = created + timedelta(days=config.days)
    least = needed(len(rows), config)
    return Standing(
        name=name,
        project=project.name,
        pairs=len(rows),
        answered=answered,
        given_up=given_up,
        until=until,
        needed=least,
        # Until everything is in it that was to be, nobody knows how much is enough.
        complete=("asked" in kept and answered + given_up >= least) or clock.now() >= until,
        flow_run=flow_run,
        then=str(kept.get("then", "")),
    )


def _ask_again(project: FeedbackProject, said: Mapping[int, Said], config: PeopleConfig) -> None:
    """Ask for more votes where the queue has enough, but of people who do not count."""
    short = {
        pair: config.votes_per_pair - each.votes
        for pair, each in said.items()
        if each.winner is None and not each.given_up
    }
    ids = list(short)
    with project.database.reading() as session:
        full = [
            (row.priority, row.id, row.votes)
            for start in range(0, len(ids), MOST)
            for row in session.execute(
                select(Pair.priority, Pair.id, Pair.votes).where(
                    Pair.id.in_(ids[start : start + MOST]), Pair.state == "done"
                )
            )
        ]
    if full:
        with project.database.writing(project.id) as session:
            values = [
                {"id": id_, "wanted": votes + short[id_], "state": "open"} for _, id_, votes in full
            ]
            session.execute(update(Pair), values)
            set_marks_back(session, project.id, *min(full)[:2])


def waiting(database: Database) -> list[tuple[int, int]]:
    """Project and number of the batches that a suspended flow run waits for."""
    with database.reading() as session:
        query = select(Batch.project_id, Batch.id).where(
            Batch.kind == JUDGE, Batch.flow_run != "", Batch.resumed_at.is_(None)
        )
        return [(row.project_id, row.id) for row in session.execute(query.order_by(Batch.id))]


def followed(database: Database) -> list[tuple[int, int]]:
    """Project and number of the batches that something follows, once, when they are complete.

    Batches of before there was such a thing say nothing of it, and nothing follows them.
    """
    with database.reading() as session:
        query = select(Batch.project_id, Batch.id, Batch.details).where(
            Batch.kind == ASK, Batch.resumed_at.is_(None)
        )
        rows = session.execute(query.order_by(Batch.id)).all()
    return [(row.project_id, row.id) for row in rows if "then" in row.details]


def followed_by(project: FeedbackProject, batch: int, flow_run: str = "") -> None:
    """Note that what follows a batch has begun, or will not."""
    with project.database.writing(project.id) as session:
        row = session.get_one(Batch, batch)
        row.flow_run, row.resumed_at = flow_run, clock.now()
        row.details = {key: value for key, value in row.details.items() if key != "problem"}


def say(project: FeedbackProject, batch: int, problem: str) -> bool:
    """Keep what is in the way of a batch, for people; whether it is something new."""
    if details(project.database, batch).get("problem", "") == problem:
        return False
    with project.database.writing(project.id) as session:
        row = session.get_one(Batch, batch)
        row.details = {**row.details, "problem": problem}
    return True


def wait_in(project: FeedbackProject, name: str, flow_run: str) -> None:
    """Note that a flow run is about to be suspended until a batch is complete."""
    with project.database.writing(project.id) as session:
        session.execute(
            update(Batch)
            .where(Batch.project_id == project.id, Batch.name == name)
            .values(flow_run=flow_run, resumed_at=None)
        )


def resumed(database: Database, batch: int, flow_run: str) -> None:
    """Note that a flow run waits no longer."""
    with database.writing() as session:
        session.execute(
            update(Batch)
            .where(Batch.id == batch, Batch.flow_run == flow_run)
            .values(resumed_at=clock.now())
        )


def details(database: Database, batch: int) -> dict[str, Any]:
    """What is kept with a batch."""
    with database.reading() as session:
        return dict(session.get_one(Batch, batch).details)


def is_asked(project: FeedbackProject, name: str) -> bool:
    """Whether there is a batch of this name with everything in it that was to be."""
    with project.database.reading() as session:
        row = session.scalar(select(Batch).filter_by(project_id=project.id, name=name))
        return row is not None and "asked" in row.details


def keep(project: FeedbackProject, batch: int, more: Mapping[str, Any]) -> None:
    """Keep something with a batch."""
    with project.database.writing(project.id) as session:
        row = session.get_one(Batch, batch)
        row.details = {**row.details, **more}


def annotators(project: FeedbackProject) -> int:
    """How many people may be asked."""
    with project.database.reading() as session:
        query = select(func.count()).select_from(Annotator)
        found = session.scalar(query.filter_by(project_id=project.id, state="active", via="page"))
        return found or 0


def nobody_to_ask(config: PeopleConfig, project: str, settings: Settings) -> str:
    """What is to be done before enough people can judge; empty if there are.

    Args:
        project: of the run, whose people are asked unless the config names another.

    Raises: StoreError for a preference store that cannot be used.
    """
    name, found = config.project or project, 0
    with suppress(DataError), opened(settings) as store:  # there is no store, or no such project
        found = annotators(store.project(name))
    if found >= config.votes_per_pair:
        return ""
    return (
        f"judge.people asks {config.votes_per_pair} about each pair, and the feedback project "
        f"'{name}' has {found} annotators: invite people to {settings.label_public_url} with "
        f"`rlhf feedback invite {name}`"
    )

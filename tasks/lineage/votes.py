"""What the preference store knows of where votes come from, and of who votes."""

from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import aliased

from rlhf_core.data.origins.counts import Origin
from tasks.feedback.store.judgments import Judgment
from tasks.feedback.store.store import FeedbackProject, Store
from tasks.feedback.store.tables import (
    Annotator,
    Consent,
    Pair,
    Project,
    Prompt,
    Response,
    Snapshot,
    SnapshotMember,
)
from tasks.settings import Settings

ROWS = 2000  # fetched at a time


def origins_of(project: FeedbackProject, digest: str) -> Iterator[tuple[str, Origin]]:
    """Where the pairs of a snapshot come from, by the id that their votes have in a training."""
    a, b = aliased(Response), aliased(Response)
    members = (
        select(Judgment.pair_id)
        .join(SnapshotMember, SnapshotMember.judgment_id == Judgment.id)
        .join(Snapshot, Snapshot.id == SnapshotMember.snapshot_id)
        .where(Snapshot.project_id == project.id, Snapshot.digest == digest)
    )
    sides = ((side.source, side.licence, side.model) for side in (a, b))
    query = (
        select(Pair.digest, Prompt.source, Prompt.licence, *(c for side in sides for c in side))
        .join(Prompt, Prompt.id == Pair.prompt_id)
        .join(a, a.id == Pair.response_a_id)
        .join(b, b.id == Pair.response_b_id)
        .where(Pair.project_id == project.id, Pair.id.in_(members))
        .order_by(Pair.digest)
    )
    with project.database.reading() as session:
        for row in session.execute(query.execution_options(yield_per=ROWS)):
            pair, source, licence, *answers = row
            yield (
                pair[:16],
                Origin(
                    _names(source, answers[0], answers[3]),
                    _names(licence, answers[1], answers[4]),
                    _names(answers[2], answers[5]),
                    _names(source),
                    _names(licence),
                ),
            )


def licences_of(project: FeedbackProject) -> dict[str, str]:
    """The licence under which each annotator gives votes, as they agreed to it last."""
    last = (
        select(func.max(Consent.id))
        .join(Annotator, Annotator.id == Consent.annotator_id)
        .where(Annotator.project_id == project.id)
        .group_by(Consent.annotator_id)
    )
    query = (
        select(Annotator.pseudonym, Consent.licence)
        .join(Consent, Consent.annotator_id == Annotator.id)
        .where(Consent.id.in_(last), Consent.licence != "")
        .order_by(Annotator.pseudonym)
    )
    with project.database.reading() as session:
        return {name: licence for name, licence in session.execute(query)}


def _names(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name))


def judgments_of(annotator: str, settings: Settings) -> dict[str, int]:
    """How many judgments an annotator has in the preference store, by project; nothing if there
    is no store here."""
    path = settings.feedback_uri.removeprefix("sqlite:///")
    if path != settings.feedback_uri and not Path(path).is_file():
        return {}
    store = Store.open(settings)
    try:
        query = (
            select(Project.name, func.count())
            .join(Annotator, Annotator.project_id == Project.id)
            .join(Judgment, Judgment.annotator_id == Annotator.id)
            .where(Annotator.pseudonym == annotator)
            .group_by(Project.name)
        )
        with store.database.reading() as session:
            return {name: number for name, number in session.execute(query)}
    finally:
        store.close()

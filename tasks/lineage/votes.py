"""What the preference store knows of where votes come from, and of who votes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Row, Select, func, select
from sqlalchemy.orm import aliased

from rlhf_core.data.origins.counts import Origin
from rlhf_core.errors import DataError
from tasks.feedback.store.store import FeedbackProject, Store
from tasks.feedback.store.tables import (
    JUDGE,
    Annotator,
    Batch,
    BatchPair,
    Consent,
    Judgment,
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
        return {row.pseudonym: row.licence for row in session.execute(query)}


def _names(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name))


def judgments_of(annotator: str, settings: Settings) -> dict[str, int]:
    """How many judgments an annotator has in the preference store, by project; nothing if there
    is no store here.

    Raises: StoreError when it cannot be used.
    """
    query = (
        select(Project.name, func.count().label("judgments"))
        .join(Annotator, Annotator.project_id == Project.id)
        .join(Judgment, Judgment.annotator_id == Annotator.id)
        .where(Annotator.pseudonym == annotator)
        .group_by(Project.name)
    )
    return {row.name: row.judgments for row in _asked(query, settings)}


def verdicts_of(annotator: str, settings: Settings) -> list[tuple[str, str, int]]:
    """The batches in which an annotator was asked as a judge: project, name, and how often the
    annotator judged.

    Raises: DataError when there is no store here; StoreError when it cannot be used.
    """
    query = (
        select(Project.name.label("project"), Batch.name, func.count().label("judgments"))
        .join(Annotator, Annotator.project_id == Project.id)
        .join(Judgment, Judgment.annotator_id == Annotator.id)
        .join(BatchPair, BatchPair.pair_id == Judgment.pair_id)
        .join(Batch, Batch.id == BatchPair.batch_id)
        .where(Annotator.pseudonym == annotator, Batch.kind == JUDGE)
        .group_by(Project.name, Batch.name)
    )
    if not _is_here(settings):
        raise DataError(f"there is no preference store in {settings.home}, where they were kept")
    return [(row.project, row.name, row.judgments) for row in _asked(query, settings)]


def _is_here(settings: Settings) -> bool:
    path = settings.feedback_uri.removeprefix("sqlite:///")
    return path == settings.feedback_uri or Path(path).is_file()


def _asked(query: Select[Any], settings: Settings) -> list[Row[Any]]:
    if not _is_here(settings):
        return []
    store = Store.open(settings)
    try:
        with store.database.reading() as session:
            return list(session.execute(query))
    finally:
        store.close()

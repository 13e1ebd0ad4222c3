"""Which votes a run reads, whatever resumes it.

`data.preferences: {store: PROJECT, snapshot: latest}` means the votes that count when the run
begins. They become a snapshot, which the pipeline's run keeps in a tag: after a crash, an approval
or days of waiting it reads the same votes, however many have come since.
"""

import logging

from rlhf_core.settings.data import LATEST, DataConfig, PreferencesConfig
from tasks.feedback.asking.votes import opened, patiently
from tasks.feedback.store.records import SnapshotInfo
from tasks.record import tags
from tasks.record.record import Record
from tasks.registry.refs import PipelineRun, SnapshotRef
from tasks.settings import Settings

log = logging.getLogger(__name__)


def pin(
    config: DataConfig, run: PipelineRun, record: Record
) -> tuple[DataConfig, SnapshotRef | None]:
    """The settings of the data with the snapshot that this run reads, which is pinned in the run.

    Returns: the settings, and the snapshot; None when the votes are not those of the store.

    Raises: DataError when there is no such project or snapshot, or no vote; StoreError.
    """
    wanted = config.preferences
    if config.source == "simulated" or not wanted.store:
        return config, None
    pinned = record.runs.tags(run.run_id).get(tags.SNAPSHOT)
    if pinned is not None:
        ref = SnapshotRef.parse(pinned)
    else:
        found = patiently(
            lambda: _resolve(wanted, record.settings, by=f"run {run.run_id}"), record.settings
        )
        ref = SnapshotRef(project=wanted.store, digest=found.digest)
        record.add_tags(run.run_id, {tags.SNAPSHOT: ref.uri})
        log.info(
            "the preferences are %s votes of the feedback project %s (snapshot %s)",
            *(f"{found.votes:,}", wanted.store, ref.digest[:16]),
        )
    return _at(config, ref.digest), ref


def unpin(run: PipelineRun, record: Record) -> None:
    """Forget the snapshot of a run that could not use it, so that a resume may read others."""
    if tags.SNAPSHOT in record.runs.tags(run.run_id):
        record.client.delete_tag(run.run_id, tags.SNAPSHOT)


def _at(config: DataConfig, digest: str) -> DataConfig:
    preferences = config.preferences.model_copy(update={"snapshot": digest})
    return config.model_copy(update={"preferences": preferences})


def _resolve(wanted: PreferencesConfig, settings: Settings, by: str) -> SnapshotInfo:
    with opened(settings) as store:
        snapshots = store.project(wanted.store).snapshots
        which = wanted.snapshot or LATEST
        return snapshots.take(by) if which == LATEST else snapshots.find(which)

"""Counts the preferences that are new since the last pipeline run."""

from typing import NamedTuple

from mlflow.entities import Run
from prefect import task
from pydantic import BaseModel, ConfigDict

from rlhf_core.backbone.base_model import ModelConfig
from rlhf_core.stages import prepare
from rlhf_core.stages.prepare import DataConfig, LengthLimits
from tasks.feedback.asking.votes import votes_now
from tasks.record import tags
from tasks.record.record import Record
from tasks.registry.refs import SnapshotRef


class PreferenceCount(BaseModel):
    """Preferences (rows): the current number, and that of the last finished pipeline run."""

    model_config = ConfigDict(frozen=True)

    now: int
    before: int
    last_run: str  # its name; empty if there is none
    votes: str = ""  # a digest of those of the preference store

    @property
    def new(self) -> int:
        """The number of new preferences."""
        return self.now - self.before


@task(name="count-preferences", task_run_name="count preferences")
def count_preferences(
    config: DataConfig, model: ModelConfig, limits: LengthLimits, *, project: str, seed: int
) -> PreferenceCount:
    """Read the data as the pipeline would, and compare the count with its last finished run.

    Training and evaluation rows count; dropped rows, known answers and the votes of a judge that is
    a machine do not: people have not said more.

    Raises: ConfigError or DataError, as the data stage does.
    """
    record = Record.open()
    with votes_now(config, record.settings) as (votes, there):
        validation = prepare.inspect(config, model, limits, seed, snapshot=votes)
    found = validation.tables["preferences"]
    last = record.runs.last_pipeline(project)
    return PreferenceCount(
        now=found.train + found.eval - validation.known_answers - validation.machine_votes,
        before=0 if last is None else _preferences_of(record, last),
        last_run="" if last is None else last.info.run_name,
        votes="" if there is None else there.digest,
    )


class Called(NamedTuple):
    """The run of the pipeline that a flow run has called."""

    run_id: str
    votes: str  # the digest of the snapshot that it reads; empty = it reads none


def called_by(flow_run: str, project: str) -> Called | None:
    """The pipeline that a flow run has begun, before it was stopped too."""
    record = Record.open(patient=True)
    experiment = record.client.get_experiment_by_name(project)
    if experiment is None or not flow_run:
        return None
    found = record.runs.called_by(experiment.experiment_id, flow_run)
    if found is None:
        return None
    pinned = found.data.tags.get(tags.SNAPSHOT, "")
    return Called(found.info.run_id, SnapshotRef.parse(pinned).digest if pinned else "")


def _preferences_of(record: Record, pipeline: Run) -> int:
    stages = record.runs.stages(pipeline.info.experiment_id, pipeline.info.run_id, "prepare")
    if not stages:
        return 0
    rows = stages[-1].data.metrics
    votes = sum(int(rows[f"{tags.SUMMARY}preferences_{split}"]) for split in ("train", "eval"))
    nobodys = sum(rows.get(f"{tags.SUMMARY}{of}", 0) for of in ("known_answers", "machine_votes"))
    return votes - int(nobodys)

"""Counts the preferences that are new since the last pipeline run."""

from mlflow.entities import Run
from prefect import task
from pydantic import BaseModel, ConfigDict

from rlhf_core.backbone.base_model import ModelConfig
from rlhf_core.stages import prepare
from rlhf_core.stages.prepare import DataConfig, LengthLimits
from tasks.feedback.asking.votes import votes_now
from tasks.record import tags
from tasks.record.record import Record


class PreferenceCount(BaseModel):
    """Preferences (rows): the current number, and that of the last finished pipeline run."""

    model_config = ConfigDict(frozen=True)

    now: int
    before: int
    last_run: str  # its name; empty if there is none

    @property
    def new(self) -> int:
        """The number of new preferences."""
        return self.now - self.before


@task(name="count-preferences", task_run_name="count preferences")
def count_preferences(
    config: DataConfig, model: ModelConfig, limits: LengthLimits, *, project: str, seed: int
) -> PreferenceCount:
    """Read the data as the pipeline would, and compare the count with its last finished run.

    Training and evaluation rows count; dropped rows, and known answers, which are nobody's votes,
    do not.

    Raises: ConfigError or DataError, as the data stage does.
    """
    record = Record.open()
    with votes_now(config, record.settings) as (votes, _):
        validation = prepare.inspect(config, model, limits, seed, snapshot=votes)
    found = validation.tables["preferences"]
    last = record.runs.last_pipeline(project)
    return PreferenceCount(
        now=found.train + found.eval - validation.known_answers,
        before=0 if last is None else _preferences_of(record, last),
        last_run="" if last is None else last.info.run_name,
    )


def _preferences_of(record: Record, pipeline: Run) -> int:
    stages = record.runs.stages(pipeline.info.experiment_id, pipeline.info.run_id, "prepare")
    if not stages:
        return 0
    rows = stages[-1].data.metrics
    votes = sum(int(rows[f"{tags.SUMMARY}preferences_{split}"]) for split in ("train", "eval"))
    return votes - int(rows.get(f"{tags.SUMMARY}known_answers", 0))

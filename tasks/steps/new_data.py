"""How much there is to learn from that the last pipeline did not know."""

from mlflow import MlflowClient
from mlflow.entities import Run
from prefect import task
from pydantic import BaseModel, ConfigDict

from rlhf_core.backbone.models import ModelConfig
from rlhf_core.stages import prepare
from rlhf_core.stages.prepare import DataConfig, LengthLimits
from tasks.record.tracking import connect
from tasks.settings import read_settings

# Of the runs with stages, whole pipelines alone name a policy.
_PIPELINES = (
    "attributes.status = 'FINISHED' and tags.stage = 'pipeline' "
    "and tags.`output.policy` LIKE 'models:/%'"
)


class PreferenceCount(BaseModel):
    """Preferences there are now, and those that the last finished pipeline had, rows each."""

    model_config = ConfigDict(frozen=True)

    now: int
    before: int
    last_run: str  # its name; empty when there was none

    @property
    def new(self) -> int:
        """How many have come since."""
        return self.now - self.before


@task(name="count-preferences", task_run_name="count preferences")
def count_preferences(
    config: DataConfig, model: ModelConfig, limits: LengthLimits, *, project: str, seed: int
) -> PreferenceCount:
    """Read the data as the pipeline would, and hold them against those of its last finished run.

    Both sides of the split count; rows that are dropped do not.

    Raises: ConfigError or DataError, as the data stage does.
    """
    found = prepare.inspect(config, model, limits, seed).tables["preferences"]
    client = connect(read_settings())
    last = _last_pipeline(client, project)
    return PreferenceCount(
        now=found.train + found.eval,
        before=0 if last is None else _preferences_of(client, last),
        last_run="" if last is None else last.info.run_name,
    )


def _last_pipeline(client: MlflowClient, project: str) -> Run | None:
    experiment = client.get_experiment_by_name(project)
    if experiment is None:
        return None
    newest = ["attributes.start_time DESC"]
    return next(iter(_search(client, experiment.experiment_id, _PIPELINES, newest)), None)


def _preferences_of(client: MlflowClient, pipeline: Run) -> int:
    stage = f"tags.stage = 'prepare' and tags.`mlflow.parentRunId` = '{pipeline.info.run_id}'"
    found = [run.data.metrics for run in _search(client, pipeline.info.experiment_id, stage, [])]
    return sum(
        int(rows[f"summary/preferences_{split}"]) for rows in found for split in ("train", "eval")
    )


def _search(client: MlflowClient, experiment: str, condition: str, order: list[str]) -> list[Run]:
    return list(client.search_runs([experiment], condition, order_by=order, max_results=1))

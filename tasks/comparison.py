"""Two pipeline runs side by side: the settings that differ and the metrics of every stage.

Reads MLflow and changes nothing.
"""

import json
from collections.abc import Iterator, Mapping
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Run
from pydantic import BaseModel, ConfigDict, computed_field

from tasks.runs import PIPELINE, find_run, search
from tasks.settings import Settings
from tasks.stage import run_url
from tasks.tracking import connect


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunFacts(_Record):
    """Which run, how it ended, and its page in MLflow."""

    run_id: str
    name: str
    status: str
    url: str


class ParamRow(_Record):
    """A setting that the runs do not share; empty where a run does not have it."""

    stage: str
    name: str
    first: str
    second: str


class MetricRow(_Record):
    """The last value of a metric in each run; None where a run does not have it."""

    stage: str
    name: str
    first: float | None
    second: float | None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def difference(self) -> float | None:
        """Second minus first."""
        if self.first is None or self.second is None:
            return None
        return self.second - self.first


class RunComparison(_Record):
    """What `compare` found."""

    runs: tuple[RunFacts, RunFacts]
    params: tuple[ParamRow, ...]
    metrics: tuple[MetricRow, ...]
    url: str


def compare(first: str, second: str, *, settings: Settings) -> RunComparison:
    """Compare two pipeline runs, each named by its id, the start of its id, or its name.

    Raises:
        UserError: no run, or more than one, answers to a name.
    """
    client = connect(settings)
    runs = (find_run(client, first), find_run(client, second))
    return RunComparison(
        runs=(_facts(runs[0], settings), _facts(runs[1], settings)),
        params=tuple(_params(*runs)),
        metrics=tuple(_metrics(_stages(client, runs[0]), _stages(client, runs[1]))),
        url=_comparison_url(runs, settings),
    )


def _facts(run: Run, settings: Settings) -> RunFacts:
    info = run.info
    url = run_url(info.run_id, info.experiment_id, settings)
    return RunFacts(run_id=info.run_id, name=info.run_name, status=info.status, url=url)


def _stages(client: MlflowClient, run: Run) -> dict[str, Run]:
    """The stages of a run by name, in the order in which they ran; of two the later one."""
    condition = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    children = sorted(
        search(client, [run.info.experiment_id], condition), key=lambda c: c.info.start_time
    )
    stages = {child.data.tags.get("stage", child.info.run_name): child for child in children}
    return {PIPELINE: run, **stages}


def _params(first: Run, second: Run) -> Iterator[ParamRow]:
    """Settings whose values differ; the run of the pipeline has all of them, as `section.name`."""
    for name in _either(first.data.params, second.data.params):
        values = (first.data.params.get(name, ""), second.data.params.get(name, ""))
        if values[0] != values[1]:
            section, _, key = name.rpartition(".")
            yield ParamRow(stage=section, name=key, first=values[0], second=values[1])


def _metrics(first: Mapping[str, Run], second: Mapping[str, Run]) -> Iterator[MetricRow]:
    for stage in _either(first, second):
        values = [runs[stage].data.metrics if stage in runs else {} for runs in (first, second)]
        for name in sorted(_either(*values)):
            left, right = (side.get(name) for side in values)
            yield MetricRow(stage=stage, name=name, first=left, second=right)


def _either(first: Mapping[str, object], second: Mapping[str, object]) -> list[str]:
    """The keys of both, in order, each once."""
    return list({**first, **second})


def _comparison_url(runs: tuple[Run, Run], settings: Settings) -> str:
    ids = [run.info.run_id for run in runs]
    experiments = list(dict.fromkeys(run.info.experiment_id for run in runs))
    query = f"runs={quote(json.dumps(ids))}&experiments={quote(json.dumps(experiments))}"
    return f"{settings.mlflow_public_url}/#/compare-runs?{query}"

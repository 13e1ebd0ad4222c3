"""Compares two pipeline runs: settings, stages and the metrics of every stage.

It reads MLflow and changes nothing.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple
from urllib.parse import quote

from mlflow.entities import Run
from pydantic import BaseModel, ConfigDict, computed_field

from tasks.record import tags
from tasks.record.describe import run_url
from tasks.record.record import Record
from tasks.settings import Settings

EVALUATION = "evaluation"
LOW, HIGH = "_low", "_high"  # suffixes of the metrics for the bounds of a metric


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunFacts(_Row):
    """A run: its name, status, code, and page in MLflow."""

    run_id: str
    name: str
    status: str
    code: str
    url: str


class ParamRow(_Row):
    """A setting in each run; empty if a run does not have it."""

    stage: str
    name: str
    first: str
    second: str


class StageRow(_Row):
    """The status of a stage in each run; None if a run does not have it."""

    stage: str
    first: str | None
    second: str | None


class MetricRow(_Row):
    """The last value of a metric in each run; None if a run does not have it."""

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

    @property
    def differs(self) -> bool:
        """Whether the runs have different values; NaN equals NaN."""
        if self.first is None or self.second is None:
            return self.first is not self.second
        both_nan = math.isnan(self.first) and math.isnan(self.second)
        return self.first != self.second and not both_nan


class Value(NamedTuple):
    """A metric, with its interval if it has one."""

    value: float
    low: float | None = None
    high: float | None = None


class Measure(NamedTuple):
    """A metric with its bounds in each run; None if a run does not have it."""

    stage: str
    name: str
    first: Value | None
    second: Value | None
    difference: float | None
    differs: bool  # in value or bounds

    @property
    def clear(self) -> bool:
        """Whether both have an interval, and the two do not overlap."""
        if self.first is None or self.second is None:
            return False
        (_, a, b), (_, c, d) = self.first, self.second
        if a is None or b is None or c is None or d is None:
            return False
        return a < b and c < d and (b < c or d < a)

    @property
    def relative(self) -> float:
        """The difference as a share of the larger value, from 0 to 2; 0 if that is unknown."""
        if self.first is None or self.second is None or self.difference is None:
            return 0.0
        largest = max(abs(self.first.value), abs(self.second.value))
        share = abs(self.difference) / largest if largest else 0.0
        return share if math.isfinite(share) else 0.0


class RunComparison(_Row):
    """The result of `compare`."""

    runs: tuple[RunFacts, RunFacts]
    params: tuple[ParamRow, ...]  # those that differ
    same_params: tuple[ParamRow, ...]
    stages: tuple[StageRow, ...]
    metrics: tuple[MetricRow, ...]
    url: str

    def measures(self) -> list[Measure]:
        """The metrics, each with its bounds."""
        rows = {(row.stage, row.name): row for row in self.metrics}
        bounds = {(stage, name + end) for stage, name in rows for end in (LOW, HIGH)}
        return [
            _measure(
                row, [rows[key] for end in (LOW, HIGH) if (key := (stage, name + end)) in rows]
            )
            for (stage, name), row in rows.items()
            if (stage, name) not in bounds
        ]

    def differing_measures(self) -> list[Measure]:
        """The metrics that differ, each once, of the stages that both runs have.

        The run of the pipeline repeats the final metrics of its evaluation, which are left out.
        """
        shared = {row.stage for row in self.stages if None not in (row.first, row.second)}
        evaluated = {row.name for row in self.metrics if row.stage == EVALUATION}
        return [
            measure
            for measure in self.measures()
            if measure.differs
            and measure.stage in shared
            and not (
                measure.stage == tags.PIPELINE and f"{tags.SUMMARY}{measure.name}" in evaluated
            )
        ]

    def groups(self, measures: Iterable[Measure]) -> dict[str, list[Measure]]:
        """Measures by stage. What differs most is first.

        In a stage: what differs clearly, then the rest, each by its relative difference. Stages in
        which something differs clearly are before the others, each in the order of the pipeline.
        """
        found: dict[str, list[Measure]] = {row.stage: [] for row in self.stages}
        for measure in measures:
            found.setdefault(measure.stage, []).append(measure)
        for rows in found.values():
            rows.sort(key=lambda row: (-row.clear, -row.relative))  # keeps the order of equals
        ordered = sorted(found.items(), key=lambda group: not any(row.clear for row in group[1]))
        return {stage: rows for stage, rows in ordered if rows}

    def differing_stages(self) -> list[StageRow]:
        """The stages that only one run has, or whose status differs."""
        return [row for row in self.stages if row.first != row.second]


def _measure(row: MetricRow, bounds: list[MetricRow]) -> Measure:
    first, second = row.first, row.second
    return Measure(
        stage=row.stage,
        name=row.name,
        first=None if first is None else Value(first, *(bound.first for bound in bounds)),
        second=None if second is None else Value(second, *(bound.second for bound in bounds)),
        difference=row.difference,
        differs=any(part.differs for part in (row, *bounds)),
    )


def compare(first: str, second: str, *, settings: Settings) -> RunComparison:
    """Compare two pipeline runs, each given by its id, a prefix of its id, or its name.

    Raises:
        UserError: no run, or more than one, matches.
    """
    record = Record.open(settings)
    runs = (record.runs.pipeline(first), record.runs.pipeline(second))
    stages = (_stages(record, runs[0]), _stages(record, runs[1]))
    params = list(_params(*runs))
    return RunComparison(
        runs=(_facts(runs[0], settings), _facts(runs[1], settings)),
        params=tuple(row for row in params if row.first != row.second),
        same_params=tuple(row for row in params if row.first == row.second),
        stages=tuple(_stage_rows(*stages)),
        metrics=tuple(_metrics(record, *stages)),
        url=_comparison_url(runs, settings),
    )


def _facts(run: Run, settings: Settings) -> RunFacts:
    info, run_tags = run.info, run.data.tags
    release, commit = (
        run_tags.get(name, "unknown") for name in (tags.CODE_VERSION, tags.GIT_COMMIT)
    )
    changed = " with changes" if run_tags.get(tags.GIT_DIRTY) == tags.flag(True) else ""
    return RunFacts(
        run_id=info.run_id,
        name=info.run_name,
        status=info.status,
        code=f"release {release}, commit {commit[:12]}{changed}",
        url=run_url(info.run_id, info.experiment_id, settings),
    )


def _stages(record: Record, run: Run) -> dict[str, Run]:
    """The stages of a run by name, in the order in which they ran; the last one of each name."""
    children = record.runs.stages(run.info.experiment_id, run.info.run_id)
    stages = {child.data.tags.get(tags.STAGE, child.info.run_name): child for child in children}
    return {tags.PIPELINE: run, **stages}


def _params(first: Run, second: Run) -> Iterator[ParamRow]:
    """All settings; the pipeline's run has them as `section.name`."""
    for name in _either(first.data.params, second.data.params):
        section, _, key = name.rpartition(".")
        left, right = (run.data.params.get(name, "") for run in (first, second))
        yield ParamRow(stage=section, name=key, first=left, second=right)


def _stage_rows(first: Mapping[str, Run], second: Mapping[str, Run]) -> Iterator[StageRow]:
    for stage in _either(first, second):
        left, right = (
            runs[stage].info.status if stage in runs else None for runs in (first, second)
        )
        yield StageRow(stage=stage, first=left, second=right)


def _metrics(
    record: Record, first: Mapping[str, Run], second: Mapping[str, Run]
) -> Iterator[MetricRow]:
    for stage in _either(first, second):
        values = [
            _metrics_of(record, runs[stage]) if stage in runs else {} for runs in (first, second)
        ]
        for name in sorted(_either(*values)):
            left, right = (side.get(name) for side in values)
            yield MetricRow(stage=stage, name=name, first=left, second=right)


def _metrics_of(record: Record, run: Run) -> dict[str, float]:
    """The last values of a run; for a cached stage, with those of the run it was reused from.

    A cached stage itself has only final metrics: its missing curves would look like a difference.
    """
    found = dict(run.data.metrics)
    if source := run.data.tags.get(tags.CACHED_FROM):
        original = record.runs.find(source)
        if original is not None:  # it was not deleted permanently
            found = {**original.data.metrics, **found}
    return found


def _either(first: Mapping[str, object], second: Mapping[str, object]) -> list[str]:
    """The keys of both mappings, in order, each once."""
    return list({**first, **second})


def _comparison_url(runs: tuple[Run, Run], settings: Settings) -> str:
    ids = [run.info.run_id for run in runs]
    experiments = list(dict.fromkeys(run.info.experiment_id for run in runs))
    query = f"runs={quote(json.dumps(ids))}&experiments={quote(json.dumps(experiments))}"
    return f"{settings.mlflow_public_url}/#/compare-runs?{query}"

"""The over-optimisation chart of pipeline runs, from what their stages logged to MLflow.

It reads and changes nothing. A run is a path: what its policy gained over SFT, iteration by
iteration, in standard deviations of SFT answers. With a monitor the points are the monitor's, on
held-out prompts, with the held-out reward model; without one they are the means of the roll-outs on
the training prompts, of which the first is SFT. The last point, numbered one beyond the last
iteration, is the final policy as the evaluation measured it.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath

import pandas as pd
from mlflow.entities import Run

from rlhf_core.errors import UserError
from rlhf_core.evaluation.chart import Chart, draw
from rlhf_core.evaluation.overoptimisation import Measure, Path, Point
from rlhf_core.functional.interval import Interval
from tasks.history.comparison import EVALUATION
from tasks.record import tags
from tasks.record.record import Record
from tasks.settings import Settings

_Z = 1.96  # of a 95 % interval
_KL, _SCORE = "objective/kl", "objective/score"
_MONITORED: Mapping[Measure, str] = {
    "proxy": "monitor/proxy_gain",
    "held_out": "monitor/held_out_gain",
}
_MONITOR_KL, _MONITOR_KL_ERROR = "monitor/kl", "monitor/kl_error"
_BEST_OF_N = "best_of_n/"
_MEASURES: Mapping[Measure, str] = {"proxy": "proxy_reward", "truth": "true_reward"}


def overoptimisation(names: Sequence[str], *, settings: Settings) -> Chart:
    """The chart of pipeline runs, each given by its id, a prefix of its id, or its name.

    Raises:
        UserError: no run, or more than one, matches a name; a run has no on-policy stage.
    """
    record = Record.open(settings)
    runs = [record.runs.pipeline(name) for name in names]
    charts = [chart_of(record, run) for run in {run.info.run_id: run for run in runs}.values()]
    for chart in charts:
        if not chart.of("on_policy"):
            raise UserError(
                f"the run {chart.title} has no iterations to draw: the chart needs a policy that "
                "was trained with ppo, rloo or grpo"
            )
    budgets = {chart.kl_budget for chart in charts}
    return Chart(
        title=", ".join(dict.fromkeys(chart.title for chart in charts)),
        paths=tuple(path for chart in charts for path in chart.paths),
        kl_budget=budgets.pop() if len(budgets) == 1 else 0.0,
    )


def chart_of(record: Record, run: Run) -> Chart:
    """The chart of a run: its policy, if it was trained in iterations, and best-of-n."""
    name, stages = run.info.run_name, _stages(record, run)
    evaluation = stages.get(EVALUATION)
    paths, budget = list[Path](), 0.0
    policy = next((stage for stage in stages if _KL in stages[stage].data.metrics), None)
    if policy is not None:
        paths.append(_on_policy(record, name, stages[policy], evaluation))
        budget = float(run.data.params.get(f"{policy}.kl_budget", 0))
    if evaluation is not None:
        paths += _best_of_n(record, name, evaluation)
    return Chart(title=name, paths=tuple(paths), kl_budget=budget)


def write_chart(chart: Chart, picture: FilePath) -> tuple[FilePath, FilePath]:
    """Draw a chart into a file, and write its points beside it, as .csv.

    Raises:
        UserError: the picture has a suffix that is no kind of picture.
    """
    figure = draw([chart])
    kinds = figure.canvas.get_supported_filetypes()
    if picture.suffix.removeprefix(".").lower() not in kinds:
        raise UserError(
            f"{picture} is no name of a picture: give it one of the endings "
            f"{', '.join(sorted(kinds))}"
        )
    picture.parent.mkdir(parents=True, exist_ok=True)
    table = picture.with_suffix(".csv")
    pd.DataFrame(chart.rows()).to_csv(table, index=False)
    figure.savefig(picture, dpi=100)
    return picture, table


def _stages(record: Record, run: Run) -> dict[str, Run]:
    """The stages of a run by name; one that was reused is the run that computed it."""
    found = {}
    for stage in record.runs.stages(run.info.experiment_id, run.info.run_id):
        source = stage.data.tags.get(tags.CACHED_FROM)
        computed = record.runs.find(source) if source else stage
        found[stage.data.tags.get(tags.STAGE, "")] = computed or stage
    return found


def _on_policy(record: Record, name: str, policy: Run, evaluation: Run | None) -> Path:
    monitored = _MONITOR_KL in policy.data.metrics
    points = _monitored(record, policy) if monitored else _rolled_out(record, policy)
    final = None if evaluation is None else _evaluated(evaluation, points[-1].number + 1)
    if final is not None:
        points.append(final)
    return Path(name=name, kind="on_policy", points=tuple(points), chosen=points[-1].number)


def _monitored(record: Record, policy: Run) -> list[Point]:
    kls, errors = (_history(record, policy, name) for name in (_MONITOR_KL, _MONITOR_KL_ERROR))
    gains = {measure: _history(record, policy, name) for measure, name in _MONITORED.items()}
    return [
        Point(
            number=step,
            kl=_around(kl, errors.get(step, 0.0)),
            gains={
                measure: _around(values[step], 0.0)
                for measure, values in gains.items()
                if step in values
            },
        )
        for step, kl in sorted(kls.items())
    ]


def _rolled_out(record: Record, policy: Run) -> list[Point]:
    kls, scores = (_history(record, policy, name) for name in (_KL, _SCORE))
    first = scores[min(scores)]
    return [
        Point(
            number=step,
            kl=_around(kl, 0.0),
            gains={"proxy": _around(scores[step] - first, 0.0)} if step in scores else {},
        )
        for step, kl in sorted(kls.items())
    ]


def _evaluated(evaluation: Run, number: int) -> Point | None:
    """The final policy as it was evaluated; None if its KL is unknown."""
    kl = _measured(evaluation, "policy/kl")
    if kl is None:
        return None
    gains: dict[Measure, Interval] = {}
    for measure, name in _MEASURES.items():
        ours, theirs = (_measured(evaluation, f"{arm}/{name}") for arm in ("policy", "sft"))
        if ours is not None and theirs is not None:
            gains[measure] = _difference(ours, theirs)
    return Point(number=number, kl=kl, gains=gains)


def _best_of_n(record: Record, name: str, evaluation: Run) -> list[Path]:
    kls = _history(record, evaluation, f"{_BEST_OF_N}kl")
    gains: dict[int, dict[Measure, Interval]] = {n: {} for n in kls}
    for measure in _MEASURES:
        base = f"{_BEST_OF_N}{measure}_gain"
        value, low, high = (
            _history(record, evaluation, base + end) for end in ("", "_low", "_high")
        )
        for n in value:
            gains[n][measure] = Interval(value[n], low[n], high[n])
    points = [Point(number=n, kl=_around(kl, 0.0), gains=gains[n]) for n, kl in sorted(kls.items())]
    return [Path(name=name, kind="best_of_n", points=tuple(points))] if points else []


def _measured(run: Run, name: str) -> Interval | None:
    """A final metric with its bounds."""
    metrics = run.data.metrics
    found = [metrics.get(f"{tags.SUMMARY}{name}{end}") for end in ("", "_low", "_high")]
    value, low, high = found
    return None if value is None or low is None or high is None else Interval(value, low, high)


def _difference(ours: Interval, theirs: Interval) -> Interval:
    """Of two means that are taken as independent; on the same prompts that is conservative."""
    value = ours.value - theirs.value
    down = math.hypot(ours.value - ours.low, theirs.high - theirs.value)
    up = math.hypot(ours.high - ours.value, theirs.value - theirs.low)
    return Interval(value, value - down, value + up)


def _around(value: float, error: float) -> Interval:
    """A value with the interval of its standard error; a point when that was not logged."""
    return Interval(value, value - _Z * error, value + _Z * error)


def _history(record: Record, run: Run, name: str) -> dict[int, float]:
    """The values of a metric by step; the last one where a step was logged again."""
    if name not in run.data.metrics:
        return {}
    return {m.step: m.value for m in record.client.get_metric_history(run.info.run_id, name)}

"""Records the results of a sweep: a table, a plot and a page."""

from typing import Any, Self

import pandas as pd
from pydantic import BaseModel, ConfigDict

from rlhf_core import figures
from rlhf_core.evaluation.scorecard import Scorecard
from rlhf_core.functional.interval import Interval
from rlhf_core.types import Report
from tasks.prefect.ui import prefect_link_lines
from tasks.record.describe import run_url
from tasks.record.record import Record
from tasks.record.stage import open_stage
from tasks.registry.refs import ModelRef, PipelineRun
from tasks.settings import Settings


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class SweepPoint(_Frozen):
    """One point of a sweep: its settings and seed."""

    values: dict[str, Any]
    seed: int

    @property
    def setting(self) -> str:
        """The settings without the seed, as `kl_coef=0.05, epochs=2`."""
        return ", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in self.values.items()) or "as is"

    @property
    def label(self) -> str:
        """The settings with the seed."""
        return f"{self.setting}, seed {self.seed}"


class Outcome(_Frozen):
    """The result of a point, or the problem that stopped it."""

    point: SweepPoint
    run_id: str = ""
    policy: ModelRef | None = None
    kl: Interval | None = None  # nats per sequence to SFT
    reward: Interval | None = None  # the true reward if it is known, else the reward model's
    is_true: bool = False
    win_rate: Interval | None = None  # over SFT
    problem: str = ""

    @classmethod
    def of(
        cls, point: SweepPoint, scorecard: Scorecard, policy: ModelRef, run: PipelineRun
    ) -> Self:
        """The numbers of a scorecard that a sweep compares."""
        arm, match = scorecard.arm("policy"), scorecard.comparison("policy", "sft")
        assert arm is not None
        return cls(
            point=point,
            run_id=run.run_id,
            policy=policy,
            kl=arm.kl,
            reward=arm.true_reward or arm.proxy_reward,
            is_true=arm.true_reward is not None,
            win_rate=match.win_rate if match else None,
        )


def record_sweep(outcomes: list[Outcome], run: PipelineRun) -> str:
    """Store table, plot and page with the run of the sweep.

    Returns: the page, as Markdown.
    """
    done = [outcome for outcome in outcomes if not outcome.problem]
    name = "true reward" if all(outcome.is_true for outcome in done) else "reward model"
    rows = [_row(outcome) for outcome in outcomes]
    record = Record.open(patient=True)
    with open_stage("frontier", record=record, config=_Frozen(), run=run, inputs={}) as stage:
        stage.record(
            Report(
                tables={"frontier": pd.DataFrame(rows)},
                figures={"frontier": figures.frontier(_points(done), name)},
            )
        )
    plot = run_url(stage.run_id, run.experiment_id, record.settings)
    text = _page(outcomes, name, run, plot, record.settings)
    record.write_page(run.run_id, text)
    return text


def _points(outcomes: list[Outcome]) -> dict[str, list[tuple[float, float]]]:
    """KL and reward of each seed, by setting."""
    found: dict[str, list[tuple[float, float]]] = {}
    for outcome in outcomes:
        if outcome.kl is not None and outcome.reward is not None:
            place = (outcome.kl.value, outcome.reward.value)
            found.setdefault(outcome.point.setting, []).append(place)
    return found


def _row(outcome: Outcome) -> dict[str, Any]:
    numbers = {"kl": outcome.kl, "reward": outcome.reward, "win_rate": outcome.win_rate}
    return {
        **outcome.point.values,
        "seed": outcome.point.seed,
        **{name: None if i is None else round(i.value, 4) for name, i in numbers.items()},
        "policy": "" if outcome.policy is None else outcome.policy.uri,
        "run": outcome.run_id,
        "problem": outcome.problem,
    }


def _page(
    outcomes: list[Outcome], name: str, run: PipelineRun, plot: str, settings: Settings
) -> str:
    lines = [
        f"# {run.project}: sweep of {len(outcomes)} points",
        "",
        f"| setting | seed | KL to SFT (nats) | {name} | win rate over SFT | policy |",
        "|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        cells = [_cell(i) for i in (outcome.kl, outcome.reward, outcome.win_rate)]
        last = outcome.problem or f"`{outcome.policy.uri if outcome.policy else ''}`"
        point = outcome.point
        lines.append(f"| {point.setting} | {point.seed} | {' | '.join(cells)} | {last} |")
    url = run_url(run.run_id, run.experiment_id, settings)
    lines += ["", f"- All runs: {url}", f"- Plot (`figures/frontier.png`): {plot}"]
    return "\n".join([*lines, *prefect_link_lines(settings)])


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"

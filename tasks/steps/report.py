"""The closing report of a pipeline: one page for a person, and the key numbers on the parent run.

The numbers go to the parent run because that is where runs are compared in MLflow.
"""

import time
from collections.abc import Mapping

from mlflow.entities import Metric
from prefect import task
from prefect.artifacts import create_markdown_artifact

from rlhf_core.evaluation.gates import RewardQuality, Verdict
from rlhf_core.functional.ranking import Interval
from rlhf_core.stages.evaluation import Arm, EvaluationReport, Scorecard
from tasks.prefect.ui import PrefectRun, closing_lines
from tasks.record.stage import run_url
from tasks.record.tracking import connect
from tasks.registry.model_store import ModelRef, PipelineRun
from tasks.settings import Settings, read_settings

TITLES = {"sft": "SFT", "best_of_n": "best-of-n", "champion": "champion"}


@task(name="report", task_run_name="report")
def write_report(
    scorecard: Scorecard,
    verdict: Verdict,
    reward_quality: RewardQuality | None,
    algorithm: str,
    models: Mapping[str, ModelRef],
    run: PipelineRun,
) -> str:
    """Write `report.md` and the key numbers to the pipeline's run, and show the page in Prefect."""
    settings = read_settings()
    client = connect(settings)
    text = render(scorecard, verdict, reward_quality, algorithm, models, run, settings)
    client.log_text(run.run_id, text, "report.md")
    client.set_tag(run.run_id, "mlflow.note.content", text)  # shown as the run's description
    for kind, ref in models.items():
        client.set_tag(run.run_id, f"output.{kind}", ref.uri)
    now = int(time.time() * 1000)
    numbers = EvaluationReport(scorecard=scorecard).summary()
    if reward_quality is not None:
        accuracy = reward_quality.accuracy._asdict()
        numbers |= {f"reward_model/accuracy_{bound}": accuracy[bound] for bound in ("low", "high")}
        numbers["reward_model/accuracy"] = reward_quality.accuracy.value
        numbers["reward_model/longer_accuracy"] = reward_quality.longer_accuracy
        numbers["reward_model/held_out_votes"] = float(reward_quality.votes)
    client.log_batch(run.run_id, metrics=[Metric(k, v, now, 0) for k, v in numbers.items()])
    if PrefectRun.current():
        create_markdown_artifact(text, key=f"{run.project}-report", description="Report")
    return text


def render(
    scorecard: Scorecard,
    verdict: Verdict,
    reward_quality: RewardQuality | None,
    algorithm: str,
    models: Mapping[str, ModelRef],
    run: PipelineRun,
    settings: Settings,
) -> str:
    """The report as Markdown: what the judges are worth, table, verdict, versions, and where to
    look further."""
    promoted = "promoted to champion" if verdict.promote else "not promoted"
    return "\n".join(
        [
            f"# {run.project}, seed {run.seed}: {models['policy'].uri} {promoted}",
            "",
            *_basis(scorecard, reward_quality, models["reward"]),
            "",
            *_table(scorecard, {**TITLES, "policy": algorithm.upper()}),
            "",
            *(f"- {reason}" for reason in verdict.reasons),
            "",
            "Registered: " + ", ".join(f"`{ref.uri}`" for ref in models.values()),
            "",
            f"- Curves, plots (`figures/`) and sample texts (`tables/`), stage by stage: "
            f"{run_url(run.run_id, run.experiment_id, settings)}",
            *closing_lines(settings),
        ]
    )


def _basis(
    scorecard: Scorecard, quality: RewardQuality | None, reward_model: ModelRef
) -> list[str]:
    """On how much the verdict rests, and how well the reward model predicts people's votes."""
    match = scorecard.comparison("policy", "sft")
    judged = [] if match is None else [f"- Verdict: by {match.judge}, from {match.basis}."]
    if quality is None:
        return [
            *judged,
            f"- Reward model `{reward_model.uri}`: its held-out accuracy is not known.",
        ]
    doubts = f" {quality.doubts}" if quality.doubts else ""
    return [*judged, f"- Reward model `{reward_model.uri}`: {quality.numbers}.{doubts}"]


def _table(scorecard: Scorecard, titles: Mapping[str, str]) -> list[str]:
    """One column for each arm, one row for each measure."""
    arms = scorecard.arms
    rows = {
        "true reward": [_interval(arm.true_reward) for arm in arms],
        "reward model": [_interval(arm.proxy_reward) for arm in arms],
        "KL to SFT (nats a sequence)": [_interval(arm.kl) for arm in arms],
        "win rate over SFT": [_win_rate(scorecard, arm) for arm in arms],
        "length (tokens)": [f"{arm.length:.1f}" for arm in arms],
        "distinct-2": [f"{arm.distinct_2:.3f}" for arm in arms],
        "perplexity under SFT": [f"{arm.perplexity:.2f}" for arm in arms],
    }
    return [
        "| | " + " | ".join(titles[arm.name] for arm in arms) + " |",
        "|---|" + "---|" * len(arms),
        *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()),
    ]


def _win_rate(scorecard: Scorecard, arm: Arm) -> str:
    comparison = scorecard.comparison(arm.name, "sft")
    return "" if comparison is None else _interval(comparison.win_rate)


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    value, low, high = interval
    return f"{value:.2f}" if low == high else f"{value:.2f} [{low:.2f}, {high:.2f}]"

"""The final report of a pipeline: a page for people, and the key numbers on the parent run.

The numbers go to the parent run because MLflow compares runs there.
"""

from collections.abc import Mapping
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact

from rlhf_core.evaluation.card.findings import verdict as card_verdict
from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.evaluation.scorecard import Arm, Scorecard
from rlhf_core.evaluation.tournament.result import TournamentResult
from rlhf_core.functional.interval import Interval
from rlhf_core.promotion.decision import Decision
from tasks.pages.publish import publish_report
from tasks.prefect.ui import PrefectRun, prefect_link_lines
from tasks.record import tags
from tasks.record.describe import run_url
from tasks.record.record import Record
from tasks.registry.refs import ModelRef, PipelineRun
from tasks.settings import Settings

TITLES = {"base": "base model", "sft": "SFT", "best_of_n": "best-of-n", "champion": "champion"}


@task(name="report", task_run_name="report")
def write_report(
    scorecard: Scorecard,
    decision: Decision,
    report_card: ReportCard,
    algorithm: str,
    models: Mapping[str, ModelRef],
    run: PipelineRun,
    tournament: TournamentResult | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> str:
    """Write the report of a pipeline to its run, and show it in Prefect.

    It is `report.md` with the key numbers, and `report.html` for people who read no code; the
    policy gets its model card.

    Args:
        defaults: the settings of a run that changes none, by section.
    """
    record = Record.open()
    text = render(
        scorecard, decision, report_card, algorithm, models, run, record.settings, tournament
    )
    record.write_page(run.run_id, text)
    record.add_tags(run.run_id, {tags.output_of(kind): ref.uri for kind, ref in models.items()})
    from rlhf_core.stages.evaluation import EvaluationReport  # with what computes

    numbers = EvaluationReport(scorecard=scorecard).summary()
    if (reward_quality := report_card.quality) is not None:
        accuracy = reward_quality.accuracy._asdict()
        numbers |= {f"reward_model/accuracy_{bound}": accuracy[bound] for bound in ("low", "high")}
        numbers["reward_model/accuracy"] = reward_quality.accuracy.value
        numbers["reward_model/longer_accuracy"] = reward_quality.longer_accuracy
        numbers["reward_model/held_out_votes"] = float(reward_quality.votes)
    record.add_numbers(run.run_id, numbers)
    if PrefectRun.current():
        create_markdown_artifact(text, key=f"{run.project}-report", description="Report")
    publish_report(record, run, defaults, scorecard, decision, report_card, models)
    return text


def render(
    scorecard: Scorecard,
    decision: Decision,
    report_card: ReportCard,
    algorithm: str,
    models: Mapping[str, ModelRef],
    run: PipelineRun,
    settings: Settings,
    tournament: TournamentResult | None = None,
) -> str:
    """The report as Markdown: reliability of the decision, table, reasons, versions and links."""
    promoted = "promoted to champion" if decision.promote else "not promoted"
    return "\n".join(
        [
            f"# {run.project}, seed {run.seed}: {models['policy'].uri} {promoted}",
            "",
            *_basis(scorecard, report_card, models["reward"]),
            *_contest(tournament),
            "",
            *_table(scorecard, {**TITLES, "policy": algorithm.upper()}),
            "",
            *(f"- {reason}" for reason in reasons(decision)),
            "",
            "Registered: " + ", ".join(f"`{ref.uri}`" for ref in models.values()),
            "",
            f"- For people who read no code: `report.html` of this run, or `rlhf report "
            f"{run.run_id[:8]}`",
            f"- Curves, plots (`figures/`) and sample texts (`tables/`) of each stage: "
            f"{run_url(run.run_id, run.experiment_id, settings)}",
            *prefect_link_lines(settings),
        ]
    )


def _basis(scorecard: Scorecard, card: ReportCard, reward_model: ModelRef) -> list[str]:
    """The basis of the decision, how well the reward model predicts votes, and its report card."""
    match = scorecard.comparison("policy", "sft")
    quality, name = card.quality, f"- Reward model `{reward_model.uri}`"
    said = [] if match is None else [f"- Decision: by {match.judge}, from {match.basis}."]
    if quality is None:
        said.append(f"{name}: its held-out accuracy is unknown.")
    else:
        said.append(f"{name}: {quality.numbers}.{' ' if quality.doubts else ''}{quality.doubts}")
    page = "`report_card.md` of the stage report_card"
    said.append(f"- Report card: {card_verdict(card)} Its page is {page}.")
    diagnosis = scorecard.diagnosis
    return said if diagnosis is None else [*said, f"- Diagnosis: {diagnosis.says}"]


def reasons(decision: Decision) -> list[str]:
    """The reasons, with the signs of canaries that pass as one of them."""
    signs = [rule for rule in decision.rules if rule.family == "canaries" and rule.passed]
    if len(signs) < 2:
        return list(decision.reasons)
    first, *others = [rule.sentence for rule in signs]
    together = f"pass: signs of {len(signs)} kinds of canary in the answers; {signs[0].required}"
    return [together if r == first else r for r in decision.reasons if r not in others]


def _contest(tournament: TournamentResult | None) -> list[str]:
    """Which of the policies along the training this is about, if there was a choice."""
    if tournament is None:
        return []
    page = "`tournament.md` of the stage tournament"
    return [f"- Tournament: {tournament.sentence()} Its page is {page}."]


def _table(scorecard: Scorecard, titles: Mapping[str, str]) -> list[str]:
    """The table: one column per arm, one row per measure."""
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

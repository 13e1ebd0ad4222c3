"""The report card of a reward model as a Prefect task, and the gate that reads it."""

import logging
from typing import cast

from prefect import task

from rlhf_core.evaluation.card.findings import findings, verdict
from rlhf_core.evaluation.card.gate import require_reward_model
from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.evaluation.intervals import in_words
from rlhf_core.settings.evaluation import ReportCardConfig, RewardGateConfig
from rlhf_core.settings.model import SamplingConfig
from tasks.prefect.ui import stage_task
from tasks.record import tags
from tasks.record.record import Record
from tasks.registry.refs import DatasetRef, ModelRef, PipelineRun
from tasks.steps.stage import do_stage

log = logging.getLogger(__name__)


@stage_task("report-card", "report card")
def write_report_card(
    config: ReportCardConfig,
    sampling: SamplingConfig,
    reward_model: ModelRef,
    sft: ModelRef,
    data: DatasetRef,
    run: PipelineRun,
) -> ReportCard:
    """Examine a reward model on held-out votes, samples of the SFT policy and canaries."""
    return do_stage(
        "report_card",
        config,
        run,
        inputs={"reward": reward_model, "data": data, "sft": sft},
        sections={"sampling": sampling},
        returns=lambda made: cast(ReportCard, made.result),
    )


@task(name="check-reward-model", task_run_name="check {model.name}")
def check_report_card(gate: RewardGateConfig, card: ReportCard, model: ModelRef) -> None:
    """Say what the report card means, tag the version with it, and apply the gate.

    Raises: RefusedError if the reward model does not meet the gate.
    """
    quality = card.quality
    log.info("%s: %s", model.uri, quality.numbers if quality else "its accuracy is unknown")
    for finding in findings(card):
        if finding.kind == "doubt":
            log.warning("%s: %s %s", model.uri, finding.says, finding.advice)
    log.info("%s: %s", model.uri, verdict(card))
    Record.open().store.add_tags(model, version_tags(card))
    require_reward_model(gate, quality, model.uri, card.canaries)


def version_tags(card: ReportCard) -> dict[str, str]:
    """The key numbers of a card as tags of the version that it is about."""
    named: dict[str, str] = {tags.CARD_VERDICT: verdict(card)}
    agreement, slice_, canary = card.agreement, card.worst_slice, card.worst_canary
    shares = {
        "accuracy": card.accuracy and card.accuracy.share,
        "longer_accuracy": card.longer and card.longer.share,
        "ceiling": agreement and agreement.majority.share,
    }
    named |= {tags.card_number(n): in_words(known) for n, known in shares.items() if known}
    if slice_ is not None:
        said = f"{slice_.column} = {slice_.value}: {in_words(slice_.accuracy.share)}"
        named[tags.card_number("worst_slice")] = said
    if canary is not None:
        said = f"{canary.kind}: {in_words(canary.beats_real)}"
        named[tags.card_number("worst_canary")] = said
    return named

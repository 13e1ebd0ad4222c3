"""Reward-model training as a Prefect task, and the check of its held-out accuracy."""

import logging

from prefect import task

from rlhf_core.evaluation.card.gate import RewardQuality
from rlhf_core.functional.interval import Interval
from rlhf_core.settings.model import ModelConfig, SamplingConfig
from rlhf_core.settings.training import RewardModelConfig
from tasks.prefect.ui import stage_task
from tasks.record import tags
from tasks.record.record import Record
from tasks.registry.refs import DatasetRef, ModelRef, PipelineRun
from tasks.steps.stage import do_stage

log = logging.getLogger(__name__)


@task(name="check-base-model", task_run_name="check {model.source}")
def check_base_model(model: ModelConfig) -> None:
    """Check that a reward model can be put on the base model's body, before fine-tuning.

    Only its config is read.

    Raises: ModelError when it cannot, or the source cannot be found, reached or read.
    """
    from rlhf_core.backbone.base_model import outline
    from rlhf_core.backbone.networks import ScalarModel

    ScalarModel.outline(outline(model, vocabulary=0))


@stage_task("reward-model", "reward model")
def train_reward_model(
    config: RewardModelConfig,
    sampling: SamplingConfig,
    sft: ModelRef,
    data: DatasetRef,
    run: PipelineRun,
) -> ModelRef:
    """Train a reward model on the preferences; register `<project>-reward`."""
    return do_stage(
        "reward_model",
        config,
        run,
        inputs={"sft": sft, "data": data},
        sections={"sampling": sampling},
        returns=lambda made: made.models["reward"],
    )


@stage_task("held-out", "held-out reward model")
def train_held_out(
    config: RewardModelConfig,
    sampling: SamplingConfig,
    sft: ModelRef,
    data: DatasetRef,
    run: PipelineRun,
) -> ModelRef:
    """Train the monitor's reward model on the other half of the votes; register
    `<project>-held-out`."""
    return do_stage(
        "held_out",
        config.model_copy(update={"votes": "second_half"}),
        run,
        inputs={"sft": sft, "data": data},
        sections={"sampling": sampling},
        returns=lambda made: made.models["held_out"],
    )


@task(name="check-reward-model", task_run_name="check {model.name}")
def check_reward_model(model: ModelRef) -> RewardQuality | None:
    """The held-out accuracy of a reward model, with a warning if it is low or uncertain.

    These are the numbers of the run that trained it; its report card has more.

    Returns: None if it is unknown, as for a version that no stage registered.
    """
    quality = _find_quality(Record.open(), model)
    if quality is None:
        log.warning("%s: its held-out accuracy is unknown", model.uri)
    elif quality.doubts:
        log.warning("%s: %s. %s", model.uri, quality.numbers, quality.doubts)
    else:
        log.info("%s: %s", model.uri, quality.numbers)
    return quality


def _find_quality(record: Record, model: ModelRef) -> RewardQuality | None:
    run_id = record.store.tags(model).get(tags.RUN)
    made_by = record.runs.find(run_id) if run_id else None
    if made_by is None:
        return None
    metrics = made_by.data.metrics
    found = {name.removeprefix(tags.SUMMARY): value for name, value in metrics.items()}
    if "longer_accuracy" not in found:
        return None
    names = ("accuracy", "accuracy_low", "accuracy_high")
    prompts = found.get("held_out_prompts")
    return RewardQuality(
        accuracy=Interval(*(found[name] for name in names)),
        longer_accuracy=found["longer_accuracy"],
        # Version 0.1.0 counted all held-out pairs, ties included, and no prompts.
        votes=int(found.get("held_out_votes", found["held_out_pairs"])),
        prompts=None if prompts is None else int(prompts),
    )

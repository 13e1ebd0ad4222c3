"""Reward-model training as a Prefect task, and what its held-out votes say of the result."""

import logging

from mlflow.exceptions import MlflowException
from prefect import task

from rlhf_core.backbone.sampling import SamplingConfig
from rlhf_core.evaluation.gates import RewardGateConfig, RewardQuality, require_reward_model
from rlhf_core.functional.ranking import Interval
from rlhf_core.stages.reward_model import RewardModelConfig
from tasks.prefect.ui import stage_task
from tasks.record.stage import open_training
from tasks.record.tracking import connect
from tasks.registry.model_store import DatasetRef, MlflowModelStore, ModelRef, PipelineRun, Ref
from tasks.settings import read_settings

log = logging.getLogger(__name__)


@stage_task("reward-model", "reward model")
def train_reward_model(
    config: RewardModelConfig,
    sampling: SamplingConfig,
    sft: ModelRef,
    data: DatasetRef,
    run: PipelineRun,
) -> ModelRef:
    """Learn a reward from the preferences; register `<project>-reward`."""
    inputs: dict[str, Ref] = {"sft": sft, "data": data}
    beside = {"sampling": sampling}
    with open_training(
        "reward_model", config=config, beside=beside, run=run, inputs=inputs
    ) as stage:
        if not stage.cached:
            output = stage.work / "reward"
            paths = {"sft": stage.fetch(sft), "data": stage.fetch(data), "output": output}
            stage.record(stage.train(paths))
            stage.publish({"reward": output})
        return stage.result(stage.model("reward"))


@task(name="check-reward-model", task_run_name="check {model.name}")
def check_reward_model(gate: RewardGateConfig, model: ModelRef) -> RewardQuality | None:
    """What the run that made a reward model has measured, with a warning if that is little.

    Returns: None when it is not known, as for a version that no stage of this project has made.

    Raises: ModelError when it is not what the gate asks for.
    """
    quality = _find_quality(model)
    if quality is None:
        log.warning("%s: its held-out accuracy is not known", model.uri)
    elif quality.doubts:
        log.warning("%s: %s. %s", model.uri, quality.numbers, quality.doubts)
    else:
        log.info("%s: %s", model.uri, quality.numbers)
    require_reward_model(gate, quality, model.uri)
    return quality


def _find_quality(model: ModelRef) -> RewardQuality | None:
    client = connect(read_settings())
    run_id = MlflowModelStore(client).tags(model).get("run_id", "")
    try:
        metrics = client.get_run(run_id).data.metrics if run_id else {}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    found = {name.removeprefix("summary/"): value for name, value in metrics.items()}
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

"""Reward-model training as a Prefect task."""

from rlhf_core.sampling import SamplingConfig
from rlhf_core.stages.reward_model import RewardModelConfig
from tasks.model_store import DatasetRef, ModelRef, PipelineRun, Ref
from tasks.prefect_run import stage_task
from tasks.stage import open_training


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

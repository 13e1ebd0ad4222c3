"""Supervised fine-tuning as a Prefect task."""

from rlhf_core.backbone.models import ModelConfig
from rlhf_core.stages.sft import SFTConfig
from tasks.prefect.ui import stage_task
from tasks.record.stage import open_training
from tasks.registry.model_store import DatasetRef, ModelRef, PipelineRun


@stage_task("sft", "SFT")
def train_sft(
    config: SFTConfig, model: ModelConfig, data: DatasetRef, run: PipelineRun
) -> ModelRef:
    """Fine-tune the base model on the demonstrations; register `<project>-sft`."""
    with open_training(
        "sft", config=config, beside={"model": model}, run=run, inputs={"data": data}
    ) as stage:
        if not stage.cached:
            output = stage.work / "sft"
            stage.record(stage.train({"data": stage.fetch(data), "output": output}))
            stage.publish({"sft": output})
        return stage.result(stage.model("sft"))

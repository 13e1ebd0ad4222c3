"""Supervised fine-tuning as a Prefect task."""

from rlhf_core.settings.model import ModelConfig
from rlhf_core.settings.training import SFTConfig
from tasks.prefect.ui import stage_task
from tasks.registry.refs import DatasetRef, ModelRef, PipelineRun
from tasks.steps.stage import do_stage


@stage_task("sft", "SFT")
def train_sft(
    config: SFTConfig, model: ModelConfig, data: DatasetRef, run: PipelineRun
) -> ModelRef:
    """Fine-tune the base model on the demonstrations; register `<project>-sft`."""
    return do_stage(
        "sft",
        config,
        run,
        inputs={"data": data},
        sections={"model": model},
        returns=lambda made: made.models["sft"],
    )

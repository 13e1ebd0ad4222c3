"""The data stage as a Prefect task."""

from typing import cast

from rlhf_core.backbone.base_model import ModelConfig
from rlhf_core.stages.prepare import DataConfig, LengthLimits
from tasks.prefect.ui import stage_task
from tasks.registry.refs import DatasetRef, PipelineRun
from tasks.steps.stage import do_stage


@stage_task("prepare-data", "prepare data")
def prepare_data(
    config: DataConfig, model: ModelConfig, limits: LengthLimits, run: PipelineRun
) -> DatasetRef:
    """Check and split the data, and store them with the run."""
    return do_stage(
        "prepare",
        config,
        run,
        inputs={},
        sections={"model": model, "limits": limits},
        returns=lambda made: cast(DatasetRef, made.data),
    )

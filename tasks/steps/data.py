"""The data stage as a Prefect task."""

from rlhf_core.backbone.models import ModelConfig
from rlhf_core.stages import prepare
from rlhf_core.stages.prepare import DataConfig, LengthLimits
from tasks.prefect.ui import stage_task
from tasks.record.stage import open_stage
from tasks.registry.model_store import DatasetRef, PipelineRun


@stage_task("prepare-data", "prepare data")
def prepare_data(
    config: DataConfig, model: ModelConfig, limits: LengthLimits, run: PipelineRun
) -> DatasetRef:
    """Check and split the data, and store them with the run."""
    beside = {"model": model, "limits": limits}
    # What a file or a hub has may change: the data of another run say nothing about those of now.
    with open_stage(
        "prepare", config=config, beside=beside, run=run, inputs={}, reuse="own"
    ) as stage:
        if not stage.cached:
            output = stage.work / "data"
            report = prepare.prepare_data(
                config,
                model=model,
                limits=limits,
                output=output,
                seed=run.seed,
                logger=stage.logger,
            )
            stage.record(report)
            stage.publish_data(output)
        return stage.result(stage.dataset())

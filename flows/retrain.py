"""The pipeline again, when enough preferences have come since it ran last."""

from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from flows.config import PipelineConfig
from flows.pipeline_flow import pipeline_flow
from flows.rlhf import PipelineResult, rlhf
from rlhf_core.config import Section
from tasks.steps.new_data import PreferenceCount, count_preferences


class RetrainConfig(Section):
    """When to run the pipeline again, and with what."""

    min_new_preferences: int = Field(
        100, ge=0, description="Preferences that must have come since the last finished run (rows)"
    )
    pipeline: PipelineConfig = Field(
        default_factory=PipelineConfig, description="The pipeline to run when they have"
    )


@pipeline_flow("retrain")
def retrain(config: RetrainConfig) -> "PipelineResult | State[Any]":
    """Run the pipeline if enough preferences are new; else end as Skipped and say how many miss.

    The pipeline is a part of this run. As a deployment of its own it would wait for a worker that
    this run may be holding.
    """
    pipeline = config.pipeline
    found = count_preferences(
        pipeline.data,
        pipeline.model,
        pipeline.length_limits,
        project=pipeline.project,
        seed=pipeline.seed,
    )
    if found.new < config.min_new_preferences:
        return Completed(name="Skipped", message=_why_not(found, config.min_new_preferences))
    return rlhf(pipeline)


def _why_not(found: PreferenceCount, needed: int) -> str:
    since = f"{found.before} at {found.last_run}" if found.last_run else "there was no run before"
    return (
        f"{needed - found.new} more preferences are needed: {found.new} of {needed} are new "
        f"({found.now} now, {since})"
    )

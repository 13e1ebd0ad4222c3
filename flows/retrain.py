"""The pipeline again, when enough preferences have come since it ran last."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from flows.cli.logs import shorten_user_errors
from flows.config import PipelineConfig
from flows.naming import run_name
from flows.rlhf import PipelineResult, rlhf
from flows.working_dir import in_working_dir
from rlhf_core.config import Section
from tasks.steps.new_data import PreferenceCount, count_preferences

shorten_user_errors()


class RetrainConfig(Section):
    """When to run the pipeline again, and with what."""

    min_new_preferences: int = Field(
        100, ge=0, description="Preferences that must have come since the last finished run (rows)"
    )
    pipeline: PipelineConfig = Field(
        default_factory=PipelineConfig, description="The pipeline to run when they have"
    )


@flow(name="retrain", flow_run_name=run_name)
@in_working_dir
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

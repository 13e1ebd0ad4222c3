"""Runs the pipeline again when enough preferences are new since its last run."""

from typing import Any, Self

from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field, model_validator

from flows.config import PipelineConfig
from flows.pipeline_flow import pipeline_flow
from flows.rlhf import PipelineResult, rlhf
from rlhf_core.config import Section
from rlhf_core.errors import RefusedError
from rlhf_core.stages.prepare import LATEST
from tasks.feedback.asking.again import Caller, Continued, ask_again
from tasks.feedback.asking.config import AskConfig
from tasks.feedback.asking.waiting import suspended_for_people
from tasks.feedback.ordering.task import order_after_asking
from tasks.registry.refs import ModelRef
from tasks.steps.new_data import PreferenceCount, called_by, count_preferences


class RetrainPlan(Section):
    """When to run a pipeline again, and what people are asked then."""

    min_new_preferences: int = Field(
        100, ge=0, description="New preferences needed since the last finished run (rows)"
    )
    ask: AskConfig | None = Field(
        None,
        description="What people are asked after the run, about the answers of whoever is the "
        "champion then; with `then` it closes the loop. Empty = nothing",
    )
    rounds: int = Field(
        10,
        ge=1,
        le=1_000_000,
        description="The loop ends after so many rounds since a person asked for a batch",
    )


class RetrainConfig(RetrainPlan):
    """When to run the pipeline again, and with what."""

    pipeline: PipelineConfig = Field(
        default_factory=PipelineConfig, description="The pipeline to run then"
    )

    @model_validator(mode="after")
    def _asks_about_the_champion(self) -> Self:
        if self.ask is None:
            return self
        if self.ask.policy or self.ask.against or self.ask.evaluation:
            raise ValueError(
                "after a training people are asked about the champion: leave policy, against and "
                "evaluation of `ask` empty"
            )
        store = self.pipeline.data.preferences.store
        if self.ask.then and store != self.ask.project:
            read = f"reads the votes of '{store}'" if store else "reads no votes of the store"
            raise ValueError(
                f"the loop asks people of the project '{self.ask.project}', but the pipeline "
                f"{read}: set pipeline.data.preferences.store to {self.ask.project}"
            )
        pinned = self.pipeline.data.preferences.snapshot
        if self.ask.then and pinned not in ("", LATEST):
            raise ValueError(
                "pipeline.data.preferences.snapshot names one snapshot, in which nothing is ever "
                f"new: set it to {LATEST}"
            )
        return self


@pipeline_flow("retrain")
def retrain(config: RetrainConfig) -> "PipelineResult | State[Any]":
    """Run the pipeline if enough preferences are new; else end as Skipped with the number missing.

    Then ask people about the champion, if `ask` says so. The pipeline runs inside this flow run. A
    deployment of its own would wait for the worker that this run may occupy.
    """
    pipeline, caller = config.pipeline, Caller.current()
    # After the pipeline nothing is new, so a run that goes on after a stop does not count again.
    if called_by(caller.flow_run, pipeline.project) is None:
        found = count_preferences(
            pipeline.data,
            pipeline.model,
            pipeline.length_limits,
            project=pipeline.project,
            seed=pipeline.seed,
        )
        if found.new < config.min_new_preferences:
            why = _why_not(found, config.min_new_preferences)
            if config.ask is not None and config.ask.then:
                next_ = _go_on(config, caller, f"Nothing was trained: {why}.", votes=found.votes)
                why += f"; {next_.sentence}" if next_ else ""
            return Completed(name="Skipped", message=why)
    with suspended_for_people():
        try:
            result = rlhf(pipeline)
        except RefusedError as refused:
            _go_on(config, caller, str(refused))
            raise
    _go_on(config, caller, _outcome(result), candidate=result.policy, votes=result.data.digest)
    return result


def _go_on(
    config: RetrainConfig,
    caller: Caller,
    outcome: str,
    *,
    candidate: ModelRef | None = None,
    votes: str = "",
) -> Continued | None:
    """Ask for the next batch, if one is to be asked for."""
    if config.ask is None:
        return None
    called = called_by(caller.flow_run, config.pipeline.project)
    continued = ask_again(
        config.ask,
        of=config.pipeline.project,
        caller=caller,
        rounds=config.rounds,
        votes=(called and called.votes) or votes,
        outcome=outcome,
        candidate=candidate,
        run_id=called.run_id if called else "",
    )
    if continued.asked is not None:
        order_after_asking(config.ask.project)
    return continued


def _outcome(result: PipelineResult) -> str:
    if result.decision.promote:
        return f"`{result.policy.uri}` is the champion."
    return f"`{result.policy.uri}` was refused: {'; '.join(result.decision.reasons)}."


def _why_not(found: PreferenceCount, needed: int) -> str:
    since = f"{found.before} at {found.last_run}" if found.last_run else "no earlier run"
    return (
        f"{needed - found.new} more preferences are needed: {found.new} of {needed} are new "
        f"({found.now} now, {since})"
    )

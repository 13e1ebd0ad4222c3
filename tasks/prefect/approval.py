"""Approval: a promotion that the rules allow can wait for a person, for days, with nothing held.

The flow run is suspended and not paused: its process ends, and with it its memory and its place at
the worker. When the form is answered a worker runs the flow again from its top. The stages are
found done, the same form is asked for under the same key, and this time its answer is there.

The key names the candidate, so that an answer never counts for another version. An answer that
cannot be used, and a run that is tried again after it waited in vain, lead to a new form.
"""

import logging
from collections.abc import Iterable
from datetime import timedelta
from typing import Literal
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import resume_flow_run, suspend_flow_run
from prefect.input import RunInput
from pydantic import Field, ValidationError

from rlhf_core.evaluation.gates import PromotionConfig, Rule, apply_rules
from rlhf_core.evaluation.scorecard import Scorecard
from tasks.prefect.ui import artifact_key
from tasks.record import tags as tag
from tasks.record.describe import run_url
from tasks.record.record import Record
from tasks.registry.champion import champion_of
from tasks.registry.refs import ModelRef, PipelineRun

log = logging.getLogger(__name__)


class Answer(RunInput):
    """The form, and what a person has filled in.

    Prefect holds an answer against its schema, and `RunInput` does so again when it is loaded.
    """

    approve: Literal["yes", "no"] = Field(description="Whether the policy becomes the champion")
    by: str = Field(
        min_length=1, max_length=200, pattern=r"\S", description="Your name, for the record"
    )
    reason: str = Field("", max_length=2000, description="Why, for those who ask later")

    @property
    def said(self) -> str:
        """Who and why, in a few words."""
        return f"{self.by}: {self.reason}" if self.reason else self.by


def ask_person(
    config: PromotionConfig,
    scorecard: Scorecard,
    candidate: ModelRef,
    champion: ModelRef | None,
    run: PipelineRun,
) -> Answer | None:
    """What a person says to the promotion of a policy that every rule allows.

    To be called by the flow itself, outside any task. The flow run is suspended until there is an
    answer, and fails after `config.approval_days` without one.

    Returns: None where nobody is asked: the rules decide alone, or refuse; the policy is the
        champion already; or this flow run has no deployment of its own, and so no worker could take
        it up again.
    """
    if config.approval == "automatic":
        return None
    rules = apply_rules(config, scorecard)
    if not all(rule.passed for rule in rules) or not _can_be_resumed():
        return None
    record = Record.open()
    asked_before = tag.APPROVED in record.runs.tags(run.run_id)
    in_use = champion_of(record, candidate.name) == candidate
    if in_use and not asked_before:
        return None
    mark_waiting(record, run, candidate)
    links = _links(record, run)
    timeout = int(timedelta(days=config.approval_days).total_seconds())
    attempt, problem = 1, ""
    while True:
        text = describe(rules, candidate, champion, links, problem)
        key = artifact_key("approval", candidate.name, str(candidate.version), str(attempt))
        try:
            return suspend_flow_run(Answer.with_initial_data(text), timeout=timeout, key=key)
        except ValidationError as error:
            problem = "; ".join(f"{e['loc'][0]}: {e['msg']}" for e in error.errors())
            log.warning("the answer to the form %s cannot be used: %s", key, problem)
            attempt += 1


def answer_waiting(flow_run_id: str, answer: Answer) -> bool:
    """Answer the form of a flow run, which then goes on; False when that run does not wait."""
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(flow_run_id)).state
        except ObjectNotFound:
            return False
    if state is None or not state.is_paused():
        return False
    resume_flow_run(UUID(flow_run_id), run_input=answer.model_dump())
    return True


def mark_waiting(record: Record, run: PipelineRun, candidate: ModelRef) -> None:
    """Write on the pipeline's run that, and for which version, it waits for a person."""
    record.add_tags(run.run_id, {tag.APPROVED: tag.WAITING, tag.CANDIDATE: candidate.uri})


def describe(
    rules: Iterable[Rule],
    candidate: ModelRef,
    champion: ModelRef | None,
    links: Iterable[str],
    problem: str = "",
) -> str:
    """The text above the form, as Markdown."""
    place = f"It takes the place of `{champion.uri}`." if champion else "There is no champion yet."
    # Narrow, as the form is: a fourth column would be out of sight.
    rows = (f"| {r.answer} | {r.name} | {r.measured}<br>{r.required} |" for r in rules)
    return "\n".join(
        [
            f"### Shall `{candidate.uri}` become the champion?",
            "",
            *([f"**The last answer could not be used: {problem}**", ""] if problem else []),
            place,
            "",
            "| | rule | measured, and asked |",
            "|---|---|---|",
            *rows,
            "",
            "MLflow: " + " · ".join(links),
        ]
    )


def _can_be_resumed() -> bool:
    """Whether a worker would run this flow run again: Prefect suspends no other."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return run is not None and run.deployment_id is not None and run.parent_task_run_id is None


def _links(record: Record, run: PipelineRun) -> list[str]:
    """The run of the pipeline and those of its stages, in the order in which they ran."""
    stages = record.runs.stages(run.experiment_id, run.run_id)
    pages = {tag.PIPELINE: run.run_id}
    pages |= {found.data.tags.get(tag.STAGE, "stage"): found.info.run_id for found in stages}
    return [
        f"[{name}]({run_url(run_id, run.experiment_id, record.settings)})"
        for name, run_id in pages.items()
    ]

"""Approval: a promotion that the rules allow can wait for a person, for days, without resources.

The flow run is suspended, not paused: its process ends and releases its memory and its worker slot.
When the form is answered, a worker runs the flow again from the top. The stages are cached, the
flow requests the same form by the same key, and receives the answer.

The key contains the candidate, so an answer never applies to another version. An invalid answer, or
a retry after the form expired, leads to a new form.
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

from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.evaluation.scorecard import Scorecard
from rlhf_core.promotion.decision import Rule
from rlhf_core.promotion.rules import allows, apply_rules
from rlhf_core.settings.promotion import PromotionConfig
from tasks.prefect.ui import artifact_key
from tasks.record import tags
from tasks.record.describe import run_url
from tasks.record.record import Record
from tasks.registry.champion import champion_of
from tasks.registry.evidence import gather
from tasks.registry.refs import ModelRef, PipelineRun

log = logging.getLogger(__name__)


class Answer(RunInput):
    """The approval form and its answer.

    Prefect validates an answer against the schema, and `RunInput` validates it again when loaded.
    """

    approve: Literal["yes", "no"] = Field(description="Whether the policy becomes the champion")
    by: str = Field(
        min_length=1,
        max_length=200,
        pattern=r"\S",
        description="Your name, which is kept with the answer",
    )
    reason: str = Field(
        "", max_length=2000, description="The reason, which is kept with the answer"
    )

    @property
    def summary(self) -> str:
        """Name and reason."""
        return f"{self.by}: {self.reason}" if self.reason else self.by


def ask_person(
    config: PromotionConfig,
    scorecard: Scorecard,
    candidate: ModelRef,
    champion: ModelRef | None,
    run: PipelineRun,
    report_card: ReportCard | None = None,
) -> Answer | None:
    """Ask a person whether to promote a policy that passes every rule.

    Call this from the flow itself, outside any task. The flow run is suspended until there is an
    answer, and fails after `config.approval_days` without one.

    Returns: the answer; None if nobody is asked, because approval is automatic, a rule refuses, the
        policy is the champion already, or this flow run has no deployment, so that no worker could
        resume it.
    """
    if config.approval == "automatic":
        return None
    if not can_be_resumed():
        return None
    record = Record.open()
    facts = gather(record, config, scorecard, candidate, champion, run, report_card)
    rules = apply_rules(config, scorecard, facts)
    if not allows(rules):
        return None
    asked_before = tags.APPROVED in record.runs.tags(run.run_id)
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
            log.warning("the answer to the form %s is invalid: %s", key, problem)
            attempt += 1


def answer_waiting(flow_run_id: str, answer: Answer) -> bool:
    """Answer the form of a flow run, which then resumes; False if that run is not waiting."""
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
    """Tag the pipeline's run as waiting for a person, with the candidate."""
    record.add_tags(run.run_id, {tags.APPROVED: tags.WAITING, tags.CANDIDATE: candidate.uri})


def describe(
    rules: Iterable[Rule],
    candidate: ModelRef,
    champion: ModelRef | None,
    links: Iterable[str],
    problem: str = "",
) -> str:
    """The text above the form, as Markdown."""
    replaces = f"It would replace `{champion.uri}`." if champion else "There is no champion yet."
    # The form is narrow: a fourth column would not be visible.
    rows = (f"| {r.answer} | {r.name} | {_cell(r)} |" for r in rules if r.passed is not None)
    return "\n".join(
        [
            f"### Promote `{candidate.uri}` to champion?",
            "",
            *([f"**The last answer was invalid: {problem}**", ""] if problem else []),
            replaces,
            "",
            "| | rule | measured<br>required |",
            "|---|---|---|",
            *rows,
            "",
            "MLflow: " + " · ".join(links),
        ]
    )


def _cell(rule: Rule) -> str:
    test = "" if rule.p is None else f"p {rule.p:.2g}, level {rule.alpha:.2g}"
    return "<br>".join(part for part in (rule.measured, rule.required, test) if part)


def can_be_resumed() -> bool:
    """Whether a worker can resume this flow run: otherwise Prefect cannot suspend it."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return run is not None and run.deployment_id is not None and run.parent_task_run_id is None


def _links(record: Record, run: PipelineRun) -> list[str]:
    """Links to the runs of the pipeline and of its stages, in the order in which they ran."""
    stages = record.runs.stages(run.experiment_id, run.run_id)
    pages = {tags.PIPELINE: run.run_id}
    pages |= {found.data.tags.get(tags.STAGE, "stage"): found.info.run_id for found in stages}
    return [
        f"[{name}]({run_url(run_id, run.experiment_id, record.settings)})"
        for name, run_id in pages.items()
    ]

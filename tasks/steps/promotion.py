"""Promotion of a policy to champion, by rules or by a person; and rollback."""

import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
from prefect import task
from pydantic import BaseModel, ValidationError

from rlhf_core.errors import UserError
from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.evaluation.scorecard import Scorecard
from rlhf_core.promotion.decision import Decision
from rlhf_core.promotion.page import budget, page, rows
from rlhf_core.promotion.rules import decide
from rlhf_core.settings.promotion import PromotionConfig
from rlhf_core.types import Report
from tasks.prefect import events, ui
from tasks.prefect.approval import Answer, answer_waiting, mark_waiting
from tasks.record import tags
from tasks.record.record import Record
from tasks.record.stage import open_stage
from tasks.registry.champion import (
    CHAMPION,
    champion_of,
    crown,
    now,
    policy_of,
    predecessor,
    project_of,
    take_back,
)
from tasks.registry.evidence import gather
from tasks.registry.refs import ModelRef, PipelineRun, Ref, place_of, require_name
from tasks.settings import Settings

DECISION, PAGE = "decision.json", "decision.md"
log = logging.getLogger(__name__)


@task(name="pin-champion", task_run_name="pin champion")
def pin_champion(run: PipelineRun, candidate: ModelRef | None = None) -> ModelRef | None:
    """The current champion of the project, if there is one, to compare with.

    It is written to the pipeline's run, so that it stays the same when the run is resumed after a
    crash or an approval. If the candidate is the champion already, its predecessor is returned.
    """
    record = Record.open()
    known = record.runs.tags(run.run_id).get(tags.COMPARED_WITH)
    if known is not None:
        return tags.version_of(known)
    found = champion_of(record, policy_of(run.project))
    if found is not None and found == candidate:
        found = predecessor(record, found)
    record.add_tags(run.run_id, {tags.COMPARED_WITH: tags.name_of(found)})
    return found


@task(name="promote", task_run_name="promotion")
def promote(
    config: PromotionConfig,
    scorecard: Scorecard,
    candidate: ModelRef,
    champion: ModelRef | None,
    run: PipelineRun,
    answer: Answer | None = None,
    report_card: ReportCard | None = None,
) -> Decision:
    """Move the alias `champion` to the candidate if every rule allows it; record the reasons.

    `champion` is the version that the evaluation compared with. If the champion has changed since,
    the comparison is void and the alias stays. `answer` is the answer of a person; if the config
    requires one and there is none, the run waits for `rlhf promote`. `report_card` is that of the
    reward model.
    """
    inputs: dict[str, Ref] = {"policy": candidate}
    if champion is not None:
        inputs[CHAMPION] = champion
    # By version: another version with the same files is another candidate.
    extra_sections: dict[str, BaseModel] = {"candidate": candidate}
    if answer is not None:
        extra_sections["answer"] = answer
    record = Record.open(patient=True)
    with open_stage(
        "promotion",
        record=record,
        config=config,
        extra_sections=extra_sections,
        run=run,
        inputs=inputs,
        reuse="own",
    ) as stage:
        if stage.cached:
            return stage.kept(Decision)
        stage.logger.phase("checking the files of the candidate")
        facts = gather(record, config, scorecard, candidate, champion, run, report_card)
        decision = decide(config, scorecard, facts).model_copy(
            update={
                "candidate": candidate.uri,
                "champion": "" if champion is None else champion.uri,
                "digests": _digests(record, candidate, champion),
                "runs": {"pipeline": run.run_id, "promotion": stage.run_id}
                | ({"evaluation": facts.files.evaluation} if facts.files else {}),
                "at": now(),
            }
        )
        present = champion_of(record, candidate.name)
        if answer is not None:
            decision = _with_answer(decision, answer)
        elif config.approval == "automatic":
            decision = _unless_rolled_back(decision, record, candidate)
        if present not in (champion, candidate):
            decision = decision.refuse(
                f"the champion is now {tags.name_of(present)}, but the evaluation compared with "
                f"{tags.name_of(champion)}"
            )
        needs_person = config.approval == "person" and present != candidate
        waits = needs_person and answer is None and decision.promote
        if waits:
            decision = decision.refuse(f"it waits for approval: rlhf promote {run.run_id[:8]}")
            mark_waiting(record, run, candidate)
        stage.record(Report(tables={"promotion": pd.DataFrame(rows(decision))}))
        runs = (stage.run_id, run.run_id)
        _write(record, decision, candidate, stage.run_id, run.run_id)
        ui_key = ui.artifact_key(run.project, "promotion", "decision")
        if ui.PrefectRun.current():
            ui.show_page(ui_key, page(decision), f"{run.project} decision")
        if answer is not None:
            _write_answer(record, answer, candidate, runs)
        for reason in decision.reasons:
            log.info(reason)
        if decision.promote and present != candidate:
            crown(record, candidate, champion, by=answer.by if answer else "")
        elif not decision.promote and not waits:
            events.gate_refused(run.project, candidate, decision.reasons)
        stage.keep(decision)
        return decision


def promote_run(name: str, *, by: str, reason: str, settings: Settings) -> str:
    """Approve the promotion that a pipeline run waits for.

    A run that is suspended in Prefect receives the answer and resumes there. If the run has
    finished, or its form has expired, this call makes its candidate the champion.

    Returns: a sentence with the outcome.

    Raises:
        UserError: no run matches; it does not wait for approval; or the champion is no longer the
            version that its policy was compared with.
    """
    try:
        answer = Answer(approve="yes", by=by, reason=reason)
    except ValidationError as error:
        raise UserError(f"--{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}.") from None
    record = Record.open(settings)
    found = record.runs.pipeline(name)
    run_tags = found.data.tags
    if run_tags.get(tags.APPROVED) != tags.WAITING:
        why = run_tags.get(tags.REASONS, "it has not reached its promotion").replace("\n", "; ")
        raise UserError(f"The run {found.info.run_name} does not wait for approval ({why}).")
    if settings.prefect_api_url and answer_waiting(run_tags[tags.FLOW_RUN], answer):
        return f"The run {found.info.run_name} received the approval and resumes."
    candidate, champion = (
        ModelRef.parse(run_tags[tags.CANDIDATE]),
        tags.version_of(run_tags[tags.COMPARED_WITH]),
    )
    present = champion_of(record, candidate.name)
    if present not in (champion, candidate):
        raise UserError(
            f"The champion is now {tags.name_of(present)}, but {candidate.uri} was compared with "
            f"{tags.name_of(champion)}; run the pipeline again."
        )
    stages = record.runs.stages(found.info.experiment_id, found.info.run_id, "promotion")
    runs = [found.info.run_id, *(stage.info.run_id for stage in stages)]
    _write_answer(record, answer, candidate, runs)
    if stages and (decision := _read(record, stages[-1].info.run_id)):
        said = decision.allow(f"approved by {answer.summary}")
        allowed = said.model_copy(update={"promote": True, "at": now()})
        _write(record, allowed, candidate, stages[-1].info.run_id, found.info.run_id)
    _tag_runs(record, runs, {tags.PROMOTED: tags.flag(True)})
    if present != candidate:
        crown(record, candidate, champion, by=by)
    return f"{candidate.uri} is the champion."


def roll_back(project: str, *, to: int | None, by: str, settings: Settings) -> str:
    """Make the previous champion, or version `to`, the champion again.

    The version that was rolled back is not promoted again without a person.

    Returns: a sentence with the outcome.

    Raises:
        UserError: there is no champion, it replaced no other version, or there is no version `to`.
    """
    if not project.strip():
        raise UserError("The name of the project is empty: pass that of an existing project.")
    require_name(policy_of(project), f"project '{project}'")
    record = Record.open(settings)
    present = champion_of(record, policy_of(project))
    if present is None:
        raise UserError(
            f"The project '{project}' has no champion in {place_of(settings.mlflow_uri)}."
        )
    target = ModelRef(name=present.name, version=to) if to else predecessor(record, present)
    if target is None:
        raise UserError(f"{present.uri} has no predecessor: choose a version with --to VERSION.")
    record.store.require(target)
    if target == present:
        raise UserError(f"{present.uri} is already the champion.")
    take_back(record, present, target, by=by)
    return f"{target.uri} is the champion."


def _digests(record: Record, *versions: ModelRef | None) -> dict[str, str]:
    found = {ref.uri: record.store.tags(ref).get(tags.DIGEST, "") for ref in versions if ref}
    return {uri: digest for uri, digest in found.items() if digest}


def _write(
    record: Record, decision: Decision, candidate: ModelRef, stage: str, pipeline: str
) -> None:
    """Store the decision: with both runs as JSON and as a page, its key facts as tags."""
    text = page(decision)
    record.write_page(stage, text, PAGE)
    record.client.log_text(pipeline, text, PAGE)
    for run_id in (stage, pipeline):
        record.client.log_text(run_id, decision.model_dump_json(indent=2), DECISION)
    reasons = "\n".join(decision.reasons)
    said = {tags.PROMOTED: tags.flag(decision.promote), tags.REASONS: reasons}
    _tag_runs(record, (stage, pipeline), said)
    failed = ", ".join(rule.name for rule in decision.rules if rule.passed is False)
    facts = {"promoted": tags.flag(decision.promote), "refused_by": failed or tags.NOBODY}
    facts |= {tags.COMPARED_WITH: decision.champion or tags.NOBODY, "claim": decision.claim}
    facts |= {"run": stage, "at": decision.at}
    facts |= {"look": budget(decision.look)} if decision.look else {}
    wins = (rule for rule in decision.rules if rule.family == "win rate")
    facts |= {rule.name.replace(" ", "_"): rule.sentence for rule in wins}
    record.store.add_tags(candidate, {tags.gate_fact(name): v for name, v in facts.items()})


def _read(record: Record, stage: str) -> Decision | None:
    """The decision that a promotion stored; None if it is of an older release."""
    if DECISION not in [found.path for found in record.client.list_artifacts(stage)]:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = record.client.download_artifacts(stage, DECISION, folder)
        return Decision.model_validate_json(Path(path).read_text(encoding="utf-8"))


def _with_answer(decision: Decision, answer: Answer) -> Decision:
    if answer.approve == "yes":
        return decision.allow(f"approved by {answer.summary}")
    return decision.refuse(f"not approved by {answer.summary}")


def _unless_rolled_back(decision: Decision, record: Record, candidate: ModelRef) -> Decision:
    since = record.store.tags(candidate).get(tags.ROLLED_BACK_AT)
    if since is None:
        return decision
    back = f"rlhf rollback {project_of(candidate)} --to {candidate.version}"
    return decision.refuse(f"{candidate.uri} was rolled back at {since}; to restore it: {back}")


def _write_answer(record: Record, answer: Answer, candidate: ModelRef, runs: Iterable[str]) -> None:
    answer_tags = {
        tags.APPROVED: tags.flag(answer.approve == "yes"),
        tags.APPROVED_BY: answer.by,
        tags.APPROVAL_REASON: answer.reason,
        tags.APPROVED_AT: now(),
    }
    _tag_runs(record, runs, answer_tags)
    record.store.add_tags(candidate, answer_tags)


def _tag_runs(record: Record, runs: Iterable[str], new_tags: Mapping[str, str]) -> None:
    for run_id in runs:
        record.add_tags(run_id, new_tags)

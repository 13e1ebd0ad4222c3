"""The champion: which version it is, whether a new policy takes its place, and the way back.

The alias `champion` of `<project>-policy` says which version is in use. Every move of it is written
to the versions as tags: `promoted_at` and `replaced` to one that took the place of another,
`rolled_back_at`, `rolled_back_to` and `rolled_back_by` to one that was taken back.
"""

import logging
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Literal

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import RunTag
from prefect import task
from pydantic import BaseModel, ValidationError

from rlhf_core.errors import UserError
from rlhf_core.evaluation import gates
from rlhf_core.evaluation.gates import PromotionConfig, Verdict
from rlhf_core.stages.evaluation import Scorecard
from rlhf_core.types import Report
from tasks.history.runs import find_run
from tasks.prefect import events
from tasks.prefect.approval import CHAMPION, WAITING, Answer, answer_waiting, mark_waiting
from tasks.record.stage import open_stage
from tasks.record.tracking import connect
from tasks.registry.model_store import MlflowModelStore, ModelRef, PipelineRun, Ref
from tasks.settings import Settings, read_settings

COMPARED_WITH = "compared_with"  # tag of the pipeline's run
NOBODY = "none"
log = logging.getLogger(__name__)


@task(name="find-model", task_run_name="find {uri}")
def find_model(uri: str) -> ModelRef:
    """The explicit version that a registry address means, instead of training one."""
    return MlflowModelStore(connect(read_settings())).resolve(uri)


@task(name="find-champion", task_run_name="find champion")
def find_champion(run: PipelineRun, candidate: ModelRef | None = None) -> ModelRef | None:
    """The policy of the project that is in use now, if there is one, to compare with.

    A run that goes on, after a crash or an approval, keeps the one that it found first. If the
    candidate itself is in use already, it is the one that the candidate replaced.
    """
    client = connect(read_settings())
    known = client.get_run(run.run_id).data.tags.get(COMPARED_WITH)
    if known is not None:
        return _ref(known)
    store = MlflowModelStore(client)
    found = store.get_alias(f"{run.project}-policy", CHAMPION)
    if found is not None and found == candidate:
        found = _replaced(store, found)
    client.set_tag(run.run_id, COMPARED_WITH, _name(found))
    return found


@task(name="promote", task_run_name="promotion")
def promote(
    config: PromotionConfig,
    scorecard: Scorecard,
    candidate: ModelRef,
    champion: ModelRef | None,
    run: PipelineRun,
    answer: Answer | None = None,
) -> Verdict:
    """Move the alias `champion` to the candidate if every rule allows it; write down why.

    `champion` is the version that the evaluation compared with. When another has taken its place
    meanwhile, the comparison no longer holds and nothing moves. `answer` is what a person said; if
    the config wants one to be asked and there is none, the run waits for `rlhf promote`.
    """
    inputs: dict[str, Ref] = {"policy": candidate}
    if champion is not None:
        inputs[CHAMPION] = champion
    # By version: another one with the same bits is another candidate.
    beside: dict[str, BaseModel] = {"candidate": candidate}
    if answer is not None:
        beside["answer"] = answer
    with open_stage(
        "promotion", config=config, beside=beside, run=run, inputs=inputs, reuse="own"
    ) as stage:
        if stage.cached:
            return stage.kept(Verdict)
        client = connect(read_settings())
        store = MlflowModelStore(client)
        rules = gates.apply_rules(config, scorecard)
        verdict = gates.judge(config, scorecard)
        present = store.get_alias(candidate.name, CHAMPION)
        if answer is not None:
            verdict = _with_answer(verdict, answer)
        elif config.approval == "automatic":
            verdict = _unless_rolled_back(verdict, store, candidate)
        if present not in (champion, candidate):
            verdict = verdict.refuse(
                f"the champion is now {_name(present)}, but the evaluation compared with "
                f"{_name(champion)}"
            )
        asked = config.approval == "person" and present != candidate
        waits = asked and answer is None and verdict.promote
        if waits:
            verdict = verdict.refuse(f"it waits for a person: rlhf promote {run.run_id[:8]}")
            mark_waiting(client, run, candidate)
        table = pd.DataFrame([rule.model_dump() for rule in rules])
        stage.record(Report(tables={"promotion": table}))
        tags = {"promoted": str(verdict.promote).lower(), "reasons": "\n".join(verdict.reasons)}
        _tag_runs(client, (stage.run_id, run.run_id), tags)
        if answer is not None:
            _write_answer(client, answer, candidate, (stage.run_id, run.run_id))
        for reason in verdict.reasons:
            log.info(reason)
        if verdict.promote and present != candidate:
            _crown(client, run.project, candidate, champion, by=answer.by if answer else "")
        elif not verdict.promote and not waits:
            events.gate_refused(run.project, candidate, verdict.reasons)
        stage.keep(verdict)
        return verdict


def promote_run(name: str, *, by: str, reason: str, settings: Settings) -> str:
    """Say yes, as a person, to what a pipeline run waits for; tell what came of it.

    A run that is suspended in Prefect gets the answer and goes on there. The candidate of one that
    has finished, or has waited in vain, becomes the champion here and now.

    Raises:
        UserError: no run answers to the name; it waits for nobody; or the champion is no longer
            the one that its policy was compared with.
    """
    try:
        answer = Answer(approve="yes", by=by, reason=reason)
    except ValidationError as error:
        raise UserError(f"--{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}.") from None
    client = connect(settings)
    found = find_run(client, name)
    tags = found.data.tags
    if tags.get("approved") != WAITING:
        why = tags.get("reasons", "it has not come to its promotion").replace("\n", "; ")
        raise UserError(f"The run {found.info.run_name} does not wait for a person ({why}).")
    if settings.prefect_api_url and answer_waiting(tags["prefect.flow_run_id"], answer):
        return f"The run {found.info.run_name} has the answer and goes on."
    candidate, champion = ModelRef.parse(tags["candidate"]), _ref(tags[COMPARED_WITH])
    present = MlflowModelStore(client).get_alias(candidate.name, CHAMPION)
    if present not in (champion, candidate):
        raise UserError(
            f"The champion is now {_name(present)}, but {candidate.uri} was compared with "
            f"{_name(champion)}; run the pipeline again."
        )
    condition = f"tags.`mlflow.parentRunId` = '{found.info.run_id}' and tags.stage = 'promotion'"
    stages = client.search_runs([found.info.experiment_id], condition)
    runs = [found.info.run_id, *(stage.info.run_id for stage in stages)]
    _write_answer(client, answer, candidate, runs)
    _tag_runs(client, runs, {"promoted": "true"})
    if present != candidate:
        _crown(client, candidate.name.removesuffix("-policy"), candidate, champion, by=by)
    return f"{candidate.uri} is the champion."


def roll_back(project: str, *, to: int | None, by: str, settings: Settings) -> str:
    """Put the version that the champion replaced, or the one given, back in use.

    The version that is taken back is not promoted again by rules alone.

    Raises:
        UserError: there is no champion, it replaced no other version, or there is no version `to`.
    """
    client = connect(settings)
    store = MlflowModelStore(client)
    present = store.get_alias(f"{project}-policy", CHAMPION)
    if present is None:
        raise UserError(f"The project '{project}' has no champion.")
    target = ModelRef(name=present.name, version=to) if to else _replaced(store, present)
    if target is None:
        raise UserError(f"{present.uri} replaced no other version: choose one with --to VERSION.")
    store.require(target)
    if target == present:
        raise UserError(f"{present.uri} is the champion already.")
    back = {"rolled_back_at": _now(), "rolled_back_to": target.uri, "rolled_back_by": by}
    _tag_version(client, present, back)
    if "replaced" in store.tags(target):  # it was in use before, and keeps its own predecessor
        _move(client, project, target, present, how="rollback", by=by)
    else:
        _crown(client, project, target, present, how="rollback", by=by)
    return f"{target.uri} is the champion."


def _with_answer(verdict: Verdict, answer: Answer) -> Verdict:
    if answer.approve == "yes":
        return verdict.allow(f"approved by {answer.said}")
    return verdict.refuse(f"not approved by {answer.said}")


def _unless_rolled_back(verdict: Verdict, store: MlflowModelStore, candidate: ModelRef) -> Verdict:
    since = store.tags(candidate).get("rolled_back_at")
    if since is None:
        return verdict
    back = f"rlhf rollback {candidate.name.removesuffix('-policy')} --to {candidate.version}"
    return verdict.refuse(f"{candidate.uri} was rolled back at {since}; to use it again: {back}")


def _crown(
    client: MlflowClient,
    project: str,
    new: ModelRef,
    old: ModelRef | None,
    *,
    by: str,
    how: Literal["promotion", "rollback"] = "promotion",
) -> None:
    """Make a version the champion, with the former one as its predecessor."""
    _tag_version(client, new, {"promoted_at": _now(), "replaced": _name(old)})
    _move(client, project, new, old, how=how, by=by)


def _move(
    client: MlflowClient,
    project: str,
    new: ModelRef,
    old: ModelRef | None,
    *,
    by: str,
    how: Literal["promotion", "rollback"],
) -> None:
    # The tags before and the alias last: a crash in between leaves the champion as it was.
    store = MlflowModelStore(client)
    if "rolled_back_at" in store.tags(new):
        client.delete_model_version_tag(new.name, str(new.version), "rolled_back_at")
    store.set_alias(new, CHAMPION)
    events.champion_changed(project, old, new, how=how, by=by)


def _write_answer(
    client: MlflowClient, answer: Answer, candidate: ModelRef, runs: Iterable[str]
) -> None:
    tags = {
        "approved": str(answer.approve == "yes").lower(),
        "approved_by": answer.by,
        "approval_reason": answer.reason,
        "approved_at": _now(),
    }
    _tag_runs(client, runs, tags)
    _tag_version(client, candidate, tags)


def _tag_runs(client: MlflowClient, runs: Iterable[str], tags: Mapping[str, str]) -> None:
    for run_id in runs:
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def _tag_version(client: MlflowClient, ref: ModelRef, tags: Mapping[str, str]) -> None:
    for name, value in tags.items():
        client.set_model_version_tag(ref.name, str(ref.version), name, value)


def _replaced(store: MlflowModelStore, ref: ModelRef) -> ModelRef | None:
    return _ref(store.tags(ref).get("replaced", NOBODY))


def _name(ref: ModelRef | None) -> str:
    return ref.uri if ref else NOBODY


def _ref(name: str) -> ModelRef | None:
    return None if name == NOBODY else ModelRef.parse(name)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""The champion: which version it is, and whether a new policy takes its place."""

import logging

import pandas as pd
from mlflow.entities import RunTag
from prefect import task

from rlhf_core import gates
from rlhf_core.gates import PromotionConfig, Verdict
from rlhf_core.stages.evaluation import Scorecard
from rlhf_core.types import Report
from tasks.model_store import MlflowModelStore, ModelRef, PipelineRun, Ref
from tasks.settings import read_settings
from tasks.stage import open_stage
from tasks.tracking import connect

CHAMPION = "champion"
log = logging.getLogger(__name__)


@task(name="find-model", task_run_name="find {uri}")
def find_model(uri: str) -> ModelRef:
    """The explicit version that a registry address means, instead of training one."""
    return MlflowModelStore(connect(read_settings())).resolve(uri)


@task(name="find-champion", task_run_name="find champion")
def find_champion(run: PipelineRun) -> ModelRef | None:
    """The policy that is in use now, if there is one."""
    store = MlflowModelStore(connect(read_settings()))
    return store.get_alias(f"{run.project}-policy", CHAMPION)


@task(name="promote", task_run_name="promotion")
def promote(
    config: PromotionConfig,
    scorecard: Scorecard,
    candidate: ModelRef,
    champion: ModelRef | None,
    run: PipelineRun,
) -> Verdict:
    """Move the alias `champion` to the candidate if every rule allows it; write down why.

    `champion` is the version that the evaluation compared with. When another has taken its place
    meanwhile, the comparison no longer holds and nothing moves.
    """
    inputs: dict[str, Ref] = {"policy": candidate}
    if champion is not None:
        inputs[CHAMPION] = champion
    with open_stage("promotion", config=config, run=run, inputs=inputs) as stage:
        verdict = gates.judge(config, scorecard)
        client = connect(read_settings())
        store = MlflowModelStore(client)
        present = store.get_alias(candidate.name, CHAMPION)
        if present != champion:
            verdict = verdict.refuse(
                f"the champion is now {present.uri if present else 'none'}, but the evaluation "
                f"compared with {champion.uri if champion else 'none'}"
            )
        stage.record(Report(tables={"promotion": pd.DataFrame({"reason": list(verdict.reasons)})}))
        tags = {"promoted": str(verdict.promote).lower(), "reasons": "\n".join(verdict.reasons)}
        for run_id in (stage.run_id, run.run_id):
            client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
        for reason in verdict.reasons:
            log.info(reason)
        if verdict.promote:
            store.set_alias(candidate, CHAMPION)
        return verdict

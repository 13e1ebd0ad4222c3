"""The tournament of checkpoints as a Prefect task."""

import logging
from typing import cast

from pydantic import BaseModel, ConfigDict

from rlhf_core.evaluation.tournament.result import TournamentResult
from rlhf_core.judges.load import JUDGE
from rlhf_core.settings.judge import JudgeConfig
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.tournament import TournamentConfig
from tasks.prefect.ui import stage_task
from tasks.record.record import Record
from tasks.registry.refs import DatasetRef, ModelRef, PipelineRun, Ref
from tasks.steps.policy import TrainedPolicy
from tasks.steps.stage import StageOutputs, do_stage

log = logging.getLogger(__name__)


class ChosenPolicy(BaseModel):
    """The policy that a tournament chose, and its result."""

    model_config = ConfigDict(frozen=True)

    policy: ModelRef  # the last one, or a new version with the files of a milestone
    tournament: TournamentResult


@stage_task("tournament", "tournament")
def hold_tournament(
    config: TournamentConfig,
    sampling: SamplingConfig,
    judge: JudgeConfig,
    sft: ModelRef,
    trained: TrainedPolicy,
    reward_model: ModelRef,
    data: DatasetRef,
    run: PipelineRun,
) -> ChosenPolicy:
    """Compare checkpoints of the policy; register the strongest unless it is the last one."""
    inputs: dict[str, Ref] = {
        "policy": trained.policy,
        "data": data,
        "sft": sft,
        "reward": reward_model,
        **trained.milestones,
    }
    if judge.is_registered:
        inputs[JUDGE] = Record.open(patient=True).store.resolve(judge.source)

    def returns(made: StageOutputs) -> ChosenPolicy:
        result = cast(TournamentResult, made.result)
        policy = made.models["policy"] if result.replaces_last else trained.policy
        log.info("the policy is %s: %s", policy.uri, result.sentence())
        return ChosenPolicy(policy=policy, tournament=result)

    return do_stage(
        "tournament",
        config,
        run,
        inputs=inputs,
        sections={"sampling": sampling, "judge": judge},
        returns=returns,
    )

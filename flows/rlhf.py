"""The whole pipeline: data, SFT, reward model, policy, evaluation, promotion."""

from prefect import flow
from pydantic import BaseModel, ConfigDict

from flows.config import PipelineConfig
from flows.logs import shorten_user_errors
from rlhf_core.gates import Verdict
from rlhf_core.stages.evaluation import Scorecard
from tasks.data import prepare_data
from tasks.evaluation import evaluate
from tasks.model_store import DatasetRef, ModelRef, PipelineRun
from tasks.policy import find_rewards, train_policy
from tasks.promotion import find_champion, find_model, promote
from tasks.report import write_report
from tasks.reward_model import train_reward_model
from tasks.sft import train_sft
from tasks.stage import open_run

# At import, as Prefect refuses bad parameters before the flow's first line.
shorten_user_errors()


class PipelineResult(BaseModel):
    """What a pipeline made, by explicit version, and what it found out."""

    model_config = ConfigDict(frozen=True)

    run: PipelineRun
    data: DatasetRef
    sft: ModelRef
    reward_model: ModelRef
    policy: ModelRef
    critic: ModelRef | None
    scorecard: Scorecard
    verdict: Verdict
    report: str


@flow(name="rlhf", flow_run_name="{config.project}-seed-{config.seed}")
def rlhf(config: PipelineConfig) -> PipelineResult:
    """Turn demonstrations and preferences into a policy, and promote it if it is better."""
    with open_run(config.project, config, config.seed) as run:
        other_rewards = find_rewards(config.policy)
        data = prepare_data(config.data, config.model, config.length_limits, run)

        if config.sft.reuse:
            sft = find_model(config.sft.reuse)
        else:
            sft = train_sft(config.sft, config.model, data, run)

        if config.reward_model.reuse:
            reward_model = find_model(config.reward_model.reuse)
        else:
            reward_model = train_reward_model(config.reward_model, config.sampling, sft, data, run)

        trained = train_policy(
            config.algorithm,
            config.policy,
            config.sampling,
            sft,
            reward_model,
            other_rewards,
            data,
            run,
        )

        champion = find_champion(run)
        scorecard = evaluate(
            config.evaluation,
            config.sampling,
            sft,
            trained.policy,
            reward_model,
            champion,
            data,
            run,
        )
        verdict = promote(config.promotion, scorecard, trained.policy, champion, run)

        models = {"sft": sft, "reward": reward_model, "policy": trained.policy}
        if trained.critic is not None:
            models["critic"] = trained.critic
        return PipelineResult(
            run=run,
            data=data,
            sft=sft,
            reward_model=reward_model,
            policy=trained.policy,
            critic=trained.critic,
            scorecard=scorecard,
            verdict=verdict,
            report=write_report(scorecard, verdict, config.algorithm, models, run),
        )

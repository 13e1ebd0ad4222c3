"""Policy optimisation as a Prefect task."""

from prefect import task
from pydantic import BaseModel, ConfigDict

from rlhf_core.sampling import SamplingConfig
from rlhf_core.stages import ppo
from rlhf_core.stages.ppo import PPOConfig
from tasks.model_store import DatasetRef, ModelRef, PipelineRun, Ref
from tasks.settings import read_settings
from tasks.stage import open_stage


class TrainedPolicy(BaseModel):
    """What PPO leaves in the registry."""

    model_config = ConfigDict(frozen=True)

    policy: ModelRef
    critic: ModelRef


@task(name="ppo", task_run_name="PPO")
def train_ppo(
    config: PPOConfig,
    sampling: SamplingConfig,
    sft: ModelRef,
    reward_model: ModelRef,
    data: DatasetRef,
    run: PipelineRun,
) -> TrainedPolicy:
    """Optimise the SFT policy against the reward; register `<project>-policy` and `-critic`."""
    inputs: dict[str, Ref] = {"sft": sft, "reward": reward_model, "data": data}
    with open_stage("ppo", config=config, run=run, inputs=inputs) as stage:
        policy, critic = stage.work / "policy", stage.work / "critic"
        report = ppo.train_ppo(
            config,
            sampling,
            sft=stage.fetch(sft),
            reward_model=stage.fetch(reward_model),
            data=stage.fetch(data),
            policy_output=policy,
            critic_output=critic,
            seed=run.seed,
            device=read_settings().device,
            logger=stage.logger,
        )
        stage.record(report)
        return TrainedPolicy.model_validate(stage.publish({"policy": policy, "critic": critic}))

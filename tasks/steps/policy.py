"""Policy optimisation as a Prefect task: PPO, RLOO, GRPO or DPO."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

from prefect import task
from pydantic import BaseModel, ConfigDict

from rlhf_core.backbone.sampling import SamplingConfig
from rlhf_core.rewards.scoring import PIPELINE_REWARD, RewardTerm, load_function
from rlhf_core.stages.dpo import DPOConfig
from rlhf_core.stages.grpo import GRPOConfig
from rlhf_core.stages.ppo import PPOConfig
from rlhf_core.stages.rloo import RLOOConfig
from tasks.prefect.ui import stage_task
from tasks.record.stage import open_training
from tasks.record.tracking import connect
from tasks.registry.model_store import DatasetRef, MlflowModelStore, ModelRef, PipelineRun, Ref
from tasks.settings import read_settings

Algorithm = Literal["ppo", "rloo", "grpo", "dpo"]
PolicyConfig: TypeAlias = PPOConfig | RLOOConfig | GRPOConfig | DPOConfig


class TrainedPolicy(BaseModel):
    """What policy optimisation leaves in the registry; of the algorithms, PPO has a critic."""

    model_config = ConfigDict(frozen=True)

    policy: ModelRef
    critic: ModelRef | None


@task(name="find-rewards", task_run_name="find rewards")
def find_rewards(config: PolicyConfig) -> dict[str, ModelRef]:
    """The registered reward models that the policy learns from beside the pipeline's own: by the
    source in the config, the explicit version that it means now.

    Raises: ModelError for a model that is not there, ConfigError for a function that cannot be
        imported.
    """
    if isinstance(config, DPOConfig):
        return {}
    for term in config.rewards:
        if not term.is_model:
            load_function(term.source, setting="the reward")
    store = MlflowModelStore(connect(read_settings()))
    sources = _reward_sources(config)
    return {source: store.resolve(source) for source in sources if source != PIPELINE_REWARD}


@stage_task("policy", "{algorithm}")
def train_policy(
    algorithm: Algorithm,
    config: PolicyConfig,
    sampling: SamplingConfig,
    sft: ModelRef,
    reward_model: ModelRef,
    other_rewards: Mapping[str, ModelRef],
    data: DatasetRef,
    run: PipelineRun,
) -> TrainedPolicy:
    """Optimise the SFT policy; register `<project>-policy`, and for PPO `<project>-critic`."""
    known = {PIPELINE_REWARD: reward_model, **other_rewards}
    rewards = {source: known[source] for source in _reward_sources(config)}
    inputs: dict[str, Ref] = {"sft": sft, "data": data}
    inputs |= {_role(source): ref for source, ref in rewards.items()}
    beside = {} if isinstance(config, DPOConfig) else {"sampling": sampling}
    with open_training(algorithm, config=config, beside=beside, run=run, inputs=inputs) as stage:
        kinds = ["policy", "critic"] if isinstance(config, PPOConfig) else ["policy"]
        if not stage.cached:
            outputs = {kind: stage.work / kind for kind in kinds}
            paths = {"sft": stage.fetch(sft), "data": stage.fetch(data)}
            paths |= {f"{kind}_output": path for kind, path in outputs.items()}
            reward_models = {source: stage.fetch(ref) for source, ref in rewards.items()}
            stage.record(stage.train(paths, reward_models))
            stage.publish(outputs)
        made = {kind: stage.model(kind) for kind in kinds}
        return stage.result(TrainedPolicy(policy=made["policy"], critic=made.get("critic")))


def _reward_sources(config: PolicyConfig) -> list[str]:
    """The reward models that an algorithm needs; the critic of PPO starts from the pipeline's."""
    if isinstance(config, DPOConfig):
        return []
    critic = [PIPELINE_REWARD] if isinstance(config, PPOConfig) else []
    return list(dict.fromkeys([*critic, *(t.source for t in config.rewards if t.is_model)]))


def _role(source: str) -> str:
    """What a reward model is called among the inputs of the run."""
    return "reward" if source == PIPELINE_REWARD else f"reward.{RewardTerm(source=source).name}"

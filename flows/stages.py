"""The stages one by one, each a flow, on what is registered already.

A model is given by its address in the registry and resolved to a version before anything starts.
The data are those that the given model learnt from, or those of another run by address; so
`prepare` brings new data to a model that is there.
"""

from typing import Annotated

from pydantic import Field

from flows.config import (
    Algorithm,
    DPOSection,
    GRPOSection,
    PPOSection,
    RLOOSection,
    RunConfig,
)
from flows.pipeline_flow import pipeline_flow
from rlhf_core.backbone.models import ModelConfig
from rlhf_core.backbone.sampling import SamplingConfig
from rlhf_core.evaluation.gates import RewardGateConfig
from rlhf_core.stages.dpo import DPOConfig
from rlhf_core.stages.evaluation import EvaluationConfig, Scorecard
from rlhf_core.stages.grpo import GRPOConfig
from rlhf_core.stages.ppo import PPOConfig
from rlhf_core.stages.prepare import DataConfig, LengthLimits
from rlhf_core.stages.reward_model import RewardModelConfig
from rlhf_core.stages.rloo import RLOOConfig
from rlhf_core.stages.sft import SFTConfig
from tasks.record.stage import open_run
from tasks.registry.model_store import DatasetRef, ModelRef
from tasks.registry.registered import find_data, find_parent
from tasks.steps.data import prepare_data
from tasks.steps.evaluation import evaluate
from tasks.steps.policy import PolicyConfig, TrainedPolicy, find_rewards, train_policy
from tasks.steps.promotion import find_champion, find_model
from tasks.steps.reward_model import check_reward_model, train_reward_model
from tasks.steps.sft import train_sft

_MODEL = r"models:/[A-Za-z0-9][A-Za-z0-9._-]*(/[1-9][0-9]*|@[A-Za-z0-9_-]+)"
_DATA = r"runs:/[0-9a-f]{32}/data"
ModelAddress = Annotated[str, Field(pattern=f"^{_MODEL}$")]
OptionalModel = Annotated[str, Field(pattern=f"^({_MODEL})?$")]
OptionalData = Annotated[str, Field(pattern=f"^({_DATA})?$")]


class PrepareFlowConfig(RunConfig):
    """Data to check, split and store."""

    model: ModelConfig = Field(
        default_factory=ModelConfig, description="The base model, in whose tokens is counted"
    )
    data: DataConfig = Field(default_factory=DataConfig, description="What to learn from")
    lengths: LengthLimits = Field(description="What the report counts as too long")


class SFTFlowConfig(RunConfig):
    """Supervised fine-tuning of a base model."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="The base model")
    data: DataConfig = Field(default_factory=DataConfig, description="What to learn from")
    sft: SFTConfig = Field(default_factory=SFTConfig, description="Supervised fine-tuning")


class RewardModelFlowConfig(RunConfig):
    """A reward model, from a registered SFT policy."""

    sft: ModelAddress = Field(
        description="The SFT policy to start from: models:/NAME/VERSION or models:/NAME@ALIAS"
    )
    data: OptionalData = Field(
        "",
        description="runs:/RUN_ID/data of a prepare stage; empty = what the SFT policy learnt from",
    )
    sampling: SamplingConfig = Field(
        default_factory=SamplingConfig, description="How responses are drawn"
    )
    reward_model: RewardModelConfig = Field(
        default_factory=RewardModelConfig, description="Learning a reward from preferences"
    )


class PolicyFlowConfig(RunConfig):
    """A policy, from a registered reward model and the SFT policy under it."""

    reward_model: ModelAddress = Field(
        description="The reward model: models:/NAME/VERSION or models:/NAME@ALIAS"
    )
    sft: OptionalModel = Field(
        "",
        description="The SFT policy to start from; empty = the one the reward model was made from",
    )
    data: OptionalData = Field(
        "",
        description="runs:/RUN_ID/data of a prepare stage; empty = what the SFT policy learnt from",
    )
    sampling: SamplingConfig = Field(
        default_factory=SamplingConfig, description="How responses are drawn"
    )
    algorithm: Algorithm = "ppo"
    ppo: PPOSection = Field(default_factory=PPOConfig)
    rloo: RLOOSection = Field(default_factory=RLOOConfig)
    grpo: GRPOSection = Field(default_factory=GRPOConfig)
    dpo: DPOSection = Field(default_factory=DPOConfig)

    @property
    def policy(self) -> PolicyConfig:
        """The settings of the chosen algorithm."""
        section: PolicyConfig = getattr(self, self.algorithm)
        return section


class EvaluationFlowConfig(RunConfig):
    """A registered policy, held against SFT, best-of-n and the champion."""

    policy: ModelAddress = Field(
        description="The policy to judge: models:/NAME/VERSION or models:/NAME@ALIAS"
    )
    sft: OptionalModel = Field(
        "", description="What it is compared with; empty = the SFT policy that it was made from"
    )
    reward_model: OptionalModel = Field(
        "", description="Who judges; empty = the reward model that the policy was made from"
    )
    data: OptionalData = Field(
        "", description="runs:/RUN_ID/data, for its held-out prompts; empty = those of the policy"
    )
    sampling: SamplingConfig = Field(
        default_factory=SamplingConfig, description="How responses are drawn"
    )
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="Comparing on held-out prompts"
    )


@pipeline_flow("prepare")
def prepare(config: PrepareFlowConfig) -> DatasetRef:
    """Check and split data, and store them for the other stages."""
    with open_run(config.project, config, config.seed) as run:
        return prepare_data(config.data, config.model, config.lengths, run)


@pipeline_flow("sft")
def sft(config: SFTFlowConfig) -> ModelRef:
    """Fine-tune a base model on demonstrations."""
    longest = config.sft.max_length
    limits = LengthLimits(prompt=longest, response=longest, sft=longest, reward=longest)
    with open_run(config.project, config, config.seed) as run:
        data = prepare_data(config.data, config.model, limits, run)
        return train_sft(config.sft, config.model, data, run)


@pipeline_flow("reward-model")
def reward_model(config: RewardModelFlowConfig) -> ModelRef:
    """Learn a reward from preferences, starting from a registered SFT policy."""
    start = find_model(config.sft)
    data = find_data(config.data, start)
    with open_run(config.project, config, config.seed) as run:
        made = train_reward_model(config.reward_model, config.sampling, start, data, run)
        check_reward_model(RewardGateConfig(), made)
        return made


@pipeline_flow("policy")
def policy(config: PolicyFlowConfig) -> TrainedPolicy:
    """Optimise a registered SFT policy on a registered reward model."""
    reward = find_model(config.reward_model)
    start = find_parent(config.sft, reward, "sft")
    data = find_data(config.data, start)
    others = find_rewards(config.policy)
    with open_run(config.project, config, config.seed) as run:
        return train_policy(
            config.algorithm, config.policy, config.sampling, start, reward, others, data, run
        )


@pipeline_flow("evaluation")
def evaluation(config: EvaluationFlowConfig) -> Scorecard:
    """Hold a registered policy against SFT, best-of-n and the champion; nothing is promoted."""
    judged = find_model(config.policy)
    start = find_parent(config.sft, judged, "sft")
    reward = find_parent(config.reward_model, judged, "reward")
    data = find_data(config.data, judged)
    with open_run(config.project, config, config.seed) as run:
        champion = find_champion(run)
        return evaluate(
            config.evaluation,
            config.sampling,
            start,
            judged,
            reward,
            None if champion == judged else champion,
            data,
            run,
        )

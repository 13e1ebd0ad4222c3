"""Settings that PPO, RLOO and GRPO share."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf_core.functional.kinds import Combination, KLKind, MissingEOS
from rlhf_core.settings.monitor import MonitorConfig
from rlhf_core.settings.rewards import MemberSection, RewardTerm, ShapingSection, check_terms
from rlhf_core.settings.training import TrainingSection

MAX_ERROR = 0.2


class OnPolicySection(TrainingSection, MemberSection):
    """Settings that PPO, RLOO and GRPO share."""

    learning_rate: float = Field(3e-6, gt=0, description="Peak learning rate of the policy")
    iterations: int = Field(
        100, ge=1, le=1_000_000, description="Roll-outs, each followed by its updates"
    )
    rollout_size: int = Field(
        128, ge=2, le=1_000_000, description="Responses sampled in one iteration"
    )
    epochs: int = Field(
        4, ge=1, le=10_000, description="Passes over the responses of one iteration"
    )
    rewards: tuple[RewardTerm, ...] = Field(
        (RewardTerm(),), min_length=1, description="The reward of a response: one part or several"
    )
    combine_rewards: Combination = Field(
        "sum",
        description="How the weighted parts are combined: their sum, mean, minimum (min), or "
        "mean_minus_variance, which penalises disagreement",
    )
    variance_coef: float = Field(
        1.0, ge=0, description="λ of mean_minus_variance: price of the parts' variance"
    )
    shaping: ShapingSection = Field(
        default_factory=ShapingSection,
        description="What is made of the score before the policy learns from it",
    )
    clip_range: float = Field(0.2, gt=0, lt=1, description="ε: the ratio is clipped to 1 ± ε")
    dual_clip: float = Field(
        0.0, ge=0, description="c > 1 bounds the loss of bad actions at c·|advantage|; 0 = off"
    )
    kl_coef: float = Field(0.05, ge=0, description="β: price of one nat of KL (reward units)")
    kl_budget: float = Field(
        0.0, ge=0, description="KL at which the run stops or warns (nats per sequence); 0 = none"
    )
    at_kl_budget: Literal["stop", "warn"] = Field("stop", description="What happens at kl_budget")
    keep_every: int = Field(
        0,
        ge=0,
        description="Register the policy as PROJECT-milestone after every this many iterations; "
        "0 = only the last policy",
    )
    update_kl_limit: float = Field(
        0.05,
        ge=0,
        description="The epochs of an iteration end early when the policy has moved 1.5 times this "
        "far from the one that sampled (nats a token); 0 = never",
    )
    monitor: MonitorConfig = Field(
        default_factory=MonitorConfig,
        description="Watches the policy on fixed held-out prompts, and acts when it is gamed",
    )
    missing_eos: MissingEOS = Field(
        "subtract", description="How the score of a response that never ends is changed"
    )
    missing_eos_value: float = Field(
        1.0, description="The penalty to subtract, or the score to use instead (reward units)"
    )

    @model_validator(mode="after")
    def _minibatch_within_rollout(self) -> Self:
        if self.batch_size > self.rollout_size:
            raise ValueError(
                f"batch_size {self.batch_size} is larger than rollout_size "
                f"{self.rollout_size}; lower one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _dual_clip_off_or_above_one(self) -> Self:
        if 0 < self.dual_clip <= 1:
            raise ValueError(f"dual_clip {self.dual_clip:g} must be above 1, or 0 for no dual clip")
        return self

    @model_validator(mode="after")
    def _terms_can_be_told_apart(self) -> Self:
        check_terms(self.rewards)
        return self

    @property
    def reward_roles(self) -> tuple[str, ...]:
        """The roles of the reward models that score responses during training."""
        return tuple(term.role for term in self.rewards if term.is_model)

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole run, if no epoch ends early."""
        return self.iterations * self.epochs * -(-self.rollout_size // self.batch_size)


class KLSection(OnPolicySection):
    """Settings of a KL penalty in the reward."""

    kl_control: Literal["fixed", "adaptive"] = Field(
        "adaptive", description="Whether β is fixed, or adapts to hold kl_target"
    )
    kl_target: float = Field(6.0, gt=0, description="KL that adaptive β holds (nats per sequence)")
    kl_horizon: float = Field(
        10_000, gt=0, description="Sequences over which β changes by at most a fifth"
    )
    kl_estimator: KLKind = Field("k1", description="Which estimate of the KL is the penalty")

    @model_validator(mode="after")
    def _adaptive_control_can_move(self) -> Self:
        if self.kl_control == "fixed":
            return self
        if self.kl_coef == 0:
            raise ValueError("kl_coef 0 cannot adapt; raise it, or set kl_control to fixed")
        if MAX_ERROR * self.rollout_size >= self.kl_horizon:
            raise ValueError(
                f"kl_horizon {self.kl_horizon:g} is too short for rollout_size "
                f"{self.rollout_size}: raise it above {MAX_ERROR * self.rollout_size:g}"
            )
        return self


class GroupSection(OnPolicySection):
    """Settings of algorithms that compare the responses to one prompt."""

    group_size: int = Field(4, ge=2, description="Responses to each prompt in an iteration")

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        for name in ("rollout_size", "batch_size"):
            if getattr(self, name) % self.group_size:
                raise ValueError(
                    f"{name} {getattr(self, name)} is not a multiple of group_size "
                    f"{self.group_size}; change one of them"
                )
        return self


class PPOConfig(KLSection):
    """Settings of PPO."""

    critic_learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate of the critic")
    value_clip_range: float = Field(
        0.2, gt=0, description="New values are clipped to this distance from the old (reward units)"
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount of later rewards, per token")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="λ of generalised advantage estimation")

    @property
    def reward_roles(self) -> tuple[str, ...]:
        """Those of the reward, and the pipeline's reward model, from which the critic starts."""
        return tuple(dict.fromkeys(("reward", *super().reward_roles)))


class RLOOConfig(KLSection, GroupSection):
    """Settings of RLOO."""


class GRPOConfig(GroupSection):
    """Settings of GRPO."""

    scale: bool = Field(
        True, description="Divide by the group's standard deviation; false is Dr. GRPO"
    )

"""GRPO: a response is as good as it is better than the others to the same prompt, in their spread.

    Aᵢ = (scoreᵢ - mean of the group) / (standard deviation of the group)
    maximise E[Σₜ min(ρᵢₜ·Aᵢ, clip(ρᵢₜ, 1 - ε, 1 + ε)·Aᵢ) - β·k3ᵢₜ]

No critic; the KL to the reference is part of the loss and not of the reward, and is differentiated.
Papers: Shao et al. 2024, https://arxiv.org/abs/2402.03300; without the division by the spread Liu
et al. 2025, https://arxiv.org/abs/2503.20783.

Deviations from those, each on purpose (the long version is docs/algorithms/grpo.md):
1. Every mean runs over the tokens of the minibatch, as in PPO here and as Yu et al. 2025 do
   (https://arxiv.org/abs/2503.14476), and not first over each response.
2. Log-probabilities are those at `sampling.temperature`, at which the responses were drawn.
3. A response that never ends is judged by `missing_eos`, as in PPO.
"""

from functools import partial
from pathlib import Path

from pydantic import Field
from torch import Tensor

from rlhf_core.functional.advantages import group_relative
from rlhf_core.functional.rewards import missing_eos
from rlhf_core.kl_control import FixedKL
from rlhf_core.onpolicy import (
    Given,
    GroupSection,
    OnPolicyReport,
    describe,
    group_spread,
    iterate,
    load_actors,
    ready_rewards,
    save_policy,
)
from rlhf_core.optim import Learner
from rlhf_core.policy_update import optimise_policy
from rlhf_core.sampling import SamplingConfig
from rlhf_core.types import Rollout


class GRPOConfig(GroupSection):
    """Settings of GRPO."""

    scale: bool = Field(
        True, description="Divide by the spread of the group; off is known as Dr. GRPO"
    )


def train_grpo(
    config: GRPOConfig, sampling: SamplingConfig, given: Given, *, policy_output: Path
) -> OnPolicyReport:
    """Optimise the SFT policy against the reward; write the policy.

    Raises: ModelError, DataError, ConfigError for what a user can mend; NumericsError when a score,
    loss or gradient is no longer finite, or an invariant is broken; CheckpointError when the
    checkpoints are of another run.
    """
    policy, reference, tokenizer = load_actors(config, given)
    learner = Learner(policy, config, config.updates, ranks=given.ranks)
    report = iterate(
        "grpo",
        config,
        sampling,
        given,
        policy=policy,
        reference=reference,
        critic=None,
        ready=ready_rewards(config, given, policy),
        tokenizer=tokenizer,
        learners={"policy": learner},
        controller=FixedKL(config.kl_coef),
        judge=partial(judge, config=config),
        optimise=partial(
            optimise_policy,
            learner=learner,
            config=config,
            temperature=sampling.temperature,
            ranks=given.ranks,
            kl_coef=config.kl_coef,
        ),
    )
    save_policy(policy, tokenizer, policy_output, given, report.iterations)
    return report


def judge(
    rollout: Rollout, kl_coef: float, *, config: GRPOConfig
) -> tuple[Tensor, dict[str, float]]:
    """(B, R) advantages, the same for every token of a response, and what they say."""
    scores = missing_eos(
        rollout.scores,
        rollout.responses.finished,
        mode=config.missing_eos,
        value=config.missing_eos_value,
    )
    stats = describe(rollout, kl_coef) | {
        "objective/reward": scores.mean().item(),
        "group/spread": group_spread(scores, config.group_size),
    }
    advantages = group_relative(scores, config.group_size, scale=config.scale)
    return advantages.unsqueeze(-1) * rollout.responses.mask, stats

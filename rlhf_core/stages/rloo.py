"""RLOO: each response is compared with the others to the same prompt; no critic is needed.

    Rᵢ = scoreᵢ - β·Σₜ klᵢₜ,   Aᵢ = Rᵢ - mean of the Rⱼ, j ≠ i, of the same prompt
    maximise E[Σₜ min(ρᵢₜ·Aᵢ, clip(ρᵢₜ, 1 - ε, 1 + ε)·Aᵢ)]

The other responses are an unbiased baseline for REINFORCE on whole responses. Papers: Ahmadian et
al. 2024, https://arxiv.org/abs/2402.14740; Kool et al. 2019,
https://openreview.net/forum?id=r1lgTGL5DE.

Deviations from those, each on purpose (the long version is docs/algorithms/rloo.md):
1. Ratios are clipped token by token as in PPO, so that several epochs are safe; in the first update
   of a roll-out every ratio is 1, and its gradient is that of REINFORCE.
2. The KL estimate of a response is priced within its reward, as there, and β may adapt.
3. Advantages are not whitened over the batch.
"""

from functools import partial
from pathlib import Path

from torch import Tensor

from rlhf_core.backbone.sampling import SamplingConfig
from rlhf_core.functional.advantages import leave_one_out
from rlhf_core.functional.logprobs import kl_estimate
from rlhf_core.functional.rewards import missing_eos
from rlhf_core.onpolicy.loop import (
    Given,
    GroupSection,
    KLSection,
    OnPolicyReport,
    describe,
    group_spread,
    iterate,
    load_actors,
    ready_rewards,
    save_policy,
)
from rlhf_core.onpolicy.update import optimise_policy
from rlhf_core.training.learner import Learner
from rlhf_core.types import Rollout


class RLOOConfig(KLSection, GroupSection):
    """Settings of RLOO."""


def train_rloo(
    config: RLOOConfig, sampling: SamplingConfig, given: Given, *, policy_output: Path
) -> OnPolicyReport:
    """Optimise the SFT policy against the reward; write the policy.

    Raises: ModelError, DataError, ConfigError for what a user can mend; NumericsError when a score,
    loss or gradient is no longer finite, or an invariant is broken; CheckpointError when the
    checkpoints are of another run.
    """
    policy, reference, tokenizer = load_actors(config, given)
    learner = Learner(policy, config, config.updates, ranks=given.ranks)
    report = iterate(
        "rloo",
        config,
        sampling,
        given,
        policy=policy,
        reference=reference,
        critic=None,
        ready=ready_rewards(config, given, policy),
        tokenizer=tokenizer,
        learners={"policy": learner},
        controller=config.kl_controller(),
        judge=partial(judge, config=config),
        optimise=partial(
            optimise_policy,
            learner=learner,
            config=config,
            temperature=sampling.temperature,
            ranks=given.ranks,
            mean_over="responses",
        ),
    )
    save_policy(policy, tokenizer, policy_output, given, report.iterations)
    return report


def judge(
    rollout: Rollout, kl_coef: float, *, config: RLOOConfig
) -> tuple[Tensor, dict[str, float]]:
    """(B, R) advantages, the same for every token of a response, and what they say."""
    mask = rollout.responses.mask
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, kind=config.kl_estimator)
    scores = missing_eos(
        rollout.scores,
        rollout.responses.finished,
        mode=config.missing_eos,
        value=config.missing_eos_value,
    )
    rewards = scores - kl_coef * kl.masked_fill(~mask, 0).sum(-1)
    stats = describe(rollout, kl_coef) | {
        "objective/reward": rewards.mean().item(),
        "group/spread": group_spread(rewards, config.group_size),
    }
    advantages = leave_one_out(rewards, config.group_size)
    return advantages.unsqueeze(-1) * mask, stats

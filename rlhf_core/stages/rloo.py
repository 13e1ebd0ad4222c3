"""RLOO: compare each response with the others to the same prompt; no critic is needed.

    Rᵢ = scoreᵢ - β·Σₜ klᵢₜ,   Aᵢ = Rᵢ - mean of the Rⱼ, j ≠ i, of the same prompt
    maximise E[Σₜ min(ρᵢₜ·Aᵢ, clip(ρᵢₜ, 1 - ε, 1 + ε)·Aᵢ)]

The other responses are an unbiased baseline for REINFORCE on whole responses. Papers: Ahmadian et
al. 2024, https://arxiv.org/abs/2402.14740; Kool et al. 2019,
https://openreview.net/forum?id=r1lgTGL5DE.

Deliberate deviations from the papers (details in docs/algorithms/rloo.md):
1. Ratios are clipped token by token as in PPO, so that several epochs are safe; in the first update
   of a roll-out every ratio is 1, and the gradient is that of REINFORCE.
2. The KL penalty is part of the reward, as in the papers, but β may adapt.
3. Advantages are not whitened over the batch.
"""

from functools import partial

from torch import Tensor

from rlhf_core.functional.advantages import leave_one_out
from rlhf_core.functional.logprobs import kl_estimate
from rlhf_core.functional.rewards import missing_eos
from rlhf_core.onpolicy.actors import Actors
from rlhf_core.onpolicy.kl_control import controller_of
from rlhf_core.onpolicy.loop import iterate
from rlhf_core.onpolicy.report import OnPolicyReport, describe, group_std
from rlhf_core.onpolicy.update import optimise_policy
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.onpolicy import RLOOConfig
from rlhf_core.training.learner import Learner
from rlhf_core.types import Rollout
from rlhf_core.work import Work


def train_rloo(config: RLOOConfig, work: Work) -> OnPolicyReport:
    """Optimise the SFT policy against the reward; write the policy.

    Args:
        work: inputs sft, data and the models of `config.rewards`; output policy, and milestones if
            `config.keep_every` is set; section sampling.

    Raises: ModelError, DataError, ConfigError for errors that a user can fix; NumericsError when a
    score, loss or gradient is not finite, or an invariant is broken; CheckpointError when the
    checkpoints are from another run.
    """
    actors = Actors.load(config, work)
    learner = Learner(actors.policy, config, config.updates, ranks=work.ranks)
    report = iterate(
        "rloo",
        config,
        work,
        actors,
        learners={"policy": learner},
        controller=controller_of(config),
        credit=partial(assign_credit, config=config),
        update=partial(
            optimise_policy,
            learner=learner,
            config=config,
            temperature=work.section(SamplingConfig).temperature,
            ranks=work.ranks,
            mean_over="responses",
        ),
    )
    work.logger.phase("saving the policy")
    actors.save(work.outputs["policy"], work, report.iterations)
    return report


def assign_credit(
    rollout: Rollout, kl_coef: float, *, config: RLOOConfig
) -> tuple[Tensor, dict[str, float]]:
    """(B, R) advantages, the same for every token of a response, and metrics."""
    mask = rollout.responses.mask
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, kind=config.kl_estimator)
    scores = missing_eos(
        rollout.outcomes,
        rollout.responses.finished,
        mode=config.missing_eos,
        value=config.missing_eos_value,
    )
    rewards = scores - kl_coef * kl.masked_fill(~mask, 0).sum(-1)
    stats = describe(rollout, kl_coef) | {
        "objective/reward": rewards.mean().item(),
        "group/spread": group_std(rewards, config.group_size),
    }
    advantages = leave_one_out(rewards, config.group_size)
    return advantages.unsqueeze(-1) * mask, stats

"""GRPO: compare each response with its group, in units of the group's standard deviation.

    Aᵢ = (scoreᵢ - mean of the group) / (standard deviation of the group)
    maximise E[Σₜ min(ρᵢₜ·Aᵢ, clip(ρᵢₜ, 1 - ε, 1 + ε)·Aᵢ) - β·k3ᵢₜ]

There is no critic. The KL to the reference is part of the loss, not of the reward, and is
differentiated. Papers: Shao et al. 2024, https://arxiv.org/abs/2402.03300; without the division by
the standard deviation: Liu et al. 2025, https://arxiv.org/abs/2503.20783.

Deliberate deviations from the papers (details in docs/algorithms/grpo.md):
1. Every mean runs over the tokens of the minibatch, as in our PPO and in Yu et al. 2025
   (https://arxiv.org/abs/2503.14476), and not first over each response.
2. Log-probabilities use `sampling.temperature`, at which the responses were sampled.
3. `missing_eos` penalises a response that never ends, as in PPO.
"""

from functools import partial

from torch import Tensor

from rlhf_core.functional.advantages import group_relative
from rlhf_core.functional.rewards import missing_eos
from rlhf_core.onpolicy.actors import Actors
from rlhf_core.onpolicy.kl_control import FixedKL
from rlhf_core.onpolicy.loop import iterate
from rlhf_core.onpolicy.report import OnPolicyReport, describe, group_std
from rlhf_core.onpolicy.update import optimise_policy
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.onpolicy import GRPOConfig
from rlhf_core.training.learner import Learner
from rlhf_core.types import Rollout
from rlhf_core.work import Work


def train_grpo(config: GRPOConfig, work: Work) -> OnPolicyReport:
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
        "grpo",
        config,
        work,
        actors,
        learners={"policy": learner},
        controller=FixedKL(config.kl_coef),
        credit=partial(assign_credit, config=config),
        update=partial(
            optimise_policy,
            learner=learner,
            config=config,
            temperature=work.section(SamplingConfig).temperature,
            ranks=work.ranks,
            kl_coef=config.kl_coef,
        ),
    )
    work.logger.phase("saving the policy")
    actors.save(work.outputs["policy"], work, report.iterations)
    return report


def assign_credit(
    rollout: Rollout, kl_coef: float, *, config: GRPOConfig
) -> tuple[Tensor, dict[str, float]]:
    """(B, R) advantages, the same for every token of a response, and metrics."""
    scores = missing_eos(
        rollout.outcomes,
        rollout.responses.finished,
        mode=config.missing_eos,
        value=config.missing_eos_value,
    )
    stats = describe(rollout, kl_coef) | {
        "objective/reward": scores.mean().item(),
        "group/spread": group_std(scores, config.group_size),
    }
    advantages = group_relative(scores, config.group_size, scale=config.scale)
    return advantages.unsqueeze(-1) * rollout.responses.mask, stats

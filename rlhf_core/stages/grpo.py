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

from pydantic import Field
from torch import Tensor

from rlhf_core.backbone.sampling import SamplingConfig
from rlhf_core.functional.advantages import group_relative
from rlhf_core.functional.rewards import missing_eos
from rlhf_core.onpolicy.actors import Actors
from rlhf_core.onpolicy.config import GroupSection
from rlhf_core.onpolicy.kl_control import FixedKL
from rlhf_core.onpolicy.loop import iterate
from rlhf_core.onpolicy.report import OnPolicyReport, describe, group_std
from rlhf_core.onpolicy.update import optimise_policy
from rlhf_core.training.learner import Learner
from rlhf_core.types import Rollout
from rlhf_core.work import Work


class GRPOConfig(GroupSection):
    """Settings of GRPO."""

    scale: bool = Field(
        True, description="Divide by the spread of the group; off is known as Dr. GRPO"
    )


def train_grpo(config: GRPOConfig, work: Work) -> OnPolicyReport:
    """Optimise the SFT policy against the reward; write the policy.

    Args:
        work: inputs sft, data and the models of `config.rewards`; output policy, and milestones if
            `config.keep_every` asks for them; section sampling.

    Raises: ModelError, DataError, ConfigError for what a user can fix; NumericsError when a score,
    loss or gradient is no longer finite, or an invariant is broken; CheckpointError when the
    checkpoints are of another run.
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
    """(B, R) advantages, the same for every token of a response, and what they say."""
    scores = missing_eos(
        rollout.scores,
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

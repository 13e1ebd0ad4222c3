"""PPO: maximise the reward of the policy's responses without moving far from the reference.

    rₜ = -β·(log π(aₜ|sₜ) - log π_ref(aₜ|sₜ)) + 1[t = T]·score
    maximise E[min(ρₜ·Âₜ, clip(ρₜ, 1 - ε, 1 + ε)·Âₜ)],  ρₜ = π(aₜ|sₜ) / π_old(aₜ|sₜ)

An iteration samples responses, scores them, estimates advantages, and runs a few epochs of clipped
updates. Papers: Schulman et al. 2017, https://arxiv.org/abs/1707.06347; Ziegler et al. 2019,
https://arxiv.org/abs/1909.08593; details from Huang et al. 2024,
https://arxiv.org/abs/2403.17031.

Deliberate deviations from the papers (details in docs/algorithms/ppo.md):
1. The critic is a separate network, initialised from the reward model, with its own optimizer. A
   value-loss coefficient would therefore have no effect; tune `critic_learning_rate` instead. With
   LoRA the critic is an adapter and a head on the trunk that the other three share.
2. Every mean runs over the tokens of the minibatch, whatever the micro-batches.
3. The KL term comes from the roll-out and is not differentiated.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from rlhf_core.backbone.directory import add_facts, read_card, require_same_tokenizer
from rlhf_core.backbone.networks import ScalarModel, load_as_adapter
from rlhf_core.backbone.responses import restore_rows
from rlhf_core.functional.advantages import gae
from rlhf_core.functional.logprobs import kl_estimate
from rlhf_core.functional.losses import clipped_value
from rlhf_core.functional.masking import masked_mean, masked_whiten
from rlhf_core.functional.rewards import missing_eos, shaped_rewards
from rlhf_core.metrics import Between, counted, uncounted
from rlhf_core.onpolicy.actors import Actors
from rlhf_core.onpolicy.kl_control import controller_of
from rlhf_core.onpolicy.loop import iterate
from rlhf_core.onpolicy.report import OnPolicyReport, describe
from rlhf_core.onpolicy.update import optimise_policy
from rlhf_core.rewards.models import load_reward_model
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.onpolicy import PPOConfig
from rlhf_core.settings.rewards import PIPELINE_REWARD
from rlhf_core.training.learner import Learner, adapt
from rlhf_core.training.ranks import Ranks
from rlhf_core.types import Rollout
from rlhf_core.work import Work


def load_networks(config: PPOConfig, work: Work) -> Actors:
    """The four networks of PPO: policy and critic train, reference and reward model do not.

    They are loaded from the SFT policy and the reward model: as separate networks or, with LoRA, as
    adapters on those two transformers. If the reward model was trained as an adapter of this SFT
    policy, all four share one transformer.

    Of a reward model with members the critic starts from the weight average: as an adapter it has
    K times the rank of a member.
    """
    actors = Actors.load(config, work)
    directory, precision = work.inputs["reward"], config.precision
    require_same_tokenizer(actors.tokenizer, directory, "reward model")
    reward = actors.rewards.get(PIPELINE_REWARD)
    if not config.lora_rank:
        critic = ScalarModel.load(directory, work.device, precision)
        reward, _ = load_reward_model(directory, work.device, precision, members=config)
    elif reward is not None:
        trunk = actors.policy.model
        found = load_as_adapter(directory, work.inputs["sft"], trunk, "critic", precision)
        critic = cast(ScalarModel, found)
    else:
        reward, _ = load_reward_model(directory, work.device, precision, members=config)
        own = reward if isinstance(reward, ScalarModel) else None
        critic = (own or ScalarModel.load(directory, work.device, precision)).with_own_head()
        adapt(critic, config, "critic", seed=work.seed, stream="ppo/critic")
    return replace(actors, critic=critic, rewards={PIPELINE_REWARD: reward})


@dataclass(frozen=True)
class Targets:
    """The constants that an update moves towards."""

    advantages: Tensor  # (B, R) whitened
    returns: Tensor  # (B, R)


def train_ppo(config: PPOConfig, work: Work) -> OnPolicyReport:
    """Optimise the SFT policy against the reward; write policy and critic.

    The critic starts from the pipeline's reward model, whatever `config.rewards` are.

    Args:
        work: inputs sft, data, reward and the models of `config.rewards`; outputs policy and
            critic, and milestones if `config.keep_every` is set; section sampling.

    Raises: ModelError, DataError, ConfigError for errors that a user can fix; NumericsError when a
    score, loss or gradient is not finite, or an invariant is broken; CheckpointError when the
    checkpoints are from another run.
    """
    actors = load_networks(config, work)
    critic_network = cast(ScalarModel, actors.critic)
    policy = Learner(actors.policy, config, config.updates, ranks=work.ranks)
    critic = Learner(
        critic_network,
        config,
        config.updates,
        ranks=work.ranks,
        learning_rate=config.critic_learning_rate,
    )
    report = iterate(
        "ppo",
        config,
        work,
        actors,
        learners={"policy": policy, "critic": critic},
        controller=controller_of(config),
        credit=partial(assign_credit, config=config),
        update=partial(
            optimise,
            policy=policy,
            critic=critic,
            config=config,
            temperature=work.section(SamplingConfig).temperature,
            ranks=work.ranks,
            between=partial(counted, work.logger),
        ),
    )
    work.logger.phase("saving the policy")
    actors.save(work.outputs["policy"], work, report.iterations)
    work.logger.phase("saving the critic")
    with work.ranks.whole(critic_network):
        if work.ranks.main:
            sft, output = work.inputs["sft"], work.outputs["critic"]
            critic_network.save(actors.tokenizer, output, kind="critic", base=sft)
            add_facts(output, {"chat": read_card(sft).get("chat", False)})
    return report


def assign_credit(
    rollout: Rollout, kl_coef: float, *, config: PPOConfig
) -> tuple[Targets, dict[str, float]]:
    """Advantages and returns of a roll-out, and metrics of the policy."""
    mask, finished = rollout.responses.mask, rollout.responses.finished
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, kind=config.kl_estimator)
    scores = missing_eos(
        rollout.outcomes, finished, mode=config.missing_eos, value=config.missing_eos_value
    )
    rewards = shaped_rewards(scores, kl, mask, kl_coef=kl_coef)
    advantages, returns = gae(
        rewards, rollout.values, mask, gamma=config.gamma, lam=config.gae_lambda
    )
    error = masked_mean((returns - rollout.values).square(), mask)
    variance = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
    stats = describe(rollout, kl_coef) | {
        "objective/reward": rewards.sum(-1).mean().item(),
        "value/explained_variance": (1 - error / variance.clamp(min=1e-8)).item(),
    }
    return Targets(masked_whiten(advantages, mask), returns), stats


def optimise(
    rollout: Rollout,
    targets: Targets,
    picked: list[int],
    *,
    first: bool,
    check: Callable[[], None],
    policy: Learner,
    critic: Learner,
    config: PPOConfig,
    temperature: float,
    ranks: Ranks,
    between: Between = uncounted,
) -> dict[str, float] | None:
    """Update policy and critic on the picked rows; return token means.

    Returns None, without an update, when the policy has moved too far from the one that sampled.
    """
    stats = optimise_policy(
        rollout,
        targets.advantages,
        picked,
        first=first,
        check=check,
        learner=policy,
        config=config,
        temperature=temperature,
        ranks=ranks,
    )
    if stats is None:
        return None
    # Nothing may stop from here to the next safe point: the policy is ahead of the positions.
    tell = between("updating the critic", ranks.passes(len(picked), config.micro_batch_size))
    stats |= _update_critic(critic, rollout, targets, picked, config, ranks, tell)
    stats["optimizer/critic_learning_rate"] = critic.learning_rate
    stats["value/grad_norm"] = critic.step()
    return stats


def _update_critic(
    learner: Learner,
    rollout: Rollout,
    targets: Targets,
    picked: list[int],
    config: PPOConfig,
    ranks: Ranks,
    tell: Callable[[], None],
) -> dict[str, float]:
    """Add the gradient of one minibatch; return its token means."""
    tokens = float(rollout.responses.mask[picked].sum())
    sums = {"value/loss": 0.0, "value/clip_fraction": 0.0}
    for micro in ranks.micro_batches(picked, config.micro_batch_size):
        tell()
        rows = torch.tensor(micro.rows, device=targets.returns.device)
        experience = rollout.rows(rows)
        response_rows = restore_rows(experience, learner.network)
        with learner.accumulate(last=micro.last):
            values = response_rows.to_rows(learner(response_rows.packed, response_rows.positions))
            loss, clipped = clipped_value(
                values,
                experience.values,
                targets.returns[rows],
                experience.responses.mask,
                clip_range=config.value_clip_range,
                normalizer=tokens,
            )
            learner.backward(loss * micro.weight, "the value loss")
        sums["value/loss"] += loss.item() * micro.weight
        sums["value/clip_fraction"] += clipped.item() * micro.weight
    return ranks.sum(sums)

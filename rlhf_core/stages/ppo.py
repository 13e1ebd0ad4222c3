"""PPO: the policy learns to write what the reward model likes without leaving its reference.

    rₜ = -β·(log π(aₜ|sₜ) - log π_ref(aₜ|sₜ)) + 1[t = T]·score
    maximise E[min(ρₜ·Âₜ, clip(ρₜ, 1 - ε, 1 + ε)·Âₜ)],  ρₜ = π(aₜ|sₜ) / π_old(aₜ|sₜ)

An iteration samples responses, scores them, estimates advantages, and takes a few epochs of clipped
updates. Papers: Schulman et al. 2017, https://arxiv.org/abs/1707.06347; Ziegler et al. 2019,
https://arxiv.org/abs/1909.08593; details after Huang et al. 2024,
https://arxiv.org/abs/2403.17031.

Deviations from those, each on purpose (the long version is docs/algorithms/ppo.md):
1. The critic is a network of its own, started from the reward model, with its own optimizer.
   A value-loss coefficient would therefore change nothing; `critic_learning_rate` is the knob.
2. Every mean runs over the tokens of the minibatch, whatever the micro-batches.
3. The KL term comes from the roll-out and is not back-propagated.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import pandas as pd
import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core import figures
from rlhf_core.data import read_table
from rlhf_core.encoding import decode_responses, encode_prompt
from rlhf_core.errors import DataError
from rlhf_core.functional.advantages import gae
from rlhf_core.functional.logprobs import KLKind, entropy, kl_estimate, token_logprobs
from rlhf_core.functional.losses import clipped_policy, clipped_value
from rlhf_core.functional.masking import masked_mean, masked_whiten
from rlhf_core.functional.rewards import (
    MAX_ERROR,
    AdaptiveKL,
    FixedKL,
    KLController,
    MissingEOS,
    missing_eos,
    shaped_rewards,
)
from rlhf_core.metrics import StageLogger
from rlhf_core.models import (
    ScalarModel,
    load_policy,
    read_card,
    require_context,
    require_same_tokenizer,
    response_logits,
    save_model,
)
from rlhf_core.optim import Optimizer, TrainingSection, chunks, require_finite, shuffled_batches
from rlhf_core.rollout import collect, response_values, sequences
from rlhf_core.sampling import SAMPLING_LENGTH, SamplingConfig, respond
from rlhf_core.seeding import generator
from rlhf_core.types import Report, Rollout

_log = logging.getLogger(__name__)


class PPOConfig(TrainingSection):
    """Settings of PPO."""

    learning_rate: float = Field(3e-6, gt=0, description="Peak learning rate of the policy")
    critic_learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate of the critic")
    iterations: int = Field(100, ge=1, description="Roll-outs, each followed by its updates")
    rollout_size: int = Field(128, ge=2, description="Responses sampled in one iteration")
    epochs: int = Field(4, ge=1, description="Passes over the responses of one iteration")
    clip_range: float = Field(0.2, gt=0, lt=1, description="ε: the ratio counts within 1 ± ε")
    dual_clip: float = Field(
        0.0, ge=0, description="c > 1 bounds the loss of bad actions at c·|advantage|; 0 = off"
    )
    value_clip_range: float = Field(
        0.2, gt=0, description="New values may leave the old ones by this much (reward units)"
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount of later rewards, per token")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="λ of generalised advantage estimation")
    kl_coef: float = Field(0.05, ge=0, description="β: price of one nat of KL (reward units)")
    kl_control: Literal["fixed", "adaptive"] = Field(
        "adaptive", description="Whether β stays, or moves to hold kl_target"
    )
    kl_target: float = Field(6.0, gt=0, description="KL that β holds (nats per sequence)")
    kl_horizon: float = Field(
        10_000, gt=0, description="Sequences over which β moves by a fifth at most"
    )
    kl_estimator: KLKind = Field("k1", description="Which estimate of the KL is the penalty")
    kl_budget: float = Field(
        0.0, ge=0, description="KL at which the run stops or warns (nats per sequence); 0 = none"
    )
    at_kl_budget: Literal["stop", "warn"] = Field("stop", description="What happens at kl_budget")
    update_kl_limit: float = Field(
        0.05,
        ge=0,
        description="The epochs of an iteration end when the policy has moved 1.5 times this far "
        "from the one that sampled (nats a token); 0 = never",
    )
    missing_eos: MissingEOS = Field(
        "subtract", description="What becomes of the score of a response that never ends"
    )
    missing_eos_value: float = Field(
        1.0, description="The penalty to subtract, or the score to put instead (reward units)"
    )

    @model_validator(mode="after")
    def _minibatch_within_rollout(self) -> Self:
        if self.batch_size > self.rollout_size:
            raise ValueError(
                f"ppo.batch_size {self.batch_size} is larger than ppo.rollout_size "
                f"{self.rollout_size}; lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _dual_clip_off_or_above_one(self) -> Self:
        if 0 < self.dual_clip <= 1:
            raise ValueError(
                f"ppo.dual_clip {self.dual_clip:g} has to be above 1, or 0 for no dual clip"
            )
        return self

    @model_validator(mode="after")
    def _adaptive_control_can_move(self) -> Self:
        if self.kl_control == "fixed":
            return self
        if self.kl_coef == 0:
            raise ValueError(
                "ppo.kl_coef 0 stays 0 however it is scaled; raise it, or set ppo.kl_control to "
                "fixed"
            )
        if MAX_ERROR * self.rollout_size >= self.kl_horizon:
            raise ValueError(
                f"ppo.kl_horizon {self.kl_horizon:g} is too short for ppo.rollout_size "
                f"{self.rollout_size}: raise it above {MAX_ERROR * self.rollout_size:g}"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class PPOReport(Report):
    """Where the policy came to, as means over the last iteration."""

    score: float  # normalised reward, before the penalty for missing ends
    kl: float  # nats per sequence
    kl_coef: float
    response_length: float  # tokens
    iterations: int
    over_kl_budget: float  # 1 when the last iteration was over kl_budget


@dataclass(frozen=True)
class _Models:
    """The four networks of PPO; the first two learn."""

    policy: PreTrainedModel
    critic: ScalarModel
    reference: PreTrainedModel
    reward_model: ScalarModel


@dataclass(frozen=True)
class _Optimizers:
    """One for each network that learns."""

    policy: Optimizer
    critic: Optimizer


@dataclass(frozen=True)
class _Targets:
    """What an update moves towards; constants."""

    advantages: Tensor  # (B, R) whitened
    returns: Tensor  # (B, R)

    def rows(self, index: Tensor) -> "_Targets":
        """Some rows of the batch."""
        return _Targets(self.advantages[index], self.returns[index])


def train_ppo(
    config: PPOConfig,
    sampling: SamplingConfig,
    *,
    sft: Path,
    reward_model: Path,
    data: Path,
    policy_output: Path,
    critic_output: Path,
    seed: int,
    device: str,
    logger: StageLogger,
) -> PPOReport:
    """Optimise the SFT policy against the reward model; write policy and critic.

    Raises: ModelError, DataError, ConfigError for what a user can mend; NumericsError when a score,
    loss or gradient is no longer finite.
    """
    policy, tokenizer = load_policy(sft, device)
    models = _Models(
        policy=policy,
        critic=ScalarModel.load(reward_model, device),
        reference=load_policy(sft, device)[0],
        reward_model=ScalarModel.load(reward_model, device),
    )
    require_same_tokenizer(tokenizer, reward_model, "reward model")
    for network in (policy, models.reward_model.model):
        require_context(network, sampling.max_length, SAMPLING_LENGTH)
    prompts = _encode_prompts(read_table(data, "prompts", "train"), tokenizer)
    steps = config.iterations * config.epochs * math.ceil(config.rollout_size / config.batch_size)
    optimizers = _Optimizers(
        policy=Optimizer(policy, config, steps),
        critic=Optimizer(models.critic, config, steps, config.critic_learning_rate),
    )
    controller = _kl_controller(config)
    draws, order = generator(seed, "ppo/sampling", device), generator(seed, "ppo/order")
    batches = _prompt_batches(prompts, config.rollout_size, generator(seed, "ppo/prompts"))
    history: list[dict[str, float]] = []
    samples: list[pd.DataFrame] = []
    for iteration in range(1, config.iterations + 1):
        rollout = _roll_out(next(batches), models, config, sampling, draws)
        targets, stats = _judge(rollout, config, controller)
        stats |= _optimise(rollout, targets, models, optimizers, config, sampling, order)
        controller.update(stats["objective/kl"], config.rollout_size)
        logger.metrics(stats, iteration)
        logger.progress(iteration, config.iterations, _note(stats))
        history.append(stats)
        over_budget = 0 < config.kl_budget < stats["objective/kl"]
        last = iteration == config.iterations or (over_budget and config.at_kl_budget == "stop")
        if iteration == 1 or last:
            samples.append(_sample_table(rollout, tokenizer, iteration))
        if over_budget:
            _log.warning("PPO is over its KL budget of %g nats: %s", config.kl_budget, _note(stats))
        if last:
            break

    facts = {"iterations": iteration, "chat": read_card(sft).get("chat", False)}
    save_model(policy, tokenizer, policy_output, kind="policy", facts=facts)
    models.critic.save(tokenizer, critic_output, kind="critic")
    return PPOReport(
        score=stats["objective/score"],
        kl=stats["objective/kl"],
        kl_coef=stats["objective/kl_coef"],
        response_length=stats["response/length"],
        iterations=iteration,
        over_kl_budget=float(over_budget),
        tables={"ppo_samples": pd.concat(samples)},
        figures={
            "ppo_training": figures.ppo_curves(history),
            "ppo_frontier": figures.reward_kl_path(
                [(point["objective/kl"], point["objective/score"]) for point in history]
            ),
        },
    )


def _roll_out(
    prompts: list[list[int]],
    models: _Models,
    config: PPOConfig,
    sampling: SamplingConfig,
    draws: torch.Generator,
) -> Rollout:
    """Sample a response to each prompt and measure it."""
    # One batch whatever sampling.batch_size is: the update works on the whole iteration.
    whole = sampling.model_copy(update={"batch_size": len(prompts)})
    ((batch, responses),) = respond(models.policy, prompts, whole, generator=draws)
    rollout = collect(
        batch,
        responses,
        policy=models.policy,
        reference=models.reference,
        critic=models.critic,
        reward_model=models.reward_model,
        temperature=sampling.temperature,
        micro_batch_size=config.micro_batch_size,
    )
    require_finite("the reward-model score", rollout.scores)
    require_finite("the log-probability of a sampled token", rollout.logprobs)
    require_finite("its log-probability under the reference", rollout.ref_logprobs)
    require_finite("the critic's value", rollout.values)
    return rollout


def _judge(
    rollout: Rollout, config: PPOConfig, controller: KLController
) -> tuple[_Targets, dict[str, float]]:
    """Advantages and returns of a roll-out, and what it says about the policy."""
    mask, finished = rollout.responses.mask, rollout.responses.finished
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, kind=config.kl_estimator)
    scores = missing_eos(
        rollout.scores, finished, mode=config.missing_eos, value=config.missing_eos_value
    )
    rewards = shaped_rewards(scores, kl, mask, kl_coef=controller.value)
    advantages, returns = gae(
        rewards, rollout.values, mask, gamma=config.gamma, lam=config.gae_lambda
    )
    error = masked_mean((returns - rollout.values).square(), mask)
    spread = masked_mean((returns - masked_mean(returns, mask)).square(), mask)
    stats = {
        "objective/score": rollout.scores.mean().item(),
        "objective/score_std": rollout.scores.std().item(),
        "objective/kl": (rollout.logprobs - rollout.ref_logprobs).sum(-1).mean().item(),
        "objective/kl_coef": controller.value,
        "objective/reward": rewards.sum(-1).mean().item(),
        "response/length": mask.sum(-1).float().mean().item(),
        "response/finished": finished.float().mean().item(),
        "value/explained_variance": (1 - error / spread.clamp(min=1e-8)).item(),
    }
    return _Targets(masked_whiten(advantages, mask), returns), stats


def _optimise(
    rollout: Rollout,
    targets: _Targets,
    models: _Models,
    optimizers: _Optimizers,
    config: PPOConfig,
    sampling: SamplingConfig,
    order: torch.Generator,
) -> dict[str, float]:
    """A few epochs of clipped updates; means over the minibatches that were used."""
    used: list[dict[str, float]] = []
    for picked in shuffled_batches(config.rollout_size, config.batch_size, config.epochs, order):
        stats = _accumulate(rollout, targets, picked, models, config, sampling)
        if used and 0 < 1.5 * config.update_kl_limit < stats["policy/approx_kl"]:
            optimizers.policy.drop_gradient()
            optimizers.critic.drop_gradient()
            break
        stats["optimizer/learning_rate"] = optimizers.policy.learning_rate
        stats["optimizer/critic_learning_rate"] = optimizers.critic.learning_rate
        stats["policy/grad_norm"] = optimizers.policy.step()
        stats["value/grad_norm"] = optimizers.critic.step()
        used.append(stats)
    means = {name: sum(stats[name] for stats in used) / len(used) for name in used[0]}
    return means | {"optimizer/updates": float(len(used))}


def _accumulate(
    rollout: Rollout,
    targets: _Targets,
    picked: list[int],
    models: _Models,
    config: PPOConfig,
    sampling: SamplingConfig,
) -> dict[str, float]:
    """Add the gradient of a minibatch, micro-batch by micro-batch; return its token means."""
    tokens = rollout.responses.mask[picked].sum()
    sums: dict[str, float] = {}
    for micro in chunks(picked, config.micro_batch_size):
        rows = torch.tensor(micro, device=tokens.device)
        experience, goal = rollout.rows(rows), targets.rows(rows)
        # One after the other: the graph of the policy is gone before that of the critic is built.
        part = _policy_backward(models.policy, experience, goal, tokens, config, sampling)
        part |= _critic_backward(models.critic, experience, goal, tokens, config)
        sums = {name: sums.get(name, 0.0) + value for name, value in part.items()}
    return sums


def _policy_backward(
    policy: PreTrainedModel,
    rollout: Rollout,
    targets: _Targets,
    tokens: Tensor,
    config: PPOConfig,
    sampling: SamplingConfig,
) -> dict[str, float]:
    """Gradient of a micro-batch, and its share of the means over the minibatch's `tokens`."""
    mask = rollout.responses.mask
    ids, whole_mask = sequences(rollout.prompts, rollout.responses)
    logits = response_logits(policy, ids, whole_mask, mask.shape[-1])
    logprobs = token_logprobs(logits, rollout.responses.tokens, temperature=sampling.temperature)
    logprobs = logprobs.masked_fill(~mask, 0.0)
    loss, clipped = clipped_policy(
        logprobs,
        rollout.logprobs,
        targets.advantages,
        mask,
        clip_range=config.clip_range,
        dual_clip=config.dual_clip or None,
        normalizer=tokens,
    )
    require_finite("the policy loss", loss)
    loss.backward()
    with torch.no_grad():
        moved = kl_estimate(rollout.logprobs, logprobs, kind="k3")
        spread = entropy(logits, temperature=sampling.temperature)
    return {
        "policy/loss": loss.item(),
        "policy/clip_fraction": clipped.item(),
        "policy/approx_kl": (moved[mask].sum() / tokens).item(),
        "policy/entropy": (spread[mask].sum() / tokens).item(),
    }


def _critic_backward(
    critic: ScalarModel, rollout: Rollout, targets: _Targets, tokens: Tensor, config: PPOConfig
) -> dict[str, float]:
    """The same for the critic."""
    loss, clipped = clipped_value(
        response_values(critic, rollout.prompts, rollout.responses),
        rollout.values,
        targets.returns,
        rollout.responses.mask,
        clip_range=config.value_clip_range,
        normalizer=tokens,
    )
    require_finite("the value loss", loss)
    loss.backward()
    return {"value/loss": loss.item(), "value/clip_fraction": clipped.item()}


def _kl_controller(config: PPOConfig) -> KLController:
    if config.kl_control == "fixed":
        return FixedKL(config.kl_coef)
    return AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)


def _encode_prompts(table: pd.DataFrame, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if table.empty:
        raise DataError(
            "there are no prompts to train on; add rows to data.prompts, or lower "
            "data.eval_fraction"
        )
    return [encode_prompt(prompt, tokenizer) for prompt in table["prompt"]]


def _prompt_batches(
    prompts: list[list[int]], size: int, order: torch.Generator
) -> Iterator[list[list[int]]]:
    """Batches of exactly `size` prompts for ever, every prompt once before any comes again."""
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(len(prompts), generator=order).tolist()
        yield [prompts[i] for i in waiting[:size]]
        waiting = waiting[size:]


def _note(stats: dict[str, float]) -> str:
    return f"score {stats['objective/score']:+.2f}, KL {stats['objective/kl']:.2f} nats"


def _sample_table(
    rollout: Rollout, tokenizer: PreTrainedTokenizerBase, iteration: int, rows: int = 8
) -> pd.DataFrame:
    """Some texts of a roll-out with their scores, to read what the numbers mean."""
    prompts, responses = rollout.prompts, rollout.responses
    return pd.DataFrame(
        {
            "iteration": iteration,
            "prompt": decode_responses(prompts.input_ids[:rows], prompts.mask[:rows], tokenizer),
            "response": decode_responses(responses.tokens[:rows], responses.mask[:rows], tokenizer),
            "score": rollout.scores[:rows].tolist(),
            "kl": (rollout.logprobs - rollout.ref_logprobs).sum(-1)[:rows].tolist(),
        }
    )

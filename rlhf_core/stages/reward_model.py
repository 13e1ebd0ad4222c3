"""Reward model: one number for a text, learnt from which of two texts people preferred.

    P(chosen ≻ rejected) = σ(r(chosen) - r(rejected) - margin)          (Bradley-Terry)

The SFT model with a scalar head at the last token, trained for one epoch by default, as more
overfits. Afterwards the reward is shifted and scaled so that samples of the SFT policy have mean 0
and standard deviation 1; the constants travel with the model.

Deviations from the literature, each on purpose:
1. A tie is a pair with label smoothing 0.5: it pulls the two rewards together.
2. Beside the accuracy stands that of the rule "prefer the longer": a model that does not beat it
   has learnt nothing but length.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core import figures
from rlhf_core.data import read_table
from rlhf_core.encoding import Prompt, encode_pair, encode_prompt, right_pad
from rlhf_core.errors import DataError
from rlhf_core.functional import ranking
from rlhf_core.functional.losses import bradley_terry, pointwise_mse
from rlhf_core.metrics import StageLogger
from rlhf_core.models import (
    ModelConfig,
    ScalarModel,
    load_policy,
    load_tokenizer,
    require_context,
)
from rlhf_core.optim import Optimizer, TrainingSection, chunks, require_finite, shuffled_batches
from rlhf_core.rollout import response_scores
from rlhf_core.sampling import SAMPLING_LENGTH, SamplingConfig, respond
from rlhf_core.seeding import generator
from rlhf_core.types import Report


class RewardModelConfig(TrainingSection):
    """Settings of reward-model training."""

    epochs: int = Field(1, ge=1, description="Passes over the preferences")
    max_length: int = Field(512, ge=2, description="Longest prompt + response (tokens)")
    loss: Literal["bradley_terry", "pointwise_mse"] = Field(
        "bradley_terry",
        description="bradley_terry learns from comparisons; pointwise_mse is a demonstration: it "
        "regresses chosen texts to 1 and rejected ones to 0",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of the votes that are taken to be wrong"
    )
    center_coef: float = Field(
        0.0, ge=0, description="Weight of (r_chosen + r_rejected)², which holds rewards around 0"
    )
    normalization_samples: int = Field(
        256, ge=2, description="SFT samples that fix mean 0 and standard deviation 1 of the reward"
    )


@dataclass(frozen=True, kw_only=True)
class RewardModelReport(Report):
    """How well the reward model predicts held-out votes; ties are left out of the accuracies."""

    accuracy: float
    accuracy_low: float  # 95 % bounds, bootstrapped over prompts
    accuracy_high: float
    longer_accuracy: float  # of the rule "prefer the longer response"
    held_out_loss: float  # Bradley-Terry, nats a pair
    calibration_error: float
    reward_mean: float  # of SFT samples before normalisation, in logits
    reward_std: float
    train_pairs: int
    held_out_pairs: int
    truncated: int  # pairs with a text cut to max_length


class _Pair(NamedTuple):
    """One vote, encoded."""

    chosen: list[int]
    rejected: list[int]
    tie: bool
    margin: float
    truncated: bool


def train_reward_model(
    config: RewardModelConfig,
    sampling: SamplingConfig,
    *,
    sft: Path,
    data: Path,
    output: Path,
    seed: int,
    device: str,
    logger: StageLogger,
) -> RewardModelReport:
    """Train a reward model on the prepared preferences, normalise it, and write it to `output`.

    Raises: ModelError, DataError, ConfigError for what a user can mend; NumericsError when a loss
    or gradient is no longer finite.
    """
    reward_model = ScalarModel.from_policy(sft, generator(seed, "reward/head")).to(device)
    require_context(reward_model.model, config.max_length, "reward_model.max_length")
    require_context(reward_model.model, sampling.max_length, SAMPLING_LENGTH)
    tokenizer = load_tokenizer(ModelConfig(source=str(sft)), ())
    train_table = read_table(data, "preferences", "train")
    train = _encode(train_table, tokenizer, config.max_length)
    held_out_table = read_table(data, "preferences", "eval")
    held_out = _encode(held_out_table, tokenizer, config.max_length)

    steps = config.epochs * math.ceil(len(train) / config.batch_size)
    optimizer = Optimizer(reward_model, config, steps)
    order = generator(seed, "reward/order")
    for step, picked in enumerate(
        shuffled_batches(len(train), config.batch_size, config.epochs, order), start=1
    ):
        rate = optimizer.learning_rate
        loss, accuracy = _accumulate(
            reward_model, [train[i] for i in picked], config, tokenizer.pad_token_id
        )
        grad_norm = optimizer.step()
        logger.metrics(
            {"loss": loss, "accuracy": accuracy, "grad_norm": grad_norm, "learning_rate": rate},
            step,
        )
        logger.progress(step, steps, f"loss {loss:.3f}")

    samples = _sft_scores(reward_model, sft, train_table["prompt"], config, sampling, seed)
    chosen, rejected = _scores(reward_model, held_out, config, tokenizer.pad_token_id)
    mean, std = samples.mean().item(), max(samples.std().item(), 1e-6)
    reward_model.mean, reward_model.std = mean, std
    reward_model.save(tokenizer, output, kind="reward")
    return _report(held_out_table, train, held_out, chosen, rejected, mean, std, seed)


@torch.no_grad()
def _sft_scores(
    reward_model: ScalarModel,
    sft: Path,
    prompts: Iterable[Prompt],
    config: RewardModelConfig,
    sampling: SamplingConfig,
    seed: int,
) -> Tensor:
    """(normalization_samples,) raw scores of what the SFT policy says to the prompts, each of them
    once before any comes again."""
    device = str(reward_model.model.device)
    policy, tokenizer = load_policy(sft, device)
    # A dict, as a pair with several votes names its prompt several times.
    distinct = list(dict.fromkeys(tuple(encode_prompt(p, tokenizer)) for p in prompts))
    order = torch.randperm(len(distinct), generator=generator(seed, "reward/prompts")).tolist()
    rows = [list(distinct[i]) for i in islice(cycle(order), config.normalization_samples)]
    draws = generator(seed, "reward/normalization", device)
    answers = respond(policy, rows, sampling, generator=draws)
    return torch.cat([response_scores(reward_model, *batch) for batch in answers])


def _report(
    table: pd.DataFrame,
    train: list[_Pair],
    held_out: list[_Pair],
    chosen: Tensor,
    rejected: Tensor,
    mean: float,
    std: float,
    seed: int,
) -> RewardModelReport:
    """Accuracy, its baseline and calibration on the held-out votes; scores are raw logits."""
    decided = torch.tensor([not pair.tie for pair in held_out])
    if not decided.any():
        raise DataError(
            "the held-out preferences are all ties, so no accuracy can be measured; raise "
            "data.eval_fraction or bring evaluation pairs with a winner"
        )
    prompts = torch.from_numpy(pd.factorize(table["prompt"].map(str))[0].astype(np.int64))
    gap = (chosen - rejected)[decided]
    correct = _half_for_ties(gap)
    longer = _half_for_ties(
        torch.tensor([len(pair.chosen) - len(pair.rejected) for pair in held_out])[decided]
    )
    accuracy = ranking.clustered_bootstrap(
        correct, prompts[decided], generator=generator(seed, "reward/bootstrap")
    )
    # Each pair counts from both sides: the order in which it is written down carries no meaning.
    probabilities = torch.sigmoid(torch.cat([gap, -gap]))
    outcomes = torch.cat([torch.ones_like(gap), torch.zeros_like(gap)])
    calibration = ranking.expected_calibration_error(probabilities, outcomes)
    ties = torch.tensor([0.5 if pair.tie else 0.0 for pair in held_out])
    return RewardModelReport(
        accuracy=accuracy.value,
        accuracy_low=accuracy.low,
        accuracy_high=accuracy.high,
        longer_accuracy=longer.mean().item(),
        held_out_loss=bradley_terry(chosen, rejected, label_smoothing=ties).item(),
        calibration_error=calibration.error,
        reward_mean=mean,
        reward_std=std,
        train_pairs=len(train),
        held_out_pairs=len(held_out),
        truncated=sum(pair.truncated for pair in [*train, *held_out]),
        figures={
            "reward_calibration": figures.calibration(
                calibration.mean_predicted.tolist(),
                calibration.observed.tolist(),
                calibration.counts.tolist(),
            ),
            "reward_scores": figures.score_histogram(
                ((chosen - mean) / std).tolist(), ((rejected - mean) / std).tolist()
            ),
        },
        tables={
            "reward_held_out": pd.DataFrame(
                {
                    "prompt": table["prompt"].map(_as_text),
                    "chosen": table["chosen"],
                    "rejected": table["rejected"],
                    "chosen_reward": ((chosen - mean) / std).tolist(),
                    "rejected_reward": ((rejected - mean) / std).tolist(),
                }
            ).head(200)
        },
    )


def _half_for_ties(gap: Tensor) -> Tensor:
    """1 where the gap is positive, 1/2 where it is 0, 0 elsewhere."""
    return (gap.sign().float() + 1) / 2


def _as_text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def _encode(
    table: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[_Pair]:
    if table.empty:
        raise DataError(
            "the preferences have no rows for training or for evaluation; add rows, or change "
            "data.eval_fraction"
        )
    pairs = []
    columns = (table[name] for name in ("prompt", "chosen", "rejected", "tie", "margin"))
    for prompt, winner, loser, tie, margin in zip(*columns, strict=True):
        chosen, _, cut = encode_pair(prompt, winner, tokenizer, max_length)
        rejected, _, also_cut = encode_pair(prompt, loser, tokenizer, max_length)
        # Nobody won a tie by a margin, whatever the row says of the votes beside it.
        lead = 0.0 if tie else float(margin)
        pairs.append(_Pair(chosen, rejected, bool(tie), lead, cut or also_cut))
    return pairs


def _forward(
    reward_model: ScalarModel, pairs: list[_Pair], pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """(B,) raw scores of the chosen and of the rejected texts, in one pass."""
    texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    ids, mask = right_pad(texts, pad_token_id)
    device = reward_model.model.device
    chosen, rejected = reward_model.scores(ids.to(device), mask.to(device)).split(len(pairs))
    return chosen, rejected


def _accumulate(
    reward_model: ScalarModel, pairs: list[_Pair], config: RewardModelConfig, pad_token_id: int
) -> tuple[float, float]:
    """Add the gradient of one optimizer step; return its mean loss and its accuracy."""
    total = correct = 0.0
    for picked in chunks(list(range(len(pairs))), config.micro_batch_size):
        micro = [pairs[i] for i in picked]
        chosen, rejected = _forward(reward_model, micro, pad_token_id)
        loss = _loss(chosen, rejected, micro, config) * (len(micro) / len(pairs))
        require_finite("the reward-model loss", loss)
        loss.backward()
        total += loss.item()
        correct += _half_for_ties(chosen - rejected).sum().item()
    return total, correct / len(pairs)


def _loss(
    chosen: Tensor, rejected: Tensor, pairs: list[_Pair], config: RewardModelConfig
) -> Tensor:
    """Mean loss over the pairs of a micro-batch."""
    tie = torch.tensor([pair.tie for pair in pairs], device=chosen.device)
    if config.loss == "pointwise_mse":
        half = 0.5 * tie
        return pointwise_mse(torch.cat([chosen, rejected]), torch.cat([1 - half, half]))
    return bradley_terry(
        chosen,
        rejected,
        margin=torch.tensor([pair.margin for pair in pairs], device=chosen.device),
        label_smoothing=torch.where(tie, 0.5, config.label_smoothing),
        center_coef=config.center_coef,
    )


@torch.no_grad()
def _scores(
    reward_model: ScalarModel, pairs: list[_Pair], config: RewardModelConfig, pad_token_id: int
) -> tuple[Tensor, Tensor]:
    """(N,) raw scores of all chosen and all rejected texts, on the CPU."""
    parts = [
        _forward(reward_model, [pairs[i] for i in picked], pad_token_id)
        for picked in chunks(list(range(len(pairs))), config.micro_batch_size)
    ]
    return (
        torch.cat([chosen for chosen, _ in parts]).cpu(),
        torch.cat([rejected for _, rejected in parts]).cpu(),
    )

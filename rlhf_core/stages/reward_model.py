"""Reward model: a score for each text, learnt from votes on which of two texts is better.

    P(chosen ≻ rejected) = σ(r(chosen) - r(rejected) - margin)          (Bradley-Terry)

It is the SFT model with a scalar head at the last token, trained for one epoch by default, since
more overfits. The reward is then shifted and scaled so that samples of the SFT policy have mean 0
and standard deviation 1; the constants are saved with the model.

Deliberate deviations from the literature:
1. A tie is a pair with label smoothing 0.5: it pulls the two rewards together.
2. The accuracy is reported with that of the rule "prefer the longer": a model that does not beat it
   may have learnt only length.
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from rlhf_core import figures
from rlhf_core.backbone.context import SAMPLING_LENGTH, require_context
from rlhf_core.backbone.directory import add_facts, load_saved_tokenizer, read_card
from rlhf_core.backbone.networks import Policy, ScalarModel
from rlhf_core.backbone.packing import pack_pairs
from rlhf_core.backbone.responses import lay_out, response_scores
from rlhf_core.backbone.sampling import SamplingConfig, respond
from rlhf_core.data.encoding import Prompt, encode_prompt
from rlhf_core.data.pairs import (
    Pair,
    Votes,
    encode_pairs,
    half_for_ties,
    prompt_numbers,
    require_decided,
    select_votes,
    smoothing,
    with_winners,
)
from rlhf_core.data.prepared import read_table
from rlhf_core.functional import ranking
from rlhf_core.functional.losses import bradley_terry, pointwise_mse
from rlhf_core.metrics import StageLogger, counted
from rlhf_core.seeding import generator
from rlhf_core.training.epochs import optimizer_steps
from rlhf_core.training.learner import Learner, TrainingSection, require_finite
from rlhf_core.training.order import Batches
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.recovery import run_identity
from rlhf_core.types import Report
from rlhf_core.work import Work

_LEAST_SPREAD = 0.01  # of the samples' scores, as a share of the usual gap between answers

_log = logging.getLogger(__name__)


class RewardModelConfig(TrainingSection):
    """Settings of reward-model training."""

    epochs: int = Field(1, ge=1, le=10_000, description="Passes over the preferences")
    max_length: int = Field(512, ge=2, description="Longest prompt + response (tokens)")
    votes: Votes = Field(
        "all",
        description="The votes to train on: all, or those on one half of the prompts. Which half a "
        "prompt is in is decided by a hash of it, so models of both halves share no prompt",
    )
    loss: Literal["bradley_terry", "pointwise_mse"] = Field(
        "bradley_terry",
        description="bradley_terry learns from comparisons; pointwise_mse, for demonstration, "
        "regresses chosen texts to 1 and rejected texts to 0",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Assumed share of wrong votes")
    center_coef: float = Field(
        0.0, ge=0, description="Weight of (r_chosen + r_rejected)², which keeps rewards near 0"
    )
    normalization_samples: int = Field(
        256,
        ge=2,
        le=1_000_000,
        description="SFT samples used to normalise the reward to mean 0 and standard deviation 1",
    )


@dataclass(frozen=True, kw_only=True)
class RewardModelReport(Report):
    """How well the reward model predicts held-out votes; accuracies exclude ties."""

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
    held_out_votes: int  # with a winner; the accuracies are measured on these
    held_out_prompts: int  # of these votes; the bootstrap draws these
    truncated: int  # pairs with a text cut to max_length
    same_after_cut: int  # votes left out, since both texts are the same tokens then


def train_reward_model(config: RewardModelConfig, work: Work) -> RewardModelReport:
    """Train a reward model on the prepared preferences, normalise it, and write it.

    With a recovery, a run that was killed resumes bit for bit.

    Args:
        work: inputs sft and data; output reward; section sampling, for the normaliser's samples.

    Raises: ModelError, DataError, ConfigError for errors that a user can fix; NumericsError when a
    loss or gradient is not finite; CheckpointError when the checkpoints are from another run.
    """
    sft, data, seed, ranks = work.inputs["sft"], work.inputs["data"], work.seed, work.ranks
    sampling, logger = work.section(SamplingConfig), work.logger
    logger.phase("loading the model")
    reward_model = ScalarModel.from_policy(sft, generator(seed, "reward/head")).to(work.device)
    reward_model.precision = config.precision
    config.adapt(reward_model, "reward", seed=seed, stream="reward/adapter")
    require_context(reward_model.model, config.max_length, "reward_model.max_length")
    require_context(reward_model.model, sampling.max_length, SAMPLING_LENGTH)
    tokenizer = load_saved_tokenizer(sft)
    logger.phase("encoding the preferences")
    train_table = select_votes(read_table(data, "preferences", "train"), config.votes)
    limit = (config.max_length, "reward_model.max_length")
    train, _, same = encode_pairs(train_table, tokenizer, *limit)
    held_out, held_out_table, also_same = encode_pairs(
        with_winners(read_table(data, "preferences", "eval")), tokenizer, *limit
    )

    steps = config.epochs * math.ceil(len(train) / config.batch_size)
    learner = Learner(reward_model, config, steps, ranks=ranks)
    batches = Batches(len(train), config.batch_size, config.epochs, generator(seed, "reward/order"))
    with work.recovery.open(
        logger,
        identity=run_identity(
            "reward_model",
            seed,
            {"reward_model": config, "sampling": sampling},
            {"sft": sft, "data": data},
        ),
        learners={"reward_model": learner},
        positions={"batches": batches},
        ranks=ranks,
    ) as session:
        session.resume()

        def add(picked: list[int], check: Callable[[], None]) -> dict[str, float]:
            return accumulate(learner, [train[i] for i in picked], config, ranks, check)

        for _ in optimizer_steps(session, learner, batches, add, config, ranks, total=steps):
            pass

    samples = _sft_scores(reward_model, sft, train_table["prompt"], config, sampling, seed, logger)
    chosen, rejected = _scores(reward_model, held_out, config, ranks, logger)
    require_finite("the reward-model score", torch.cat([samples.cpu(), chosen, rejected]))
    mean, std = samples.mean().item(), scale_of(samples, chosen - rejected)
    reward_model.mean, reward_model.std = mean, std
    logger.phase("saving the model")
    with ranks.whole(reward_model):
        if ranks.main:
            reward_model.save(tokenizer, work.outputs["reward"], kind="reward", base=sft)
            add_facts(work.outputs["reward"], {"chat": read_card(sft).get("chat", False)})
    same += also_same
    return _report(held_out_table, train, held_out, same, chosen, rejected, mean, std, seed)


def scale_of(samples: Tensor, gaps: Tensor) -> float:
    """The standard deviation of scores, or 1 when it is no scale for the gaps between answers.

    Samples that are all alike have a spread of 0 or of rounding, by which rewards would become
    millions. It is no scale below a hundredth of the usual gap (root mean square).

    Shapes: (N,) scores of samples, (M,) gaps between chosen and rejected answers.
    """
    spread, usual = samples.std().item(), gaps.double().square().mean().sqrt().item()
    if spread > max(usual * _LEAST_SPREAD, 1e-6):
        return spread
    _log.warning(
        "the %d SFT samples have almost the same score (spread %.3g; the answers to compare are "
        "%.3g apart), so rewards are only centred and not scaled. Sample more varied texts: raise "
        "sampling.temperature or reward_model.normalization_samples, or train less in sft",
        len(samples),
        spread,
        usual,
    )
    return 1.0


@torch.no_grad()
def _sft_scores(
    reward_model: ScalarModel,
    sft: Path,
    prompts: Iterable[Prompt],
    config: RewardModelConfig,
    sampling: SamplingConfig,
    seed: int,
    logger: StageLogger,
) -> Tensor:
    """(normalization_samples,) raw scores of SFT samples; each prompt is used once before any
    repeats."""
    logger.phase("normaliser: loading the SFT policy")
    device = str(reward_model.model.device)
    policy, tokenizer = Policy.load(sft, device, config.precision)
    # Distinct prompts, since a pair with several votes repeats its prompt.
    longest = sampling.max_prompt_length
    distinct = list(dict.fromkeys(tuple(encode_prompt(p, tokenizer, longest)) for p in prompts))
    order = torch.randperm(len(distinct), generator=generator(seed, "reward/prompts")).tolist()
    rows = [list(distinct[i]) for i in islice(cycle(order), config.normalization_samples)]
    draws = generator(seed, "reward/normalization")
    between = partial(counted, logger)
    what = "normaliser: sampling"
    scores = []
    for batch in respond(policy, rows, sampling, generator=draws, between=between, what=what):
        logger.phase("normaliser: scoring")
        scores.append(response_scores(reward_model, lay_out(*batch)))
    return torch.cat(scores)


def _report(
    table: pd.DataFrame,
    train: list[Pair],
    held_out: list[Pair],
    same: int,
    chosen: Tensor,
    rejected: Tensor,
    mean: float,
    std: float,
    seed: int,
) -> RewardModelReport:
    """Accuracy, baseline and calibration on the held-out votes; the scores are raw logits."""
    decided = torch.tensor([not pair.tie for pair in held_out])
    require_decided(decided)
    prompts = prompt_numbers(table)
    gap = (chosen - rejected)[decided]
    correct = half_for_ties(gap)
    longer = half_for_ties(
        torch.tensor([len(pair.chosen) - len(pair.rejected) for pair in held_out])[decided]
    )
    accuracy = ranking.clustered_share(
        correct, prompts[decided], generator=generator(seed, "reward/bootstrap")
    )
    # Each pair counts in both orders, since the order has no meaning.
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
        held_out_votes=len(gap),
        held_out_prompts=len(prompts[decided].unique()),
        truncated=sum(pair.truncated for pair in [*train, *held_out]),
        same_after_cut=same,
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


def _as_text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def accumulate(
    learner: Learner,
    pairs: list[Pair],
    config: RewardModelConfig,
    ranks: Ranks,
    check: Callable[[], None],
) -> dict[str, float]:
    """Add the gradient of one optimizer step; return its mean loss and its accuracy."""
    sums = {"loss": 0.0, "accuracy": 0.0}
    for picked in ranks.micro_batches(range(len(pairs)), config.micro_batch_size):
        check()
        micro = [pairs[i] for i in picked.rows]
        share = picked.weight / len(pairs)
        with learner.accumulate(last=picked.last):
            packed = pack_pairs(micro, learner.network.model.device)
            chosen, rejected = learner(packed, packed.last()).view(-1, 2).unbind(1)
            loss = _loss(chosen, rejected, micro, config) * (len(micro) * share)
            learner.backward(loss, "the reward-model loss")
        sums["loss"] += loss.item()
        sums["accuracy"] += half_for_ties(chosen - rejected).sum().item() * share
    return ranks.sum(sums)


def _loss(chosen: Tensor, rejected: Tensor, pairs: list[Pair], config: RewardModelConfig) -> Tensor:
    """Mean loss over the pairs of a micro-batch."""
    if config.loss == "pointwise_mse":
        half = 0.5 * torch.tensor([pair.tie for pair in pairs], device=chosen.device)
        return pointwise_mse(torch.cat([chosen, rejected]), torch.cat([1 - half, half]))
    return bradley_terry(
        chosen,
        rejected,
        margin=torch.tensor([pair.margin for pair in pairs], device=chosen.device),
        label_smoothing=smoothing(pairs, config.label_smoothing, chosen.device),
        center_coef=config.center_coef,
    )


@torch.no_grad()
def _scores(
    reward_model: ScalarModel,
    pairs: list[Pair],
    config: RewardModelConfig,
    ranks: Ranks,
    logger: StageLogger,
) -> tuple[Tensor, Tensor]:
    """(N,) raw scores of all chosen and all rejected texts, on the CPU."""
    device = reward_model.model.device

    def score(rows: list[int]) -> Tensor:
        return reward_model.scores(pack_pairs([pairs[i] for i in rows], device)).view(-1, 2)

    size = config.micro_batch_size
    between = counted(logger, "held-out votes", ranks.passes(len(pairs), size))
    chosen, rejected = ranks.collect(len(pairs), size, score, between).unbind(1)
    return chosen, rejected

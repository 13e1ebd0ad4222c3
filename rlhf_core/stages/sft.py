"""Supervised fine-tuning: the policy learns to answer as the demonstrations do.

    L(θ) = -Σₜ log π_θ(yₜ | x, y₍<ₜ₎) / number of response tokens

over the responses y and not the prompts x. Deviations from common trainers, each on purpose:
1. The mean runs over all response tokens of an optimizer step, whatever the micro-batches.
2. Packing puts the examples of one step into fewer rows; the update stays the same.
3. Dropout is off, so the policy that is trained is the policy that later samples.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_core import figures
from rlhf_core.batching import Example, packed_rows, padded_rows, text_batches, text_nll
from rlhf_core.data import read_table, training_texts
from rlhf_core.encoding import encode_pair
from rlhf_core.errors import DataError
from rlhf_core.metrics import StageLogger
from rlhf_core.models import ModelConfig, load_base, require_context, save_model
from rlhf_core.optim import Optimizer, TrainingSection, shuffled_batches
from rlhf_core.seeding import generator
from rlhf_core.types import Report


class SFTConfig(TrainingSection):
    """Settings of supervised fine-tuning."""

    epochs: int = Field(1, ge=1, description="Passes over the demonstrations")
    max_length: int = Field(512, ge=2, description="Longest prompt + response (tokens)")
    packing: bool = Field(True, description="Several examples in a row: faster, same result")
    train_on_prompt: bool = Field(False, description="Also learn to predict the prompt")
    evaluations: int = Field(
        5, ge=1, description="How often the held-out loss is measured; the best weights are kept"
    )


@dataclass(frozen=True, kw_only=True)
class SFTReport(Report):
    """What supervised fine-tuning reached."""

    held_out_loss: float  # nats a token, at the weights that were kept
    held_out_perplexity: float  # exp(held_out_loss)
    best_step: int
    steps: int
    train_examples: int
    truncated: int  # training texts cut to max_length


def train_sft(
    config: SFTConfig,
    *,
    model: ModelConfig,
    data: Path,
    output: Path,
    seed: int,
    device: str,
    logger: StageLogger,
) -> SFTReport:
    """Fine-tune `model` on the prepared demonstrations and write the best policy to `output`.

    Raises: ModelError, DataError, ConfigError for what a user can mend; NumericsError when a
    gradient is no longer finite.
    """
    train_table = read_table(data, "demonstrations", "train")
    policy, tokenizer = load_base(model, training_texts(train_table), seed)
    require_context(policy, config.max_length, "sft.max_length")
    policy.to(device)
    train, truncated = _encode(train_table, tokenizer, config)
    held_out, _ = _encode(read_table(data, "demonstrations", "eval"), tokenizer, config)

    chat = any(not isinstance(prompt, str) for prompt in train_table["prompt"])

    steps = config.epochs * math.ceil(len(train) / config.batch_size)
    optimizer = Optimizer(policy, config, steps)
    order = generator(seed, "sft/order")
    measure_at = {round(steps * (i + 1) / config.evaluations) for i in range(config.evaluations)}
    losses: list[tuple[int, float]] = []
    held_out_losses: list[tuple[int, float]] = []
    for step, picked in enumerate(
        shuffled_batches(len(train), config.batch_size, config.epochs, order), start=1
    ):
        rate = optimizer.learning_rate
        loss = _accumulate(policy, [train[i] for i in picked], config, tokenizer.pad_token_id)
        grad_norm = optimizer.step()
        losses.append((step, loss))
        logger.metrics({"loss": loss, "grad_norm": grad_norm, "learning_rate": rate}, step)
        logger.progress(step, steps, f"loss {loss:.3f}")
        if step in measure_at:
            measured = _mean_nll(policy, held_out, config, tokenizer.pad_token_id)
            if all(measured < earlier for _, earlier in held_out_losses):
                save_model(
                    policy, tokenizer, output, kind="policy", facts={"step": step, "chat": chat}
                )
            held_out_losses.append((step, measured))
            logger.metrics(
                {"held_out/loss": measured, "held_out/perplexity": math.exp(measured)}, step
            )

    best_step, best = min(held_out_losses, key=lambda point: point[1])
    return SFTReport(
        held_out_loss=best,
        held_out_perplexity=math.exp(best),
        best_step=best_step,
        steps=steps,
        train_examples=len(train),
        truncated=truncated,
        figures={"sft_loss": figures.loss_curves(losses, held_out_losses)},
    )


def _encode(
    table: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, config: SFTConfig
) -> tuple[list[Example], int]:
    """The examples of a table, and how many of them were cut."""
    if table.empty:
        raise DataError(
            "the demonstrations have no rows for training or for evaluation; add rows, or change "
            "data.eval_fraction"
        )
    encoded = [
        encode_pair(prompt, response, tokenizer, config.max_length)
        for prompt, response in zip(table["prompt"], table["response"], strict=True)
    ]
    examples = [
        Example(ids, 0 if config.train_on_prompt else in_prompt) for ids, in_prompt, _ in encoded
    ]
    return examples, sum(cut for *_, cut in encoded)


def _accumulate(
    policy: PreTrainedModel, examples: list[Example], config: SFTConfig, pad_token_id: int
) -> float:
    """Add the gradient of one optimizer step, micro-batch by micro-batch; return its mean loss."""
    tokens = sum(example.targets for example in examples)
    total = 0.0
    rows = packed_rows(examples, config.max_length) if config.packing else padded_rows(examples)
    for batch in text_batches(rows, config.micro_batch_size, pad_token_id, str(policy.device)):
        loss = text_nll(policy, batch).total / tokens
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def _mean_nll(
    policy: PreTrainedModel, examples: list[Example], config: SFTConfig, pad_token_id: int
) -> float:
    """Nats a token over held-out examples."""
    rows = packed_rows(examples, config.max_length) if config.packing else padded_rows(examples)
    parts = [
        text_nll(policy, batch)
        for batch in text_batches(rows, config.micro_batch_size, pad_token_id, str(policy.device))
    ]
    return float(sum(part.total for part in parts)) / float(sum(part.tokens for part in parts))

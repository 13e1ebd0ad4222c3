"""Supervised fine-tuning: train the policy to imitate the demonstrations.

    L(θ) = -Σₜ log π_θ(yₜ | x, y₍<ₜ₎) / number of response tokens

over the responses y, not the prompts x. Deliberate deviations from common trainers:
1. The mean runs over all response tokens of an optimizer step, whatever micro-batches and ranks.
2. Texts are packed without padding; the update equals that of separate texts.
3. Dropout is off, so training and sampling use the same policy.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_core import figures
from rlhf_core.backbone.base_model import base_facts, load_base
from rlhf_core.backbone.context import require_context
from rlhf_core.backbone.directory import CARD
from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.packing import Packed, pack
from rlhf_core.data.chat_tokens import set_date
from rlhf_core.data.mapped.rows import PreparedRows
from rlhf_core.data.mapped.training import (
    Example,
    Examples,
    Place,
    examples_of,
    has_chats,
    training_dialogues,
)
from rlhf_core.data.prepared import SPLITS, date_of
from rlhf_core.errors import CheckpointError, NumericsError
from rlhf_core.functional.losses import token_nll
from rlhf_core.metrics import StageLogger, counted
from rlhf_core.seeding import generator
from rlhf_core.settings.model import ModelConfig
from rlhf_core.settings.training import SFTConfig
from rlhf_core.training.epochs import optimizer_steps
from rlhf_core.training.learner import Learner, adapt
from rlhf_core.training.order import Batches
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.recovery import run_identity
from rlhf_core.types import Report
from rlhf_core.work import Work

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SFTReport(Report):
    """The results of supervised fine-tuning."""

    held_out_loss: float  # nats a token, of the saved weights
    held_out_perplexity: float  # exp(held_out_loss)
    best_step: int
    steps: int
    train_examples: int
    truncated: int  # training texts cut to max_length


@dataclass
class _Best:
    """The lowest held-out loss so far; its weights are in the output folder."""

    step: int = 0
    loss: float = math.inf
    measured: list[tuple[int, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return vars(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def train_sft(config: SFTConfig, work: Work) -> SFTReport:
    """Fine-tune the base model on the prepared demonstrations, and write the best policy.

    With a recovery, a run that was killed resumes bit for bit, given the same output folder.

    Args:
        work: input data; output sft; section model, the base model.

    Raises: ModelError, DataError, ConfigError for errors that a user can fix; NumericsError when a
    gradient is not finite; CheckpointError when the checkpoints are from another run.
    """
    data, output, seed, ranks = work.inputs["data"], work.outputs["sft"], work.seed, work.ranks
    model, logger = work.section(ModelConfig), work.logger
    logger.phase("loading the model")
    shown = PreparedRows(data, "demonstrations", "train")
    base, tokenizer = load_base(model, training_dialogues(shown), seed)
    set_date(tokenizer, date_of(data))
    require_context(base, config.max_length, "sft.max_length")
    policy = Policy(base.to(work.device), precision=config.precision)
    adapt(policy, config, "sft", seed=seed, stream="sft/adapter")
    logger.phase("encoding the demonstrations")
    place = Place(data, tokenizer, work.recovery.tokens, logger)
    train, held_out = (
        examples_of(place, split, config.max_length, with_prompt=config.train_on_prompt)
        for split in SPLITS
    )
    facts = {
        "chat": has_chats(shown),
        **base_facts(model, seed),
    }

    steps = config.epochs * math.ceil(len(train) / config.batch_size)
    learner = Learner(policy, config, steps, ranks=ranks)
    batches = Batches(len(train), config.batch_size, config.epochs, generator(seed, "sft/order"))
    measure_at = {round(steps * (i + 1) / config.evaluations) for i in range(config.evaluations)}
    best = _Best()
    with work.recovery.open(
        logger,
        identity=run_identity("sft", seed, {"sft": config, "model": model}, {"data": data}),
        learners={"policy": learner},
        positions={"batches": batches, "best": best},
        ranks=ranks,
    ) as session:
        if session.resume() and best.step and not (output / CARD).is_file():
            raise CheckpointError(
                f"the best weights, of step {best.step}, are no longer in {output}; restore them, "
                "or delete the checkpoints to start over"
            )

        def add(picked: list[int], check: Callable[[], None]) -> dict[str, float]:
            rows = [train[i] for i in picked]
            return {"loss": accumulate(learner, rows, config, ranks, check)}

        for step in optimizer_steps(session, learner, batches, add, config, ranks, total=steps):
            if step in measure_at:
                measured = _mean_nll(policy, held_out, config, ranks, logger)
                best.measured.append((step, measured))
                if measured < best.loss:
                    best.step, best.loss = step, measured
                    session.phase("saving the best weights")
                    with ranks.whole(policy):
                        if ranks.main:
                            policy.save(tokenizer, output, {"step": step, **facts})
                session.metrics(
                    {"held_out/loss": measured, "held_out/perplexity": perplexity(measured)}, step
                )
        losses = [(step, values["loss"]) for step, values in session.history if "loss" in values]

    require_learnt(best.measured)
    return SFTReport(
        held_out_loss=best.loss,
        held_out_perplexity=perplexity(best.loss),
        best_step=best.step,
        steps=steps,
        train_examples=len(train),
        truncated=train.cut,
        figures={"sft_loss": figures.loss_curves(losses, best.measured)},
    )


def perplexity(nll: float) -> float:
    """exp(mean negative log-likelihood, nats a token); infinite when that is beyond a float."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def require_learnt(measured: Sequence[tuple[int, float]]) -> None:
    """Look at the held-out losses by step: warn when the best has no finite perplexity.

    Raises: NumericsError when no loss was finite, so that no weights were kept.
    """
    lowest = min((loss for _, loss in measured if math.isfinite(loss)), default=math.nan)
    if math.isnan(lowest):
        step, loss = measured[-1]
        raise NumericsError(
            f"the held-out loss was never finite ({loss} at step {step}), so no weights are worth "
            "keeping: fine-tuning diverged. Lower sft.learning_rate"
        )
    if math.isinf(perplexity(lowest)):
        _log.warning(
            "the lowest held-out loss is %.0f nats a token, which is a perplexity beyond any "
            "number: fine-tuning diverged. Lower sft.learning_rate",
            lowest,
        )


def accumulate(
    learner: Learner,
    examples: list[Example],
    config: SFTConfig,
    ranks: Ranks,
    check: Callable[[], None],
) -> float:
    """Add the gradient of one optimizer step, micro-batch by micro-batch; return its mean loss."""
    targets = sum(example.targets for example in examples)
    loss = 0.0
    for micro in ranks.micro_batches(range(len(examples)), config.micro_batch_size):
        check()
        rows = [examples[i] for i in micro.rows]
        with learner.accumulate(last=micro.last):
            out = learner(
                *_predictions(rows, learner.network.model.device),
                token_loss=lambda logprobs, _: token_nll(logprobs, normalizer=targets),
            )
            learner.backward(out.loss * micro.weight, "the SFT loss")
        loss += out.loss.item() * micro.weight
    return ranks.sum({"loss": loss})["loss"]


@torch.no_grad()
def _mean_nll(
    policy: Policy,
    examples: Examples,
    config: SFTConfig,
    ranks: Ranks,
    logger: StageLogger,
) -> float:
    """Mean loss over held-out examples, nats a token."""
    nll, targets = 0.0, examples.targets
    micros = ranks.micro_batches(range(len(examples)), config.micro_batch_size)
    between = counted(logger, "held-out loss", len(micros))
    for micro in micros:
        between()
        rows = [examples[i] for i in micro.rows]
        out = policy(*_predictions(rows, policy.model.device))
        nll += token_nll(out.logprobs.double(), normalizer=targets).item() * micro.weight
    return ranks.sum({"nll": nll})["nll"]


def _predictions(
    examples: Sequence[Example], device: torch.device
) -> tuple[Packed, Tensor, Tensor]:
    """The packed texts, the positions that predict their target tokens, and these tokens."""
    packed = pack([example.ids for example in examples], device)
    starts = torch.tensor([example.untrained for example in examples], device=device)
    return packed, *packed.predictions(starts)

"""The part of training that every stage shares: optimizer, schedule, one safe step, batches."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from rlhf_core.config import Section
from rlhf_core.errors import NumericsError


class TrainingSection(Section):
    """Settings of gradient descent that all training stages have."""

    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate of AdamW")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="How the learning rate falls to 0 after warm-up"
    )
    warmup_ratio: float = Field(
        0.05, ge=0, lt=1, description="Share of all steps in which the rate rises from 0"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay, on matrices alone")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm")
    batch_size: int = Field(32, ge=1, description="Samples in one optimizer step")
    micro_batch_size: int = Field(
        32, ge=1, description="Samples in one forward pass; less memory, same result"
    )


class Optimizer:
    """AdamW with a schedule, and a step that refuses what is not finite."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainingSection,
        total_steps: int,
        learning_rate: float | None = None,
    ) -> None:
        self._named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        decay = [p for _, p in self._named if p.ndim >= 2]
        plain = [p for _, p in self._named if p.ndim < 2]
        self._max_grad_norm = config.max_grad_norm
        self._adamw = AdamW(
            [
                {"params": decay, "weight_decay": config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=config.learning_rate if learning_rate is None else learning_rate,
            fused=True,
        )
        warmup = round(config.warmup_ratio * total_steps)
        self._schedule = LambdaLR(
            self._adamw,
            lambda step: learning_rate_factor(config.schedule, step, warmup, total_steps),
        )

    @property
    def learning_rate(self) -> float:
        """The rate that the next step applies."""
        return float(self._schedule.get_last_lr()[0])

    def step(self) -> float:
        """Clip, update, advance the schedule, clear the gradients.

        Returns: the gradient norm before clipping.
        Raises: NumericsError naming the first tensor whose gradient is not finite.
        """
        parameters = [p for _, p in self._named]
        # Measured before it is clipped: scaling by a norm of NaN would leave NaN in every tensor.
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not bool(norm.isfinite()):
            raise NumericsError(
                f"the gradient of {self._first_bad()} is not finite; training has stopped before "
                "the update. Lower learning_rate, or look at the batch that was logged last"
            )
        nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
        self._adamw.step()
        self._schedule.step()
        self.drop_gradient()
        return norm.item()

    def drop_gradient(self) -> None:
        """Forget what has been accumulated since the last step."""
        self._adamw.zero_grad(set_to_none=True)

    def _first_bad(self) -> str:
        bad = (n for n, p in self._named if p.grad is not None and not p.grad.isfinite().all())
        return next(bad, "the model")


def learning_rate_factor(schedule: str, step: int, warmup: int, total: int) -> float:
    """Share of the peak rate at a step: rises over `warmup` steps, then falls to 0 at `total`.

    linear: 1 - p; cosine: (1 + cos πp) / 2; with p = (step - warmup) / (total - warmup).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    p = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 1.0 - p if schedule == "linear" else (1.0 + math.cos(math.pi * p)) / 2.0


def require_finite(name: str, value: Tensor) -> None:
    """Raise NumericsError naming the tensor unless all of it is finite."""
    if not bool(value.isfinite().all()):
        raise NumericsError(
            f"{name} is not finite; training has stopped before the update. Lower learning_rate, "
            "or look at the batch that was logged last"
        )


def shuffled_batches(
    size: int, batch_size: int, epochs: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Indices of one batch after another, each epoch in its own order; its last may be short."""
    for _ in range(epochs):
        order = torch.randperm(size, generator=generator).tolist()
        for start in range(0, size, batch_size):
            yield order[start : start + batch_size]


def chunks(items: list[int], size: int) -> Iterator[list[int]]:
    """Consecutive pieces of at most `size` items: the micro-batches of a batch."""
    for start in range(0, len(items), size):
        yield items[start : start + size]

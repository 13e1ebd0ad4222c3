"""Who owns β, the price of a nat of KL: it stays where it is, or follows a target.

Knows nothing of tensors. What β is multiplied with: `functional.rewards.shaped_rewards`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from rlhf_core.errors import NumericsError

MAX_ERROR = 0.2


class KLController(Protocol):
    """Owner of the KL coefficient β. `value` is what applies now, and what should be logged."""

    value: float

    def update(self, kl: float, n: int) -> None:
        """Learn that the last `n` sequences had `kl` nats each on average."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint has to keep."""

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue where `state_dict` was taken."""


@dataclass
class FixedKL:
    """A coefficient that stays where it was put."""

    value: float

    def update(self, kl: float, n: int) -> None:
        """Change nothing, whatever the KL."""

    def state_dict(self) -> dict[str, float]:
        """The coefficient."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take the coefficient from the checkpoint."""
        self.value = state["value"]


class AdaptiveKL:
    """A coefficient that rises while the policy is further than `target` from its reference.

        β ← β·(1 + clip(KL / target - 1, -0.2, 0.2)·n / horizon)

    Args:
        kl_coef: β at the start, score per nat.
        target: KL to hold, nats per sequence.
        horizon: sequences over which β moves by a fifth at most.

    Raises:
        ValueError: if a number is not positive.

    Reference: Ziegler et al. 2019, section 2.2, https://arxiv.org/abs/1909.08593.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        if not min(kl_coef, target, horizon) > 0:
            raise ValueError(
                "kl_coef, target and horizon must be positive, "
                f"got {kl_coef}, {target} and {horizon}."
            )
        self.value = kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> None:
        """Move β after `n` sequences with `kl` nats each on average.

        Raises:
            NumericsError: if `kl` is not finite.
            ValueError: if `n` is negative, or so large that β could lose its sign.
        """
        if not math.isfinite(kl):
            raise NumericsError(f"The KL to the reference policy is {kl}, so β cannot follow it.")
        if not 0 <= MAX_ERROR * n < self.horizon:
            raise ValueError(f"horizon {self.horizon} is too short for a batch of {n} sequences.")
        error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        self.value *= 1 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        """The coefficient; target and horizon belong to the config."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take the coefficient from the checkpoint."""
        self.value = state["value"]

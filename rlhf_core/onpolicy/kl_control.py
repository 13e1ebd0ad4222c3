"""Controllers of β, the price of a nat of KL: fixed, or adapting to a target.

This module knows nothing about tensors. `functional.rewards.shaped_rewards` applies β.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from rlhf_core.errors import NumericsError
from rlhf_core.settings.onpolicy import MAX_ERROR, KLSection


class KLController(Protocol):
    """Owns the KL coefficient β. `value` is the current β, which should be logged."""

    value: float

    def update(self, kl: float, n: int) -> None:
        """Adapt to the last `n` sequences, which had `kl` nats each on average."""

    def state_dict(self) -> dict[str, float]:
        """The state for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` returned."""


@dataclass
class FixedKL:
    """A constant coefficient."""

    value: float

    def update(self, kl: float, n: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, float]:
        """The coefficient."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the coefficient."""
        self.value = state["value"]


class AdaptiveKL:
    """A coefficient that rises while the KL to the reference is above `target`, and falls below it.

        β ← β·(1 + clip(KL / target - 1, -0.2, 0.2)·n / horizon)

    Args:
        kl_coef: β at the start, score per nat.
        target: KL to hold, nats per sequence.
        horizon: sequences over which β changes by at most a fifth.

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
        """Restore the coefficient."""
        self.value = state["value"]


def controller_of(config: KLSection) -> KLController:
    """The controller that owns β, as the settings say."""
    if config.kl_control == "fixed":
        return FixedKL(config.kl_coef)
    return AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)

"""The order in which pairs tell most about the last layer of a reward model: D-optimal design.

A vote on a pair with features x = h(a) - h(b) is won by a with chance p = σ(wᵀx). It adds
p·(1 - p)·x·xᵀ to the information about w, and the volume of what is still possible for w shrinks by
the factor √(1 + p·(1 - p)·xᵀA⁻¹x), A the information so far. The pair with the largest gain

    gain(x) = log(1 + p·(1 - p)·xᵀA⁻¹x)

goes next, and A takes it in before the one after is chosen. So a pair that says what an earlier one
says comes late, and so does one that repeats what was labelled before the order was made: A starts
from those votes (past-aware).

References: Chaloner and Verdinelli 1995, Bayesian experimental design,
https://doi.org/10.1214/ss/1177009939 (the criterion); Nemhauser, Wolsey and Fisher 1978,
https://doi.org/10.1007/BF01588971 (the greedy choice has at least 1 - 1/e of the best gain); Shen,
Sun and Ton 2025, https://arxiv.org/abs/2502.04354 (on the last layer of a reward model, and the
past).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """Candidates, the most informative first."""

    chosen: Tensor  # (K,) int64, indices of candidates
    gains: Tensor  # (K,) nats of log det that each adds when it is chosen


def d_optimal(
    features: Tensor,
    weights: Tensor,
    precision: Tensor,
    count: int,
    *,
    groups: Tensor | None = None,
    asked: Tensor | None = None,
) -> Order:
    """The greedy D-optimal order of `count` of N candidates.

    With A₀ = `precision`, step k takes the candidate with the largest log(1 + wᵢ·qᵢ), where
    qᵢ = xᵢᵀA⁻¹xᵢ, and then, by Sherman and Morrison, with u = A⁻¹xₖ and c = wₖ / (1 + wₖ·qₖ),

        A⁻¹ ← A⁻¹ - c·u·uᵀ,    qᵢ ← qᵢ - c·(xᵢᵀu)²

    That is O(d³ + N·d²) once and O(N·d + d²) a step. Of equal gains the first candidate wins.

    Args:
        features: (N, d) differences of the two answers' features.
        weights: (N,) at least 0: information of a vote, p·(1 - p) for a vote of Bradley-Terry.
        precision: (d, d) A₀, the prior's and that of the votes that there are; positive definite.
        count: how many to put in order; all of them if there are fewer.
        groups: (N,) int64, numbers from 0 on of groups of candidates that are nearly the same. A
            candidate waits until no other group that has candidates was asked about less often.
        asked: (G,) int64 how often each group was asked about before; None = never.

    Raises:
        ValueError: if the shapes differ, a value is not finite, a weight is negative, or the
            precision is not positive definite.
    """
    x, w = features.double(), weights.double()
    if x.dim() != 2 or w.shape != x.shape[:1] or precision.shape != (x.shape[1], x.shape[1]):
        raise ValueError(
            "d_optimal needs features (N, d), weights (N,) and a precision (d, d), got "
            f"{tuple(features.shape)}, {tuple(weights.shape)} and {tuple(precision.shape)}."
        )
    if not bool(x.isfinite().all()) or not bool(w.isfinite().all()) or bool((w < 0).any()):
        raise ValueError("d_optimal needs finite features, and finite weights of at least 0.")
    factor, failed = torch.linalg.cholesky_ex(precision.double())
    if failed.item() or not bool(factor.isfinite().all()):
        raise ValueError("the precision of d_optimal must be positive definite.")
    turns = _turns(groups, asked, len(x))
    inverse = torch.cholesky_inverse(factor)
    spread = ((x @ inverse) * x).sum(1)
    waiting = torch.ones(len(x), dtype=torch.bool, device=x.device)
    chosen: list[int] = []
    gains: list[float] = []
    for _ in range(min(count, len(x))):
        free = waiting if groups is None else waiting & (turns == turns[waiting].min())
        best = int(torch.where(free, w * spread, -1.0).argmax())
        gain = (w[best] * spread[best]).item()
        chosen.append(best)
        gains.append(gain)
        waiting[best] = False
        if groups is not None:
            turns[groups == groups[best]] += 1
        direction = inverse @ x[best]
        step = w[best] / (1 + gain)
        inverse -= step * torch.outer(direction, direction)
        spread = (spread - step * (x @ direction).square()).clamp(min=0)
    return Order(
        torch.tensor(chosen, dtype=torch.int64), torch.tensor(gains, dtype=torch.float64).log1p()
    )


def _turns(groups: Tensor | None, asked: Tensor | None, size: int) -> Tensor:
    """(N,) how often the group of each candidate was asked about."""
    if groups is None:
        return torch.zeros(size, dtype=torch.int64)
    if groups.shape != (size,):
        raise ValueError(f"groups must have shape ({size},), got {tuple(groups.shape)}.")
    if asked is None:
        return torch.zeros_like(groups)
    return asked[groups].clone()

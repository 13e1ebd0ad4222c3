"""What the monitor measures of a set of samples: formulas, without models or settings."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor

REPEATED, DISTINCT = 3, 2  # tokens of the n-grams
SHRINKAGE = 0.1  # of the covariance, towards a multiple of the identity


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n adjacent tokens."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def repetition(texts: Iterable[Sequence[int]], n: int = REPEATED) -> float:
    """Share of the n-grams of a text that occurred before in it, mean over texts; in [0, 1).

    rep-n = 1 - |distinct n-grams| / |n-grams|; 0 for a text without n-grams.
    Source: Welleck et al. 2020, https://arxiv.org/abs/1908.04319.
    """
    shares = []
    for text in texts:
        found = ngrams(text, n)
        shares.append(1 - len(set(found)) / len(found) if found else 0.0)
    return sum(shares) / len(shares)


def distinct(texts: Iterable[Sequence[int]], n: int = DISTINCT) -> float:
    """Distinct n-grams over all texts, as a share of all n-grams; NaN if there are none.

    It falls with the number of texts, so only sets of one size compare.
    Source: Li et al. 2016, https://arxiv.org/abs/1510.03055.
    """
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else math.nan


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of two (N,) scores; NaN when one of them is constant."""
    if min(len(x.unique()), len(y.unique())) < 2:
        return math.nan
    return float(spearmanr(x.numpy(), y.numpy()).statistic)


def spread(members: Tensor) -> float:
    """Standard deviation over K members of (N, K) scores, mean over texts; NaN for K below 2."""
    return members.std(1).mean().item() if members.shape[1] > 1 else math.nan


def acceleration(series: Sequence[float], step: float = 1.0, width: int = 2) -> float:
    """Second difference of means over `width` points; NaN for fewer than three such means.

    (c - 2b + a) / (width·step)²,  a, b, c the means of the last three runs of `width` points
    """
    if len(series) < 3 * width:
        return math.nan
    tail = list(series)[-3 * width :]
    a, b, c = (sum(tail[i * width : (i + 1) * width]) / width for i in range(3))
    return (c - 2 * b + a) / (width * step) ** 2


@dataclass(frozen=True)
class Cloud:
    """Hidden states of texts, and how far others are from them.

    The squared Mahalanobis distance over the dimension,

        d²(x) = (x - μ)ᵀ Σ⁻¹ (x - μ) / d,   Σ = (1 - α)·S + α·tr(S)/d·I

    with S the covariance of n states, shrunk so that it can be inverted when n < d. By Woodbury's
    identity no (d, d) matrix is needed. This is a heuristic: it tells whether texts are unlike
    those that the cloud was made from, not whether a score is wrong.
    Sources: Lee et al. 2018, https://arxiv.org/abs/1807.03888 (the distance as a sign of inputs out
    of distribution); Ledoit and Wolf 2004, https://doi.org/10.1016/S0047-259X(03)00096-4
    (shrinkage, here by a constant).
    """

    centre: Tensor  # (d,) float64
    offsets: Tensor  # (n, d) float64, the states minus the centre

    @classmethod
    def of(cls, states: Tensor) -> "Cloud":
        """The cloud of (n, d) states, n at least 2."""
        states = states.double()
        centre = states.mean(0)
        return cls(centre, states - centre)

    def distances(self, states: Tensor) -> Tensor:
        """(N,) squared distances of (N, d) states; all NaN when the cloud is a single point."""
        n, d = self.offsets.shape
        scale = self.offsets.square().sum() / (n - 1) / d  # tr(S) / d
        if not scale > 0:
            return torch.full((len(states),), math.nan, dtype=torch.float64)
        ridge = SHRINKAGE * scale
        x = states.double() - self.centre
        factor = self.offsets * ((1 - SHRINKAGE) / (n - 1)) ** 0.5  # (1 - α)·S = factorᵀ·factor
        inner = torch.eye(n, dtype=torch.float64) + factor @ factor.T / ridge
        projected = x @ factor.T  # (N, n)
        correction = (projected * torch.linalg.solve(inner, projected.T).T).sum(1) / ridge
        squared: Tensor = (x.square().sum(1) - correction) / ridge / d
        return squared

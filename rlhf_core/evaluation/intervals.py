"""Estimates whose interval is unknown where there is too little to tell, and never a point.

Shares have `rlhf_core.functional.ranking.clustered_share`. What is here serves measures for which
no interval holds for few clusters: means of unbounded values, calibration errors, correlations.
With fewer than ten prompts, or where nothing varies, they have a value and no bounds.
"""

import math

import numpy as np
import scipy  # imports its parts at their first use
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from rlhf_core.functional.interval import Interval
from rlhf_core.functional.ranking import (
    clustered_bootstrap,
    expected_calibration_error,
    win_rate,
)

FEW_PROMPTS = 10
_RESAMPLES, _CHUNK = 1000, 50
_BINS = 10


class Estimate(BaseModel):
    """A value with 95 % bounds, or without where nobody can tell them."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, low: float, high: float) -> "Estimate":
        """The value with these bounds, unless they are a point or no numbers."""
        if not (math.isfinite(low) and math.isfinite(high)) or high - low < 1e-9:
            return cls(value=value)
        return cls(value=value, low=min(low, value), high=max(high, value))

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.value:.3f} (interval unknown)"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_estimate(values: Tensor, clusters: Tensor, generator: torch.Generator) -> Estimate:
    """Mean of values that have no bounds, such as losses.

        bounds = the wider of clustered_bootstrap and m ± t·s,
        s² = K / (K - 1) · Σ_c (S_c - m·N_c)² / (Σ N)²

    S and N are a cluster's sum and size, m the mean, t the 97.5 % point of Student's distribution
    with K - 1 degrees of freedom, which allows for few clusters. Unknown for fewer than ten.

    Shapes: values (N,), clusters (N,) int64.

    Reference: Davison and Hinkley 1997, Bootstrap Methods and their Application, section 2.2.1.
    """
    drawn = clustered_bootstrap(values, clusters, generator=generator)
    _, member = torch.unique(clusters, return_inverse=True)
    k = int(member.max()) + 1
    if k < FEW_PROMPTS:
        return Estimate(value=drawn.value)
    rest = torch.zeros(k, dtype=torch.float64).index_add_(0, member, values.double() - drawn.value)
    spread = math.sqrt(k / (k - 1) * rest.square().sum().item()) / len(values)
    half = float(scipy.stats.t.ppf(0.975, k - 1)) * spread
    low, high = min(drawn.low, drawn.value - half), max(drawn.high, drawn.value + half)
    return Estimate.of(drawn.value, low, high)


def mean_difference(differences: Tensor, generator: torch.Generator) -> Interval:
    """Mean of paired differences of shares, with 95 % bounds that are never a point.

        bounds = the wider of clustered_bootstrap and m' ± t·s' / √(K + 2)

    m' and s' are mean and standard deviation of the K differences and of two more, one of 1 and one
    of -1; t is the 97.5 % point of Student's distribution with K + 1 degrees of freedom. The two
    stand for what K prompts may not have shown: where all differ by 0, the bounds are near ± 3 / K.

    Args:
        differences: (K,) in [-1, 1], the share of the first less that of the second, by prompt.

    Raises: ValueError when there is no difference, or one is outside [-1, 1].

    Reference: Bonett and Price 2012, https://doi.org/10.3102/1076998611411915, who add as much to
    the two kinds of discordant pairs.
    """
    if not bool(((differences >= -1) & (differences <= 1)).all()):
        raise ValueError("differences of shares must lie in [-1, 1].")
    k = len(differences)
    drawn = clustered_bootstrap(differences, torch.arange(k), generator=generator)
    more = torch.cat([differences.double(), torch.tensor([1.0, -1.0], dtype=torch.float64)])
    half = float(scipy.stats.t.ppf(0.975, k + 1)) * more.std().item() / math.sqrt(k + 2)
    low, high = (more.mean().item() + side * half for side in (-1, 1))
    return Interval(drawn.value, max(min(drawn.low, low), -1.0), min(max(drawn.high, high), 1.0))


def calibration_estimate(
    probabilities: Tensor, outcomes: Tensor, clusters: Tensor, generator: torch.Generator
) -> Estimate:
    """Expected calibration error, with an interval that draws whole clusters.

        bounds = the widest of the percentile and the basic bootstrap, within [0, 1]

    Noise adds to the error of every sample and more to that of a resample, so neither of the two
    alone contains the truth. Unknown for fewer than ten clusters.

    Shapes: (N,) each.

    Reference: Davison and Hinkley 1997, sections 5.2.1 and 5.3.
    """
    value = expected_calibration_error(probabilities, outcomes, _BINS).error
    _, member = torch.unique(clusters, return_inverse=True)
    k = int(member.max()) + 1
    if k < FEW_PROMPTS:
        return Estimate(value=value)
    at = member * _BINS + _bin_of(probabilities)
    gaps = torch.zeros(k * _BINS, dtype=torch.float64)
    gaps = gaps.index_add_(0, at, probabilities.double() - outcomes.double()).view(k, _BINS)
    sizes = torch.bincount(member, minlength=k).double()
    errors = []
    for _ in range(_RESAMPLES // _CHUNK):
        drawn = torch.randint(k, (_CHUNK, k), generator=generator)
        weight = torch.zeros(_CHUNK, k, dtype=torch.float64)
        weight.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        errors.append((weight @ gaps).abs().sum(1) / (weight @ sizes))
    low, high = torch.cat(errors).quantile(_TAILS).tolist()
    return Estimate.of(
        value, max(min(low, 2 * value - high), 0), min(max(high, 2 * value - low), 1)
    )


def calibration_noise(
    probabilities: Tensor, pairs: Tensor, generator: torch.Generator, draws: int = 500
) -> float:
    """The calibration error below which a calibrated model stays in 95 of 100 samples like this.

    Outcomes are drawn from the probabilities themselves, all votes on a pair with one random
    number, as if the voters agreed: that is the noisiest case.

    Args:
        probabilities: (N,) that the first answer of the pair wins.
        pairs: (N,) int64, which pair a vote is on; its answers are in one order in all of them.

    Reference: Bröcker and Smith 2007, https://doi.org/10.1175/WAF993.1.
    """
    _, member = torch.unique(pairs, return_inverse=True)
    both = torch.cat([probabilities, 1 - probabilities]).double()
    errors = torch.zeros(draws, dtype=torch.float64)
    bins, k = _bin_of(torch.cat([probabilities, 1 - probabilities])), int(member.max()) + 1
    for i in range(draws):
        won = (torch.rand(k, generator=generator)[member] < probabilities).double()
        gaps = torch.zeros(_BINS, dtype=torch.float64)
        gaps.index_add_(0, bins, both - torch.cat([won, 1 - won]))
        errors[i] = gaps.abs().sum() / len(both)
    return errors.quantile(0.95).item()


def rank_correlation(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    clusters: NDArray[np.int64],
    generator: torch.Generator,
) -> Estimate | None:
    """Spearman's rank correlation, with an interval; None where one of the two does not vary.

        bounds = the wider of a bootstrap of whole clusters and tanh(artanh ρ ± z·s),
        s² = (1 + ρ²/2) / (K - 3)

    with K clusters, so that samples of one prompt count as one. A perfect correlation, which has
    no error by this formula, is taken as 1 - 1/K. Unknown bounds for fewer than ten clusters.

    Shapes: (N,) each.

    Reference: Bonett and Wright 2000, https://doi.org/10.1007/BF02294183.
    """
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    value = float(scipy.stats.spearmanr(x, y).statistic)
    ids, member = np.unique(clusters, return_inverse=True)
    k = len(ids)
    if k < FEW_PROMPTS:
        return Estimate(value=value)
    near = math.copysign(min(abs(value), 1 - 1 / k), value)
    half = float(scipy.stats.norm.ppf(0.975)) * math.sqrt((1 + near**2 / 2) / (k - 3))
    rows = np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])
    found = []
    for drawn in torch.randint(k, (_RESAMPLES // 2, k), generator=generator).tolist():
        picked = np.concatenate([rows[i] for i in drawn])
        if np.ptp(x[picked]) > 0 and np.ptp(y[picked]) > 0:
            found.append(
                np.corrcoef(scipy.stats.rankdata(x[picked]), scipy.stats.rankdata(y[picked]))[0, 1]
            )
    low, high = np.quantile(found, [0.025, 0.975])
    low = min(float(low), math.tanh(math.atanh(near) - half))
    high = max(float(high), math.tanh(math.atanh(near) + half))
    return Estimate.of(value, low, high)


_TAILS = torch.tensor([0.025, 0.975], dtype=torch.float64)


def _bin_of(probabilities: Tensor) -> Tensor:
    """The bins of `expected_calibration_error`."""
    edges = torch.arange(1, _BINS).to(probabilities.dtype) / _BINS
    return torch.bucketize(probabilities, edges, right=True)


def can_show(prompts: int, least: float) -> bool:
    """Whether this many prompts, if all are won, show a share above `least`.

    It uses Wilson's interval, which a win rate is never narrower than.
    """
    return prompts > 0 and win_rate(prompts, 0, 0).low > least


def in_words(interval: Interval) -> str:
    """A value with its bounds, e.g. `0.812 [0.734, 0.890]`."""
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"

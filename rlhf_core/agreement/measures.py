"""A number with its interval, and intervals of many shares at once."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy import stats

from rlhf_core.agreement.votes import Floats, Ints

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
FEW_CLUSTERS = 10  # below, no interval of a mean or a coefficient is worth its name


@dataclass(frozen=True)
class Measure:
    """A value with 95 % bounds, and how many cases it rests on."""

    value: float
    low: float | None  # None: nobody can tell
    high: float | None
    of: int

    @classmethod
    def within(cls, value: float, low: float, high: float, of: int) -> "Measure":
        """A value with these bounds, unless they are no numbers or a point."""
        if not (math.isfinite(low) and math.isfinite(high)) or high - low < 1e-9:
            return cls(value, None, None, of)
        return cls(value, float(min(low, value)), float(max(high, value)), of)

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.value:.3f} (interval unknown)"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Shares:
    """Shares of G owners: of each annotator, or of each week."""

    share: Floats  # (G,) NaN where there is no case
    of: Ints  # (G,) cases
    effective: Floats  # (G,) how many independent cases they are worth

    def measure(self, owner: int) -> Measure | None:
        """The share of one owner with Wilson's interval; None without a case."""
        if self.of[owner] == 0:
            return None
        p, n = float(self.share[owner]), float(self.effective[owner])
        z2 = _Z**2
        centre = p + z2 / (2 * n)
        half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
        low, high = ((centre + side * half) / (1 + z2 / n) for side in (-1, 1))
        # rounding may put a bound of 0 or 1 on the wrong side of the share
        low, high = min(max(low, 0.0), p), max(min(high, 1.0), p)
        return Measure(p, low, high, int(self.of[owner]))


def shares(values: Floats, owners: Ints, clusters: Ints, count: int) -> Shares:
    """The share of each owner, with what its cases are worth if those of a cluster go together.

        p = Σ y / N,   v = K / (K - 1) · Σ_c (S_c - p·N_c)² / N²
        n = min(N, p·(1 - p) / v) · (t(N - 1) / t(K - 1))²

    S_c and N_c are sum and size of the cases of one cluster, K is their number, and t(d) the 97.5 %
    point of Student's distribution with d degrees of freedom, which allows for few clusters.
    Wilson's interval of p at n covers cases that rise and fall together, as the pairs of a prompt
    do. Where all cases are alike, or in one cluster, nothing is seen of that, and n = N² / Σ N_c²,
    which counts clusters of equal size as one case each.

    Args:
        values: (N,) in [0, 1].
        owners: (N,) 0 … count - 1.
        clusters: (N,) int64, any ids.

    References: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953; Korn and Graubard 1998,
    Survey Methodology 24(2), who put the effective size into an interval of a share.
    """
    size = np.bincount(owners, minlength=count)
    total = np.bincount(owners, values, minlength=count)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = total / size
        of_owner, where = cells(owners, clusters)
        cell_size = np.bincount(where, minlength=len(of_owner)).astype(float)
        cell_sum = np.bincount(where, values, minlength=len(of_owner))
        rest = (cell_sum - share[of_owner] * cell_size) ** 2
        k = np.bincount(of_owner, minlength=count)
        variance = k / (k - 1) * np.bincount(of_owner, rest, minlength=count) / size**2
        kish = size**2 / np.bincount(of_owner, cell_size**2, minlength=count)
        worth = share * (1 - share) / variance
    few = _student(size - 1) / _student(k - 1)
    alike = ~np.isfinite(worth) | (share * (1 - share) < 1e-12) | (k < 2)
    effective = np.where(alike, kish, np.minimum(worth, size) * few**2)
    return Shares(share, size, np.maximum(np.nan_to_num(effective, nan=0.0), 0.0))


def cells(owners: Ints, clusters: Ints) -> tuple[Ints, Ints]:
    """Each owner's clusters: the owner of each, and which of them each case is in.

    Shapes: (N,) each; returns (M,) and (N,).
    """
    if not len(owners):
        return owners, owners
    least = int(clusters.min())
    span = int(clusters.max()) - least + 1
    keys, where = np.unique(owners * span + (clusters - least), return_inverse=True)
    return keys // span, where


def _student(freedom: Ints) -> Floats:
    return np.asarray(stats.t.ppf((1 + CONFIDENCE) / 2, np.maximum(freedom, 1)))


def beyond(found: Shares, harmless: Floats, *, above: bool) -> Floats:
    """(G,) The chance of a share at least as extreme, if the true one is at the harmless bound.

        p = P(X ≥ ⌊p·n⌋),  X ~ Binomial(⌊n⌋, harmless);  for `above=False` P(X ≤ ⌈p·n⌉)

    n is the effective number of cases; rounding makes the chance larger, never smaller. It is 1
    without a case.
    """
    n = np.floor(found.effective + 1e-9)
    share = np.nan_to_num(found.share, nan=0.0)
    if above:
        chance = stats.binom.sf(np.floor(share * n + 1e-9) - 1, n, harmless)
    else:
        chance = stats.binom.cdf(np.ceil(share * n - 1e-9), n, harmless)
    return np.where((found.of > 0) & (n > 0), chance, 1.0)


def in_percent(measure: Measure) -> str:
    """A share with its bounds, e.g. `78 % [70, 84]`."""
    if measure.low is None or measure.high is None:
        return f"{100 * measure.value:.0f} %"
    return f"{100 * measure.value:.0f} % [{100 * measure.low:.0f}, {100 * measure.high:.0f}]"

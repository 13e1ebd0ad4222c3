"""Krippendorff's alpha of votes, with an interval that draws whole prompts."""

from collections.abc import Callable

import numpy as np
from scipy import stats

from rlhf_core.agreement.measures import CONFIDENCE, FEW_CLUSTERS, Measure
from rlhf_core.agreement.votes import Floats, Ints

RESAMPLES = 1000
_CELLS = 20_000_000  # numbers of a draw that are in memory at once


def counts_by_pair(pairs: Ints, classes: Ints, count: int, kinds: int) -> Ints:
    """(count, kinds) How many votes each pair has of each class."""
    return np.bincount(pairs * kinds + classes, minlength=count * kinds).reshape(count, kinds)


def coincidences(counts: Ints) -> Floats:
    """(U, C, C) What each pair adds to the coincidence matrix; nothing below two votes.

        o_cd = n_c · (n_d - [c = d]) / (m - 1),   m = Σ n

    Shape: counts (U, C), the votes of each class.
    """
    m = counts.sum(1)
    weight = np.where(m >= 2, 1.0 / np.maximum(m - 1, 1), 0.0)
    both = counts[:, :, None] * (counts[:, None, :] - np.eye(counts.shape[1], dtype=np.int64))
    return np.asarray(both * weight[:, None, None], dtype=np.float64)


def alpha_of(coincidence: Floats) -> Floats:
    """Krippendorff's alpha for nominal data.

        α = 1 - D_o / D_e,   D_o = Σ_{c≠d} o_cd / n,   D_e = Σ_{c≠d} n_c·n_d / (n·(n - 1))

    with o the coincidence matrix, n_c its margins and n its sum. Where only one class occurs, α is
    0/0 and NaN here: votes without any variety say nothing about agreement.

    Shape: (…, C, C), summed over the pairs; returns (…).

    Reference: Krippendorff 2018, Content Analysis, 4th edition, section 12.3.
    """
    margins = coincidence.sum(-1)
    n = margins.sum(-1)
    observed = n - np.trace(coincidence, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = (n**2 - (margins**2).sum(-1)) / (n - 1)
        return np.asarray(1 - observed / np.where(expected > 1e-12, expected, np.nan))


def same_of(coincidence: Floats) -> Floats:
    """The share of equal votes among any two on a pair: Σ_c o_cc / n, of the same shape."""
    with np.errstate(invalid="ignore", divide="ignore"):
        equal = np.trace(coincidence, axis1=-2, axis2=-1)
        return np.asarray(equal / coincidence.sum((-2, -1)), dtype=np.float64)


def krippendorff(
    counts: Ints,
    clusters: Ints,
    *,
    statistic: Callable[[Floats], Floats] = alpha_of,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Measure | None:
    """Krippendorff's alpha with an interval that draws whole clusters; None if it is not defined.

        bounds = the wider of the percentile bootstrap over clusters, and
                 α ± t·s,  s² = (K - 1) / K · Σ_k (α_(-k) - mean)²  (the jackknife)

    The pairs of a prompt share its texts, and the votes on a pair share the pair; both rise and
    fall together, so a prompt enters or leaves as a whole. t has K - 1 degrees of freedom, K being
    the clusters with a pair that has two votes; with fewer than ten the interval is unknown.

    The bootstrap of KALPHA, which evalica has, draws the disagreements of any two votes as if they
    were independent: for five votes on a pair ten of them, although five votes say it all. Its
    interval is too narrow for more than two votes on a pair, and knows no prompts.

    Args:
        counts: (U, C) votes of each class on each pair.
        clusters: (U,) the prompt of each pair.
        statistic: of coincidence matrices (…, C, C): alpha, or `same_of`.

    References: Krippendorff 2018, section 12.3; Davison and Hinkley 1997, Bootstrap Methods and
    their Application, sections 2.2.1 and 3.8.
    """
    several = counts.sum(1) >= 2
    if not several.any():
        return None
    part = coincidences(counts[several])
    kinds = part.shape[1]
    _, member = np.unique(clusters[several], return_inverse=True)
    k = int(member.max()) + 1
    by_cluster = np.stack(
        [np.bincount(member, column, minlength=k) for column in part.reshape(-1, kinds**2).T], 1
    )
    whole = by_cluster.sum(0)
    value = float(statistic(whole.reshape(kinds, kinds)))
    if not np.isfinite(value):
        return None
    pairs = int(several.sum())
    if k < FEW_CLUSTERS:
        return Measure(value, None, None, pairs)
    # Clusters that add the same are drawn as one pattern: the same bootstrap, and much faster.
    patterns, repeated = np.unique(by_cluster.round(9), axis=0, return_counts=True)
    without = statistic((whole - patterns).reshape(-1, kinds, kinds))
    mean = np.average(without, weights=repeated)
    spread = np.sqrt((k - 1) / k * np.sum(repeated * (without - mean) ** 2))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, k - 1)) * float(spread)
    random = np.random.default_rng(seed)
    drawn, step = [], max(1, _CELLS // len(patterns))
    for start in range(0, resamples, step):
        times = random.multinomial(k, repeated / k, size=min(step, resamples - start))
        sums: Floats = times.astype(np.float64) @ patterns
        drawn.append(statistic(sums.reshape(-1, kinds, kinds)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(np.concatenate(drawn), [tail, 1 - tail])
    return Measure.within(
        value, min(float(low), value - half), min(max(float(high), value + half), 1.0), pairs
    )

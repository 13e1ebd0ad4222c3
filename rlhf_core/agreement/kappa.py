"""Cohen's kappa of every two annotators who voted on the same pairs."""

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from scipy import stats

from rlhf_core.agreement.measures import CONFIDENCE, FEW_CLUSTERS, Measure, cells
from rlhf_core.agreement.votes import CLASSES, UNKNOWN, Floats, Ints, Votes

LEAST_SHARED: Final = 20  # pairs that two people both voted on: with fewer a kappa says nothing
_MOST: Final = 4_000_000  # votes of two people on one pair that are held at once


class PairOfAnnotators(NamedTuple):
    """How far two annotators agree."""

    first: int  # numbers of annotators
    second: int
    shared: int  # pairs that both voted on
    kappa: Measure | None  # None where one of them says one thing only
    same: float  # share of equal votes


def kappas(votes: Votes, *, least: int = LEAST_SHARED) -> list[PairOfAnnotators]:
    """Cohen's kappa of every two annotators with enough pairs in common, with its interval.

        κ = (p_o - p_e) / (1 - p_e),   p_e = Σ_c p_c·q_c
        bounds = κ ± t·s,   s² = max(Σ_i d_i², K / (K - 1) · Σ_k (Σ_{i∈k} d_i)²) / n²
        d_i = ([x_i = y_i] - p_o) / (1 - p_e)
              - (1 - p_o)·(q_{x_i} + p_{y_i} - 2·p_e) / (1 - p_e)²

    p and q are the shares of each class for the two, x_i and y_i what they say of pair i. d is the
    influence of a pair, so that the first s is that of Fleiss, Cohen and Everitt; the second lets
    the pairs of a prompt go together. t has K - 1 degrees of freedom, K prompts. Unknown for fewer
    than ten. With more annotators than memory allows, those with most votes are compared.

    References: Cohen 1960, https://doi.org/10.1177/001316446002000104; Fleiss, Cohen and Everitt
    1969, https://doi.org/10.1037/h0028106.
    """
    rows = votes.independent()
    rows = rows[votes.annotator[rows] != UNKNOWN]
    together = _together(votes, rows)
    if not len(together):
        return []
    first, second = votes.annotator[together].T
    swap = first > second
    together[swap] = together[swap][:, ::-1]
    first, second = votes.annotator[together].T
    names, duo = np.unique(first * len(votes.names) + second, return_inverse=True)
    often = np.bincount(duo) >= least
    kept = often[duo]
    together, duo = together[kept], (np.cumsum(often) - 1)[duo[kept]]
    found = zip(*np.divmod(names[often], len(votes.names)), strict=True)
    x, y = votes.classes[together].T
    prompts = votes.prompt[votes.pair[together[:, 0]]]
    return [
        PairOfAnnotators(int(one), int(other), shared, kappa, same)
        for (one, other), (shared, kappa, same) in zip(
            found, _measures(x, y, duo, prompts, int(often.sum())), strict=True
        )
    ]


def cohen(x: Ints, y: Ints, clusters: Ints, classes: int = len(CLASSES)) -> Measure | None:
    """Cohen's kappa of two annotators, as in `kappas`; None where it is 0/0.

    Shapes: (n,) each, what they say of the same pairs, and the prompts of these.
    """
    duo = np.zeros(len(x), dtype=np.int64)
    [(_, kappa, _)] = _measures(x, y, duo, clusters, 1, classes)
    return kappa


def _measures(
    x: Ints, y: Ints, duo: Ints, clusters: Ints, count: int, classes: int = len(CLASSES)
) -> Iterator[tuple[int, Measure | None, float]]:
    n = np.bincount(duo, minlength=count)
    p, q = (
        np.bincount(duo * classes + said, minlength=count * classes).reshape(count, classes)
        / n[:, None]
        for said in (x, y)
    )
    same = (x == y).astype(float)
    observed = np.bincount(duo, same, minlength=count) / n
    expected = (p * q).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        kappa = np.where(expected < 1 - 1e-12, (observed - expected) / (1 - expected), np.nan)
        rest = 1 - expected[duo]
        pull = q[duo, x] + p[duo, y] - 2 * expected[duo]
        influence = (same - observed[duo]) / rest - (1 - observed[duo]) * pull / rest**2
    alone = np.bincount(duo, influence**2, minlength=count) / n**2
    spread, k = _clustered(influence, duo, clusters, count)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, np.maximum(k - 1, 1)) * np.sqrt(
        np.maximum(alone, spread / n**2)
    )
    for i in range(count):
        measure = None
        if np.isfinite(kappa[i]):
            width = float(half[i]) if k[i] >= FEW_CLUSTERS else np.nan
            low, high = max(kappa[i] - width, -1.0), min(kappa[i] + width, 1.0)
            measure = Measure.within(float(kappa[i]), float(low), float(high), int(n[i]))
        yield int(n[i]), measure, float(observed[i])


def _clustered(values: Floats, owners: Ints, clusters: Ints, count: int) -> tuple[Floats, Ints]:
    """K / (K - 1) times the sum of squared cluster sums, and K, for each owner."""
    owner, where = cells(owners, clusters)
    sums = np.bincount(where, values)
    k = np.bincount(owner, minlength=count)
    squares = np.bincount(owner, sums**2, minlength=count)
    return k / np.maximum(k - 1, 1) * squares, k


def _together(votes: Votes, rows: Ints) -> Ints:
    """(M, 2) Every two votes by different people on the same pair."""
    while True:
        ordered = rows[np.argsort(votes.pair[rows], kind="stable")]
        _, start, size = np.unique(votes.pair[ordered], return_index=True, return_counts=True)
        if (size.astype(float) * (size - 1) / 2).sum() <= _MOST:
            break
        cast = np.bincount(votes.annotator[rows], minlength=len(votes.names))
        busiest = cast >= np.median(cast[cast > 0]) + 0.5
        if not busiest.any():  # all cast the same: half of them
            busiest = np.cumsum(cast > 0) <= (cast > 0).sum() / 2
        rows = rows[busiest[votes.annotator[rows]]]
    found = []
    for votes_each in np.unique(size[size >= 2]):
        i, j = np.triu_indices(votes_each, k=1)
        at = start[size == votes_each][:, None]
        found.append(np.stack([(at + i).reshape(-1), (at + j).reshape(-1)], axis=1))
    return ordered[np.concatenate(found)] if found else np.zeros((0, 2), dtype=np.int64)

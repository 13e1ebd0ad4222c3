"""Whether people vote otherwise at the end than at the beginning."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NamedTuple

import numpy as np
from scipy import stats

from rlhf_core.agreement.measures import CONFIDENCE, FEW_CLUSTERS, Measure
from rlhf_core.agreement.votes import UNKNOWN, Floats, Ints, Votes
from rlhf_core.functional.holm import holm, passes

WEEK: Final = 7 * 86_400.0
FEWEST: Final = 30  # votes of a block
MOST_BLOCKS: Final = 26


class Blocks(NamedTuple):
    """The votes cut into pieces of time."""

    of: Ints  # (N,) which block a vote is in
    names: tuple[str, ...]
    weekly: bool  # by calendar; otherwise blocks of equal size in the order of the votes


@dataclass(frozen=True)
class Trend:
    """How a habit changes from the first vote to the last."""

    habit: str
    change: Measure  # in the unit of the habit; of log seconds for speed
    p: float
    level: float  # of Holm's method over the habits that were looked at

    @property
    def clear(self) -> bool:
        """Whether it is more than chance."""
        return passes(self.p, self.level)


def places(votes: Votes) -> Floats:
    """(N,) When each vote was cast, from 0 (the first) to 1 (the last), by its rank; NaN where the
    time is unknown: the order of the lines of a file is no order in time."""
    known = np.flatnonzero(np.isfinite(votes.at))
    found = np.full(len(votes), np.nan)
    order = known[np.argsort(votes.at[known], kind="stable")]
    found[order] = np.arange(len(known)) / max(len(known) - 1, 1)
    return found


def blocks(votes: Votes) -> Blocks:
    """Weeks, joined until each has 30 votes, if there are three such weeks or more; otherwise ten
    blocks of equal size, or fewer. A vote whose time is unknown is in none."""
    known = np.isfinite(votes.at)
    of = np.full(len(votes), UNKNOWN, dtype=np.int64)
    if known.sum() < 2 * FEWEST:
        return Blocks(of, (), weekly=False)
    week = np.floor(votes.at[known] / WEEK + 3 / 7).astype(np.int64)  # 1970 began on a Thursday
    weeks, which, size = np.unique(week, return_inverse=True, return_counts=True)
    joined = _join(size, max(FEWEST, int(known.sum()) // MOST_BLOCKS))
    if joined.max() >= 2:
        of[known] = joined[which]
        starts = [weeks[np.argmax(joined == b)] for b in range(joined.max() + 1)]
        days = [datetime.fromtimestamp((w - 3 / 7) * WEEK, UTC).date() for w in starts]
        return Blocks(of, tuple(f"from {day}" for day in days), weekly=True)
    count = min(int(known.sum()) // FEWEST, 10)
    of[known] = np.minimum((places(votes)[known] * count).astype(np.int64), count - 1)
    names = tuple(f"part {i + 1} of {count}" for i in range(count))
    return Blocks(of, names, weekly=False)


def _join(size: Ints, least: int) -> Ints:
    """Which block each week goes to, so that each block has enough votes."""
    of, held, block = np.zeros(len(size), dtype=np.int64), 0, 0
    for i, votes in enumerate(size):
        if held >= least:
            block, held = block + 1, 0
        of[i] = block
        held += int(votes)
    if block and held < least:
        of[of == block] = block - 1
    return of


def slope(
    values: Floats, when: Floats, owners: Ints, clusters: Ints
) -> tuple[Measure, float] | None:
    """The change from the first vote to the last within annotators, and its p-value.

        b = Σ t'·y' / Σ t'²,   s² = K / (K - 1) · Σ_k (Σ_{i∈k} t'·(y' - b·t'))² / (Σ t'²)²

    t' and y' are place in time and value less their means over the votes of the same annotator.
    So nobody's leaving or coming looks like a change. The votes on a prompt go together; t has
    K - 1 degrees of freedom, K prompts. None for fewer than ten, or if no votes spread in time.

    Args:
        values: (N,); when: (N,) 0 to 1; owners: (N,) annotators; clusters: (N,) prompts.

    Reference: Wooldridge 2010, Econometric Analysis, 2nd edition, section 10.5 (fixed effects,
    with errors that are robust to clusters).
    """
    if not len(values):
        return None
    _, mine = np.unique(owners, return_inverse=True)
    size = np.bincount(mine)
    t = when - (np.bincount(mine, when) / size)[mine]
    y = values - (np.bincount(mine, values) / size)[mine]
    square = float((t**2).sum())
    _, member = np.unique(clusters, return_inverse=True)
    k = int(member.max()) + 1
    if k < FEW_CLUSTERS or square < 1e-12:
        return None
    change = float((t * y).sum() / square)
    score = np.bincount(member, t * (y - change * t))
    spread = float(np.sqrt(k / (k - 1) * (score**2).sum())) / square
    if spread < 1e-12:
        return None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, k - 1)) * spread
    p = float(2 * stats.t.sf(abs(change) / spread, k - 1))
    return Measure.within(change, change - half, change + half, len(values)), p


def trends(votes: Votes, habits: dict[str, tuple[Ints, Floats]], alpha: float) -> list[Trend]:
    """The change of each habit, with Holm's level over all of them.

    Args:
        habits: rows of votes, and their values, by name.
    """
    when = places(votes)
    found = []
    for name, (rows, values) in habits.items():
        timed = np.isfinite(when[rows])
        rows, values = rows[timed], values[timed]
        prompts = votes.prompt[votes.pair[rows]]
        measured = slope(values, when[rows], votes.annotator[rows], prompts)
        if measured is not None:
            found.append((name, *measured))
    levels = holm([p for _, _, p in found], alpha)
    return [Trend(n, change, p, level) for (n, change, p), level in zip(found, levels, strict=True)]

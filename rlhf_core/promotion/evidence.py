"""How strongly verdicts speak for a claim about a share, and what so many prompts can show.

The unit is the prompt: answers to one prompt are correlated, so each prompt counts as one
observation, the mean of its verdicts, in [0, 1].
"""

import math
from collections.abc import Sequence

import scipy  # imports its parts at their first use

from rlhf_core.functional.interval import Interval

# of one row; a win rate has two of them, raw and at equal length, which then pass together in 0.8
POWER = 0.85


def p_above(points: Sequence[float], least: float) -> float:
    """One-sided p-value of the mean of N points being at most `least`.

        p = the largest of
        P(T > (m - p₀)·√N / s),  T of Student's distribution with N - 1 degrees of freedom
        P(Z > (m - p₀)·√(N / p₀(1 - p₀)))                score test, as in Wilson's interval
        P(Bin(N, p₀) ≥ N·m) = I(p₀; N·m, N - N·m + 1)    exact, also between whole numbers

    m is the mean, s the standard deviation, p₀ = least. Of all points in [0, 1] with one mean,
    those that are 0 or 1 vary most, and for them the third is exact; the second keeps the test from
    being more liberal than Wilson's interval, the first covers what varies more than p₀ lets
    expect.

    Raises: ValueError if there is no point.

    References: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953; Clopper and Pearson
    1934, https://doi.org/10.1093/biomet/26.4.404; for means of clusters: Korn and Graubard 1998,
    Survey Methodology 24, 193-201.
    """
    n = len(points)
    if n == 0:
        raise ValueError("p_above needs at least one point.")
    mean = math.fsum(points) / n
    spread = math.sqrt(math.fsum((point - mean) ** 2 for point in points) / max(n - 1, 1))
    return _p(n, mean, spread, least)


def p_of_interval(interval: Interval, least: float) -> float:
    """One-sided p-value of an estimate being at most `least`, from its 95 % interval.

        p = P(Z > 1.96·(value - least) / (value - low))

    For estimates that come without their points, such as a win rate at equal length.
    """
    value, low, _ = interval
    if not value > least:
        return 1.0
    if least <= 0 or value == low:
        return 0.0
    z95 = float(scipy.stats.norm.isf(0.025))
    return float(scipy.stats.norm.sf(z95 * (value - least) / (value - low)))


def p_excess_below(first: float, second: float, prompts: int, most: float) -> float:
    """One-sided p-value of a share exceeding another one by at least `most`.

    It is the level at which the upper bound of the difference reaches `most`:

        d + √((u₁ - p₁)² + (p₂ - l₂)²) = most,  d = p₁ - p₂

    u₁ and l₂ are Wilson's bounds over the prompts. Both shares are of the same prompts, which makes
    the bound conservative.

    Reference: Newcombe 1998, method 10,
    https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I.
    """
    difference = first - second

    def room(z: float) -> float:
        up = _score_bound(first, prompts, z) - first
        down = second - _score_bound(second, prompts, -z)
        return most - difference - math.hypot(up, down)

    if not room(0.0) > 0:
        return 1.0
    largest = 40.0
    if room(largest) > 0:
        return 0.0
    return float(scipy.stats.norm.sf(scipy.optimize.brentq(room, 0.0, largest)))


def least_excess(prompts: int, alpha: float) -> float:
    """The smallest excess of a share that this many prompts can rule out, if neither has any.

    z² / (N + z²), Wilson's upper bound of 0 of N.
    """
    return _score_bound(0.0, prompts, float(scipy.stats.norm.isf(alpha)))


def smallest_effect(prompts: int, least: float, alpha: float, power: float = POWER) -> float | None:
    """By how much a true share has to exceed `least`, to be shown with this power.

        s = the fewest wins of N with p_above < alpha,  I(w; s, N - s + 1) = power,  w - least

    w is the true share with which at least s of N prompts are won with this probability. Ties and
    several answers to a prompt vary less, so that less may do.

    Returns: the effect; None if not even N wins are enough.
    """
    if least <= 0:
        return 0.0
    wins = _fewest_wins(prompts, least, alpha)
    if wins is None:
        return None
    return float(scipy.special.betaincinv(wins, prompts - wins + 1, power)) - least


def prompts_needed(
    effect: float, least: float, alpha: float, power: float = POWER, most: int = 10_000_000
) -> int | None:
    """How many prompts show an effect of this size with this power; None if `most` do not."""

    def enough(prompts: int) -> bool:
        found = smallest_effect(prompts, least, alpha, power)
        return found is not None and found <= effect

    high = 1
    while not enough(high):
        high *= 2
        if high > most:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def can_show(prompts: int, least: float, alpha: float) -> bool:
    """Whether this many prompts, if all are won, have a p-value below alpha."""
    return prompts > 0 and _p_of_wins(prompts, prompts, least) < alpha


def _fewest_wins(prompts: int, least: float, alpha: float) -> int | None:
    """The fewest of N prompts that have to be won, when the others are lost."""
    if not can_show(prompts, least, alpha):
        return None
    low, high = 0, prompts  # too few, and enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _p_of_wins(middle, prompts, least) < alpha else (middle, high)
    return high


def _p_of_wins(wins: int, prompts: int, least: float) -> float:
    """`p_above` of points that are 0 or 1."""
    mean = wins / prompts
    spread = math.sqrt(mean * (1 - mean) * prompts / max(prompts - 1, 1))
    return _p(prompts, mean, spread, least)


def _p(n: int, mean: float, spread: float, least: float) -> float:
    """`p_above` of n points with this mean and standard deviation."""
    if mean <= least or least >= 1:
        return 1.0
    if least <= 0:
        return 0.0
    score = float(scipy.stats.norm.sf((mean - least) * math.sqrt(n / (least * (1 - least)))))
    exact = float(scipy.special.betainc(n * mean, n - n * mean + 1, least))
    student = 0.0
    if spread > 0:
        student = float(scipy.stats.t.sf((mean - least) * math.sqrt(n) / spread, n - 1))
    return max(student, score, exact)


def _score_bound(p: float, n: int, z: float) -> float:
    """Wilson's upper bound of a share for z > 0, the lower one for z < 0."""
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return min(max((centre + half) / (1 + z * z / n), 0.0), 1.0)

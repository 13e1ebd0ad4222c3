"""Bradley-Terry strengths of policies that were compared in pairs, by evalica.

    P(i beats j) = e^θᵢ / (e^θᵢ + e^θⱼ),  θ₀ = 0

The first entrant is the zero, so a strength is a logarithm of odds: those of winning against it. A
tie is half a win for each. References: Bradley and Terry 1952, https://doi.org/10.2307/2334029;
Newman 2023, https://www.jmlr.org/papers/v24/22-1086.html, for the iteration that evalica runs.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from rlhf_core.functional.interval import Interval
from rlhf_core.judges.judge import Winner

Numbers: TypeAlias = npt.NDArray[np.float64]

PRIOR = 0.5  # of a tie between every two entrants
MARGIN = 0.2  # log-odds that the choice may be behind: 5 points of a win rate near a half
TOLERANCE, LIMIT = 1e-9, 10_000  # of evalica's iteration
CONFIDENCE = 0.95


class Match(NamedTuple):
    """Two entrants, by number, on one answer each to a prompt."""

    first: int
    second: int
    prompt: int
    sample: int  # which of its answers to the prompt


class Result(NamedTuple):
    """A match and who won it: a is the first. None: the judge gave no verdict."""

    match: Match
    winner: Winner | None


def strengths(results: Iterable[Result], entrants: int, *, prior: float = PRIOR) -> Numbers:
    """(entrants,) the strengths; the first is 0.

    Args:
        results: those without a winner are left out.
        prior: weight of a tie that is added between every two entrants, in verdicts. It keeps the
            strength of an entrant that wins or loses everything finite, and draws all a little
            towards each other: at 50 verdicts a pair by about a hundredth. 0 = the maximum of
            the likelihood, which must exist then.
    """
    kinds, counts = _counts(results)
    return _fit(kinds, counts.sum(0), entrants, prior)


def resampled(
    results: Iterable[Result],
    entrants: int,
    *,
    resamples: int,
    rng: np.random.Generator,
    prior: float = PRIOR,
) -> Numbers:
    """(resamples, entrants) the strengths in bootstraps that draw whole prompts.

    All verdicts on a prompt enter or leave together, since they share answers.
    """
    kinds, counts = _counts(results)
    prompts = len(counts)
    if prompts == 0:
        return np.zeros((resamples, entrants))
    drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    weights = drawn @ counts
    return np.stack([_fit(kinds, row, entrants, prior) for row in weights])


def intervals(values: Numbers, drawn: Numbers) -> list[Interval]:
    """Each value with the 95 % percentile bounds of its bootstraps.

    Args:
        values: (n,).
        drawn: (resamples, n).
    """
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return [
        Interval(float(v), min(float(a), float(v)), max(float(b), float(v)))
        for v, a, b in zip(values, low, high, strict=True)
    ]


def difference(values: Numbers, drawn: Numbers, ours: int, theirs: int) -> Interval:
    """By how much one strength exceeds another, with 95 % bounds of the paired bootstraps."""
    [found] = intervals(
        np.array([values[ours] - values[theirs]]), (drawn[:, ours] - drawn[:, theirs])[:, None]
    )
    return found


def strongest(values: Numbers) -> int:
    """The number of the strongest policy; number 0 is SFT, and is none of them."""
    return 1 + int(values[1:].argmax())


def choose(values: Numbers, drawn: Numbers) -> int:
    """The number of the policy that goes on: the first within one standard error of the strongest,
    and within MARGIN of it.

    Policies come in the order of their training, so of those that can hardly be told apart this is
    the one that has moved least: what it may lose is small, and a reward that is over-optimised has
    hurt it least. If not even the strongest is shown to be stronger than SFT, the judge tells
    nothing apart, and the last policy goes on. Number 0 is SFT, which is no choice. Reference for
    the rule: Breiman et al. 1984, Classification and Regression Trees, section 3.4.3.

    Args:
        values: (n,) the strengths.
        drawn: (resamples, n) their bootstraps, of which the standard error of a difference is.
    """
    best, last = strongest(values), len(values) - 1
    if difference(values, drawn, best, 0).low <= 0:
        return last
    behind = values[best] - values
    reach = np.minimum((drawn[:, [best]] - drawn).std(axis=0), MARGIN)
    return next(n for n in range(1, len(values)) if behind[n] <= reach[n])


class _Kind(NamedTuple):
    """Matches that count alike."""

    first: int
    second: int
    winner: Winner


def _counts(results: Iterable[Result]) -> tuple[list[_Kind], Numbers]:
    """The kinds of matches that occur, and (prompts, kinds) how often each does on a prompt."""
    known = [
        (result.match.prompt, _Kind(result.match.first, result.match.second, result.winner))
        for result in results
        if result.winner is not None
    ]
    kinds = sorted({kind for _, kind in known})
    prompts = sorted({prompt for prompt, _ in known})
    column = {kind: place for place, kind in enumerate(kinds)}
    row = {prompt: place for place, prompt in enumerate(prompts)}
    counts = np.zeros((len(prompts), len(kinds)))
    for prompt, kind in known:
        counts[row[prompt], column[kind]] += 1
    return kinds, counts


def _fit(kinds: Sequence[_Kind], counts: Numbers, entrants: int, prior: float) -> Numbers:
    """The strengths from how often each kind of match occurs."""
    import evalica  # with much of scipy

    outcomes = {"a": evalica.Winner.X, "b": evalica.Winner.Y, "tie": evalica.Winner.Draw}
    padding = list(combinations(range(entrants), 2)) if prior else []
    first = [kind.first for kind in kinds] + [pair[0] for pair in padding]
    second = [kind.second for kind in kinds] + [pair[1] for pair in padding]
    winners = [outcomes[kind.winner] for kind in kinds]
    fitted = evalica.bradley_terry(
        first,
        second,
        winners + [evalica.Winner.Draw] * len(padding),
        index=pd.Index(range(entrants)),
        weights=[*counts.tolist(), *[prior] * len(padding)],
        tolerance=TOLERANCE,
        limit=LIMIT,
    )
    logs = np.log(fitted.scores.reindex(range(entrants)).to_numpy(dtype=np.float64))
    centred: Numbers = logs - logs[0]
    return centred

"""Who plays whom with a budget of verdicts: first everyone, then what decides the winner.

Half of the budget goes to all pairs on the same prompts. The rest is dealt out in rounds: the
policy that is strongest so far plays each rival that is not shown to be weaker, until none is left,
they have met on every answer, or the budget is spent. SFT plays in the first half only, since it
can be no winner.

The order depends on the seed and on the verdicts and on nothing else, so a tournament that is held
again asks for the same verdicts.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import TypeAlias

import numpy as np

from rlhf_core.evaluation.tournament.strengths import (
    Match,
    Result,
    difference,
    resampled,
    strengths,
    strongest,
)
from rlhf_core.judges.judge import Winner
from rlhf_core.seeding import stream_seed

Ask: TypeAlias = Callable[[Sequence[Match]], Sequence[Winner | None]]

OPENING = 0.5  # share of the budget for all pairs
ROUNDS = 10  # at least, for the rest
RESAMPLES = 200  # between rounds, to see who can still win


def pairs_of(entrants: int) -> list[tuple[int, int]]:
    """Every two entrants."""
    return list(combinations(range(entrants), 2))


def play(
    entrants: int, *, prompts: int, samples: int, budget: int, ask: Ask, seed: int
) -> list[Result]:
    """The results of a tournament, in the order in which they were asked for.

    Args:
        entrants: how many; number 0 is SFT, which cannot win.
        prompts: on which all of them answered, in random order.
        samples: answers of each to each prompt; the i-th meet each other.
        budget: most verdicts to ask for; at least one for each pair.
        ask: the verdicts on matches.
        seed: of the bootstraps between rounds.

    Raises: ValueError when the budget is not enough for one verdict on each pair.
    """
    pairs = pairs_of(entrants)
    if budget < len(pairs):
        raise ValueError(f"{budget} verdicts are not enough for {len(pairs)} pairs")
    boards = [(prompt, sample) for sample in range(samples) for prompt in range(prompts)]
    everyone = min(len(boards), max(1, int(budget * OPENING) // len(pairs)))
    opening = [Match(*pair, *board) for board in boards[:everyone] for pair in pairs]
    results = _asked(opening, ask)
    met = dict.fromkeys(pairs, everyone)
    batch = max(1, (budget - len(results)) // ROUNDS)
    while left := min(batch, budget - len(results)):
        chosen = list(_deciding(results, entrants, met, len(boards), seed))
        if not chosen:
            break
        matches = []
        for pair in _dealt(chosen, left, met, len(boards)):
            matches.append(Match(*pair, *boards[met[pair]]))
            met[pair] += 1
        results += _asked(matches, ask)
    return results


def _asked(matches: Sequence[Match], ask: Ask) -> list[Result]:
    winners = ask(matches)
    return [Result(match, winner) for match, winner in zip(matches, winners, strict=True)]


def _deciding(
    results: Sequence[Result],
    entrants: int,
    met: dict[tuple[int, int], int],
    boards: int,
    seed: int,
) -> Iterator[tuple[int, int]]:
    """The strongest policy with each rival that may be as strong, the nearest first, as long as
    there are answers on which they have not met."""
    rng = np.random.default_rng(stream_seed(seed, f"tournament/round/{len(results)}"))
    values = strengths(results, entrants)
    drawn = resampled(results, entrants, resamples=RESAMPLES, rng=rng)
    leader = strongest(values)
    ahead = {n: difference(values, drawn, leader, n) for n in range(1, entrants) if n != leader}
    for rival in sorted(ahead, key=lambda n: (ahead[n].low, n)):
        pair = (min(leader, rival), max(leader, rival))
        if ahead[rival].low <= 0 and met[pair] < boards:
            yield pair


def _dealt(
    pairs: Sequence[tuple[int, int]],
    number: int,
    met: dict[tuple[int, int], int],
    boards: int,
) -> Iterator[tuple[int, int]]:
    """Which pair plays next, in turn, `number` times or until they have met on every answer."""
    while number > 0:
        open_ = [pair for pair in pairs if met[pair] < boards]
        if not open_:
            return
        for pair in open_[:number]:
            yield pair
            number -= 1

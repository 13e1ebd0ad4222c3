"""What should be looked at, in sentences: only where chance does not explain it.

A flag is a share beyond a harmless range, tested for each annotator and each habit, with Holm's
method over all of these tests: the chance that a report has any flag although every share is
harmless is at most 5 %, however many annotators there are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from rlhf_core.agreement.measures import Measure, Shares, beyond
from rlhf_core.agreement.votes import Floats
from rlhf_core.functional.holm import holm, passes

ALPHA: Final = 0.05
SIDE: Final = (0.45, 0.55)  # shares of the left answer that harm nobody
LENGTH: Final = 0.10  # how far from the share of the others a person may prefer length
FAST: Final = 0.10  # share of votes that may be too fast: a look at the same pair, a slip
CHANCE: Final = 0.5  # of a right answer without looking
WAY: Final = 2 / 3  # from chance to the share of the others, that is good enough


@dataclass(frozen=True)
class Flag:
    """Something to look at."""

    annotator: int
    habit: str
    measure: Measure
    rest: float  # the share of everybody else
    p: float  # of a share at the border of the range
    level: float  # of Holm's method


class Test(NamedTuple):
    """One habit of all annotators, on one side of its harmless range."""

    habit: str
    above: bool
    bound: Floats  # (A,)


def tests(found: Mapping[str, Shares]) -> list[Test]:
    """What is tested.

    gold, consistency, others    less than two thirds of the way from chance to the others' share
    left                         outside 45 to 55 %
    longer                       more than 10 points away from the share of everybody else
    fast                         over 10 %
    """
    made = [
        Test("left", True, np.full_like(found["left"].share, SIDE[1])),
        Test("left", False, np.full_like(found["left"].share, SIDE[0])),
        Test("fast", True, np.full_like(found["fast"].share, FAST)),
    ]
    for habit in ("gold", "consistency", "others"):
        rest = _everybody_else(found[habit])
        bound = CHANCE + WAY * (np.maximum(rest, CHANCE) - CHANCE)
        made.append(Test(habit, False, bound))
    rest = _everybody_else(found["longer"])
    made.append(Test("longer", True, np.minimum(rest + LENGTH, 1.0)))
    made.append(Test("longer", False, np.maximum(rest - LENGTH, 0.0)))
    return made


def flags(found: Mapping[str, Shares], balanced: list[Measure | None]) -> list[Flag]:
    """All flags, those with the smallest p-value first.

    A flag about sides needs also that `left_when_balanced`, where it is known, is on the same side
    of one half: with sides that were not drawn, the better answers may be on the left.
    """
    every = [
        (test, annotator, p)
        for test in tests(found)
        for annotator, p in enumerate(beyond(found[test.habit], test.bound, above=test.above))
        if found[test.habit].of[annotator]
    ]
    levels = holm([p for _, _, p in every], ALPHA)
    made = []
    for (test, annotator, p), level in zip(every, levels, strict=True):
        measure = found[test.habit].measure(annotator)
        if measure is None or not passes(p, level):
            continue
        if test.habit == "left" and not _same_side(measure, balanced[annotator]):
            continue
        rest = float(_everybody_else(found[test.habit])[annotator])
        made.append(Flag(annotator, test.habit, measure, rest, float(p), level))
    return sorted(made, key=lambda flag: (flag.p, flag.annotator))


def _same_side(plain: Measure, balanced: Measure | None) -> bool:
    if balanced is None or balanced.low is None or balanced.high is None:
        return True
    return balanced.low > 0.5 if plain.value > 0.5 else balanced.high < 0.5


def _everybody_else(found: Shares) -> Floats:
    """(A,) The share of all others; one half where there is nobody else."""
    won, of = np.nan_to_num(found.share) * found.of, found.of
    rest = of.sum() - of
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(rest > 0, (won.sum() - won) / rest, CHANCE)

"""Levels of several tests, so that each row of a family is a claim that holds by itself.

A promotion asks that every rule passes, and for that alone no correction is needed: the chance of a
false promotion is at most that of the one rule that is untrue (Berger 1982,
https://doi.org/10.1080/00401706.1982.10487790). But rows are read one by one, as in "it is better
than SFT, only not than the champion". With Holm's levels the chance that any row of a family passes
falsely is at most alpha, however many rows there are and however they depend on each other.
"""

from collections.abc import Sequence

_CLOSE = 1 - 1e-9  # a p-value that equals its level but for rounding does not pass


def holm(p_values: Sequence[float], alpha: float) -> list[float]:
    """The level of each of M tests, which passes if its p-value is below it.

        level of the i-th smallest p-value = alpha / (M - i + 1), i = 1 … M

    as long as all before it pass; from the first that does not, its level is that of all others.

    Reference: Holm 1979, https://www.jstor.org/stable/4615733.
    """
    levels, left = [0.0] * len(p_values), len(p_values)
    level = alpha
    passing = True
    for index in sorted(range(len(p_values)), key=lambda i: p_values[i]):
        if passing:
            level = alpha / left
            passing = passes(p_values[index], level)
        levels[index] = level
        left -= 1
    return levels


def passes(p: float, level: float) -> bool:
    """Whether a p-value is below its level."""
    return p < level * _CLOSE

"""What each vote says about a habit: right on a control question, left, the longer answer, fast.

A habit is a set of cases, each a vote with a value in [0, 1]. Their shares are taken by annotator,
by week or by group, so each habit is defined once.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np

from rlhf_core.agreement.alpha import counts_by_pair
from rlhf_core.agreement.measures import Measure, Shares, shares
from rlhf_core.agreement.votes import (
    CLASSES,
    REPEAT,
    SKIP,
    TIE,
    UNKNOWN,
    A,
    Flags,
    Floats,
    Ints,
    Votes,
)

READING: Final = (
    100.0  # characters a second: a thousand words a minute, four times what people read
)
INSTANT: Final = 1.0  # seconds: nobody compares two answers in less


class Cases(NamedTuple):
    """The votes that tell something about a habit."""

    rows: Ints  # which votes
    values: Floats  # in [0, 1]


class Others(NamedTuple):
    """What the other voters on the same pair say most, for the votes where they have a majority."""

    rows: Ints  # which votes
    majority: Ints  # A, B or TIE


def others(votes: Votes) -> Others:
    """The majority of the others, for each independent vote.

    Left out are votes on pairs that nobody else voted on, and those where the others are divided
    equally.
    """
    where = votes.independent()
    pairs, classes = votes.pair[where], votes.classes[where]
    counts = counts_by_pair(pairs, classes, votes.pairs, len(CLASSES))[pairs]
    counts[np.arange(len(where)), classes] -= 1
    best = counts.max(1)
    clear = (best > 0) & ((counts == best[:, None]).sum(1) == 1)
    return Others(where[clear], counts[clear].argmax(1))


def habits(votes: Votes, rest: Others) -> Mapping[str, Cases]:
    """The cases of each habit, `rest` being what `others` gives.

    gold         right on a pair whose answer is known; repeats left out
    consistency  a repeat, whose sides are exchanged, has the same answer as the first time
    left         the answer on the left won; only decided votes whose sides are known
    longer       the longer answer won, in characters; only decided votes on unequal lengths
    others       the same answer as the majority of the others on the pair
    ties         a tie, or both are bad; of all votes
    skips        a skip, of all votes and skips
    fast         faster than anybody can read: in under a second, or over 100 characters a second
    """
    asked = votes.kind != REPEAT
    voted = asked & (votes.choice != SKIP)
    decided = voted & (votes.choice < TIE)
    classes = votes.classes
    gold, first = votes.gold[votes.pair], votes.first
    length = votes.characters[votes.pair]
    longer = np.where(length[:, 0] > length[:, 1], A, 1)
    found = {
        "gold": _cases(voted & (gold != UNKNOWN), classes == gold),
        "consistency": _consistency(votes),
        "left": _cases(decided & (first != UNKNOWN), classes == first),
        "longer": _cases(decided & (length[:, 0] != length[:, 1]), classes == longer),
        "others": Cases(rest.rows, (classes[rest.rows] == rest.majority).astype(float)),
        "ties": _cases(voted, votes.choice >= TIE),
        "skips": _cases(asked, votes.choice == SKIP),
    }
    limit = np.maximum(length.sum(1) / READING, INSTANT)
    timed = voted & np.isfinite(votes.seconds)
    return found | {"fast": _cases(timed, votes.seconds < limit)}


def shares_of(votes: Votes, cases: Cases, owners: Ints, count: int) -> Shares:
    """The share of each owner; the cases of a prompt go together.

    Args:
        owners: (N,) the owner of each vote; UNKNOWN = nobody's.
    """
    mine = owners[cases.rows]
    owned = mine != UNKNOWN
    prompts = votes.prompt[votes.pair[cases.rows[owned]]]
    return shares(cases.values[owned], mine[owned], prompts, count)


def share_of_all(votes: Votes, cases: Cases) -> Measure | None:
    """The share over all votes."""
    return shares_of(votes, cases, np.zeros(len(votes), dtype=np.int64), 1).measure(0)


def left_when_balanced(
    votes: Votes, rest: Others, owners: Ints, count: int
) -> list[Measure | None]:
    """How often the left answer wins, if the better one were on the left half of the time.

        p = (p_L + p_R) / 2,   bounds = p ± ½·√((p_L - b_L)² + (p_R - b_R)²)

    p_L and p_R are the shares of left where the majority of the others is for the left and for the
    right answer, b their bounds. With drawn sides it says what the plain share says; with sides
    that follow the quality, as in many imported files, only it tells habit from quality. None where
    one of the two has no case.

    Reference: Zou and Donner 2008, https://doi.org/10.1002/sim.3095, on bounds of a sum.
    """
    rows, majority = rest.rows, rest.majority
    first, said = votes.first[rows], votes.classes[rows]
    usable = (first != UNKNOWN) & (majority < TIE) & (said < TIE)
    rows, won = rows[usable], (said == first)[usable].astype(float)
    at_left = (majority == first)[usable]
    left, right = (
        shares_of(votes, Cases(rows[side], won[side]), owners, count)
        for side in (at_left, ~at_left)
    )
    found: list[Measure | None] = []
    for owner in range(count):
        both = left.measure(owner), right.measure(owner)
        if both[0] is None or both[1] is None:
            found.append(None)
            continue
        parts = [(m.value, m.low or 0.0, 1.0 if m.high is None else m.high) for m in both if m]
        value = sum(p for p, _, _ in parts) / 2
        below = sum((p - low) ** 2 for p, low, _ in parts) ** 0.5 / 2
        above = sum((high - p) ** 2 for p, _, high in parts) ** 0.5 / 2
        cases = both[0].of + both[1].of
        found.append(Measure.within(value, max(value - below, 0), min(value + above, 1), cases))
    return found


def medians(values: Floats, owners: Ints, count: int) -> Floats:
    """(G,) The median of each owner's values, NaN left out; NaN without one."""
    usable = np.isfinite(values) & (owners != UNKNOWN)
    values, owners = values[usable], owners[usable]
    order = np.lexsort([values, owners])
    size = np.bincount(owners, minlength=count)
    start = np.cumsum(size) - size
    ranked = np.append(values[order], np.nan)
    found = (ranked[start + np.maximum(size - 1, 0) // 2] + ranked[start + size // 2]) / 2
    return np.where(size > 0, found, np.nan)


def _cases(which: Flags, values: Flags) -> Cases:
    rows = np.flatnonzero(which)
    return Cases(rows, values[rows].astype(float))


def _consistency(votes: Votes) -> Cases:
    """Each repeat beside the same person's first vote on the pair."""
    known = (votes.annotator != UNKNOWN) & (votes.choice != SKIP)
    key = votes.annotator * max(votes.pairs, 1) + votes.pair
    first = np.flatnonzero(known & (votes.kind != REPEAT))
    again = np.flatnonzero(known & (votes.kind == REPEAT))
    if not len(first):
        return Cases(first, np.zeros(0))
    keys, at = np.unique(key[first], return_index=True)
    place = np.minimum(np.searchsorted(keys, key[again]), len(keys) - 1)
    there = keys[place] == key[again]
    again, original = again[there], first[at[place[there]]]
    return Cases(again, (votes.classes[again] == votes.classes[original]).astype(float))

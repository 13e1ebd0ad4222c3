"""Votes as arrays: what the maths of agreement reads, some thirty bytes a vote."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Small = NDArray[np.int8]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

A, B, TIE, BOTH_BAD, SKIP = range(5)  # codes of a choice
CHOICES: Final = ("a", "b", "tie", "both_bad", "skip")
FRESH, GOLD, REPEAT, IMPORT, MACHINE = range(5)  # codes of a kind
KINDS: Final = ("fresh", "gold", "repeat", "import", "machine")
UNKNOWN = -1  # a side, a right answer, an annotator, a reason or a group that is not known
CLASSES: Final = ("a", "b", "tie")  # both_bad counts as a tie


class Grouping(NamedTuple):
    """A column by which votes are told apart: of their pairs, as a topic, or of their people."""

    codes: Ints  # (N,) UNKNOWN where a vote has no value
    values: tuple[str, ...]


@dataclass(frozen=True)
class Votes:
    """N votes and skips on P pairs, in the order in which they came."""

    # by vote
    pair: Ints  # (N,) 0 … P - 1
    annotator: Ints  # (N,) 0 … len(names) - 1, or UNKNOWN: anonymous
    choice: Small  # (N,)
    first: Small  # (N,) the answer on the left: A, B or UNKNOWN
    kind: Small  # (N,)
    seconds: Floats  # (N,) from showing the pair to the vote; NaN = unknown
    at: Floats  # (N,) seconds since 1970; NaN = unknown
    reason: Ints  # (N,) of a skip: an index into reasons, or UNKNOWN
    # by pair
    prompt: Ints  # (P,) which prompt it is on
    characters: Ints  # (P, 2) lengths of both answers
    gold: Small  # (P,) the right answer: A, B, TIE or UNKNOWN
    # by vote, for each column that was kept
    groups: Mapping[str, Grouping]
    # names
    names: tuple[str, ...]  # of the annotators
    reasons: tuple[str, ...]
    # by pair, whom a router sent it to: 1 a judge answers alone, 2 people audit it, 0 it was not;
    # empty = there is no router
    routes: Small = field(default_factory=lambda: np.zeros(0, dtype=np.int8))  # (P,) or (0,)

    def __len__(self) -> int:
        return len(self.pair)

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return len(self.prompt)

    @property
    def classes(self) -> Ints:
        """(N,) A, B or TIE; UNKNOWN for a skip."""
        folded = np.minimum(self.choice, TIE).astype(np.int64)
        return np.where(self.choice == SKIP, UNKNOWN, folded)

    def voters(self) -> Ints:
        """(N,) who voted, where each anonymous vote is by somebody of its own."""
        anonymous = self.annotator == UNKNOWN
        own = len(self.names) + np.cumsum(anonymous) - 1
        return np.where(anonymous, own, self.annotator)

    def independent(self) -> Ints:
        """Which votes say how far different people agree: the first of each person on each pair.

        Left out: skips; repeats, which ask the same person again; control questions, which are
        asked because their answer is known, and are easier than others; and votes of machines.
        """
        asked = (self.kind == FRESH) | (self.kind == IMPORT)
        kept = np.flatnonzero(asked & (self.choice != SKIP))
        key = self.voters()[kept] * max(self.pairs, 1) + self.pair[kept]
        firsts: Ints = np.sort(np.unique(key, return_index=True)[1])
        return kept[firsts]

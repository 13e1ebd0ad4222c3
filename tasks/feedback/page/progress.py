"""How many pairs are left, told so that it gives no task away."""

from datetime import datetime, timedelta
from typing import NamedTuple

from tasks.feedback.store import clock
from tasks.feedback.store.records import Progress

RECOUNT_AFTER = timedelta(minutes=10)
RECOUNT_DONE = 10  # tasks
TOO_OLD = timedelta(hours=8)
MOST = 10_000  # annotators that are remembered


class Left(NamedTuple):
    """A number to show."""

    left: int
    more: bool  # there are more than that


class _Counted(NamedTuple):
    at: datetime
    done: int
    left: int
    more: bool


class Remaining:
    """The number of pairs that are left for each annotator.

    A control question and a repeat leave the true number as it is, so whoever watches it from vote
    to vote would know them. What is told goes down by one with every task, whatever its kind, and
    is counted anew only after a while, and after some tasks.
    """

    def __init__(self) -> None:
        self._counted: dict[tuple[int, int], _Counted] = {}

    def tell(self, whom: tuple[int, int], found: Progress) -> Left:
        """The number to show to an annotator, whose progress was just read."""
        known = self._counted.get(whom)
        if known is not None:
            since = found.done - known.done
            told = known.left - (0 if known.more else since)
            age = clock.now() - known.at
            is_fresh = age < RECOUNT_AFTER or (abs(since) < RECOUNT_DONE and age < TOO_OLD)
            if told > 0 and is_fresh:
                return Left(told, known.more)
        if len(self._counted) >= MOST:
            self._counted.clear()
        self._counted[whom] = _Counted(clock.now(), found.done, found.left, found.more)
        return Left(found.left, found.more)

"""An estimate with its uncertainty."""

from typing import NamedTuple


class Interval(NamedTuple):
    """An estimate with its confidence bounds, in the unit of the estimate."""

    value: float
    low: float
    high: float

"""The names of the variants of formulas."""

from typing import Literal

Combination = Literal["sum", "mean", "min", "mean_minus_variance"]
MissingEOS = Literal["replace", "subtract"]
KLKind = Literal["k1", "k2", "k3"]

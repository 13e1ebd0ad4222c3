"""Which pairs a judge answers alone, and which go to people.

A judge is asked about each pair in both orders. People get the pairs that it is unsure of, and of
the others a random share, the audit. What people say there is compared with what the judge said:
that is the error of the labels that the judge gives alone, measured and not assumed:
`rlhf_core.agreement.machines`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pydantic import Field

from rlhf_core.config import Section
from rlhf_core.labelling.arms import hashed

Way: TypeAlias = Literal["judge", "unsure", "audit"]


class RouterConfig(Section):
    """When a judge's answer counts."""

    sure: float = Field(
        0.8,
        ge=0.5,
        le=1,
        description="Chance of the better answer from which a judge is sure, in each order",
    )
    audit: float = Field(
        0.05, gt=0, le=1, description="Share of the pairs it is sure of that people answer too"
    )


@dataclass(frozen=True)
class Opinion:
    """What a judge says about a pair in both orders."""

    a_first: float  # chance that answer a is better, with a shown first; 1, 0.5 or 0 of a verdict
    b_first: float  # the same with b shown first

    @property
    def chance(self) -> float:
        """The mean of both orders."""
        return (self.a_first + self.b_first) / 2

    def is_sure(self, threshold: float) -> bool:
        """Whether both orders give the same answer a chance of at least the threshold, above a
        half."""
        both = (self.a_first, self.b_first)
        low, high = min(both), max(both)
        return (low >= threshold and low > 0.5) or (1 - high >= threshold and high < 0.5)


def route(
    keys: Sequence[str], opinions: Sequence[Opinion | None], config: RouterConfig, salt: str
) -> list[Way]:
    """Who answers each pair.

    Args:
        keys: of the pairs, the same in every process; a hash of them draws the audit.
        opinions: None where the judge gave no usable answer, which goes to people.
        salt: of the project.
    """

    def way(key: str, opinion: Opinion | None) -> Way:
        if opinion is None or not opinion.is_sure(config.sure):
            return "unsure"
        return "audit" if hashed(key, f"{salt}/audit") < config.audit else "judge"

    return [way(key, opinion) for key, opinion in zip(keys, opinions, strict=True)]

"""Which pairs a judge answers alone, and which go to people.

A judge is asked about each pair in both orders. People get the pairs that it is unsure of, and of
the others a random share, the audit. What people say there is compared with what the judge said:
that is the error of the labels that the judge gives alone, measured and not assumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from pydantic import Field

from rlhf_core.config import Section
from rlhf_core.functional.interval import Interval
from rlhf_core.functional.ranking import clustered_share
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


@dataclass(frozen=True)
class Audit:
    """How often people contradict the judge where it is sure."""

    error: Interval | None  # share of the audited pairs; None without any
    audited: int
    alone: int  # pairs that the judge answers without people

    @property
    def wrong(self) -> Interval | None:
        """How many of the judge's labels people would contradict."""
        return None if self.error is None else Interval(*(e * self.alone for e in self.error))


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


def audit_error(
    judged: Sequence[float],
    voted: Sequence[float],
    prompts: Sequence[int],
    alone: int,
    *,
    generator: torch.Generator,
    confidence: float = 0.95,
) -> Audit:
    """The share of audited pairs on which people contradict the judge, with its interval.

        error = mean |voteᵢ - judgeᵢ|,   1 for a, 0 for b, 0.5 for a tie of people

    Votes of one prompt go together (`clustered_share`), so the interval is never narrower than
    Wilson's. People err too: this is the error as they see it, not that against the truth.

    Args:
        judged: (N,) 1 where the judge prefers a, 0 where b.
        voted: (N,) what people said; of several votes on a pair the mean.
        prompts: (N,) which prompt.
        alone: how many pairs the judge answers without people.
        generator: random numbers for the bootstrap, on the CPU.

    Raises:
        ValueError: if the lengths differ, or a value is not in [0, 1].
    """
    if not len(judged) == len(voted) == len(prompts):
        raise ValueError("audit_error needs a judge's answer, a vote and a prompt for each pair.")
    if not judged:
        return Audit(None, 0, alone)
    errors = (torch.tensor(voted).double() - torch.tensor(judged).double()).abs()
    error = clustered_share(
        errors, torch.tensor(prompts), confidence=confidence, generator=generator
    )
    return Audit(error, len(judged), alone)

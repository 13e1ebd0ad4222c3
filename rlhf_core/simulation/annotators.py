"""Simulated annotators: how a fallible person compares two texts.

An annotator's utility of a text, in units of sentiment:

    u(text) = v / √(v² + 15) + length_bias · words / 10 - care · repetition(text)
    v       = Σ over clauses of taste(feature of the clause) · valence(clause)

where valence is VADER's sum of word valences; with taste 1 throughout, the first term is VADER's
compound score, except for intensifiers that reach across the end of a clause. Shown `a` first and
`b` second, the annotator

    votes at random                             with probability 1 - reliability, and otherwise by
    d = u(a) - u(b) + side_bias + noise · z     with z from the standard logistic distribution:
    "a" if d > tie_margin, "b" if d < -tie_margin, else "tie".

A spammer has reliability 0. A contrary annotator votes for the other text than this.

With tie margin 0 the second case is the Bradley-Terry model P(a) = σ((u(a) - u(b) + side_bias) /
noise); with a margin it is its extension to ties by Rao and Kupper
(https://doi.org/10.1080/01621459.1967.10482901).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from random import Random
from typing import Literal, NamedTuple, Self

from rlhf_core.settings.simulation import AnnotatorsConfig
from rlhf_core.simulation.grammar import KIND_OF_FEATURE, words_of
from rlhf_core.simulation.truth import repetition, sentiment

VADER_ALPHA = 15.0  # compound = s / √(s² + alpha)
LARGEST_COMPOUND = 0.9999  # VADER rounds to four decimals; 1.0 could not be inverted
_CLAUSE_END = re.compile(r"[.,;:!?]|\b(?:and|though|but)\b")

Preference = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class Annotator:
    """A simulated person. By default an unbiased, noiseless measure of sentiment."""

    name: str
    reliability: float = 1.0  # share of the votes cast with attention
    side_bias: float = 0.0  # added to the text shown first, sentiment
    length_bias: float = 0.0  # sentiment per 10 words
    care: float = 0.0  # share of the repetition penalty that is noticed
    noise: float = 0.0  # scale of the logistic noise, sentiment
    tie_margin: float = 0.0  # sentiment
    taste: Mapping[str, float] = field(default_factory=dict)  # feature -> weight, 1 where absent
    contrary: bool = False  # votes for the text that it likes less

    def utility(self, text: str) -> float:
        """This person's utility of a text (module docstring), in units of sentiment."""
        valence = sum(self._weight(feature) * v for feature, v in _clause_valences(text))
        liking = valence / math.sqrt(valence**2 + VADER_ALPHA)
        words = len(words_of(text))
        return liking + self.length_bias * words / 10 - self.care * repetition(text)

    def prefers(self, text_a: str, text_b: str, rng: Random) -> Preference:
        """The vote on two texts, `text_a` shown first (module docstring)."""
        if rng.random() >= self.reliability:
            return rng.choice(("a", "b"))
        difference = self.utility(text_a) - self.utility(text_b) + self.side_bias
        difference += self.noise * _logistic(rng)
        if abs(difference) <= self.tie_margin:
            return "tie"
        return "a" if (difference > 0) != self.contrary else "b"

    def _weight(self, feature: str) -> float:
        return self.taste.get(feature, 1.0)


class Vote(NamedTuple):
    """An annotator's vote on a pair."""

    response_a: str  # shown first
    response_b: str
    vote: Preference

    def flipped(self) -> Self:
        """The same pair with the other text as the winner; a tie stays a tie."""
        other: dict[Preference, Preference] = {"a": "b", "b": "a", "tie": "tie"}
        return self._replace(vote=other[self.vote])


def draw_annotators(config: AnnotatorsConfig, rng: Random) -> list[Annotator]:
    """Draw annotators with reliability, biases and taste within the bounds of the config.

    The first of them are the spammers, and after these come the contrary ones.
    """
    spammers = round(config.spammer_share * config.count)
    contrary = spammers + round(config.contrary_share * config.count)
    drawn = [
        Annotator(
            name=f"annotator-{number:02d}",
            reliability=rng.uniform(config.lowest_reliability, config.highest_reliability),
            side_bias=rng.uniform(-config.side_bias, config.side_bias),
            length_bias=rng.uniform(0, 2 * config.length_bias),
            care=config.care,
            noise=config.noise,
            tie_margin=config.tie_margin,
            taste={
                feature: rng.lognormvariate(0, config.taste_spread) for feature in KIND_OF_FEATURE
            },
        )
        for number in range(1, config.count + 1)
    ]
    return [
        replace(
            annotator,
            reliability=0.0 if place < spammers else annotator.reliability,
            contrary=spammers <= place < contrary,
        )
        for place, annotator in enumerate(drawn)
    ]


def vote(annotator: Annotator, texts: tuple[str, str], rng: Random) -> Vote:
    """Show two texts to an annotator in random order, and return the vote."""
    first, second = rng.sample(texts, 2)
    return Vote(first, second, annotator.prefers(first, second, rng))


def _clause_valences(text: str) -> list[tuple[str, float]]:
    """The feature that each clause mentions ("" for none) and the clause's VADER valence."""
    return [_clause_valence(clause.strip()) for clause in _CLAUSE_END.split(text)]


@lru_cache(maxsize=65536)  # the grammar has a few thousand clauses
def _clause_valence(clause: str) -> tuple[str, float]:
    feature = next((word for word in words_of(clause) if word in KIND_OF_FEATURE), "")
    compound = max(-LARGEST_COMPOUND, min(LARGEST_COMPOUND, sentiment(clause)))
    # The sum of valences, by inverting compound = s / √(s² + alpha).
    return feature, compound * math.sqrt(VADER_ALPHA / (1 - compound**2))


def _logistic(rng: Random) -> float:
    """A draw from the standard logistic distribution: log(p / (1 - p)), p uniform in (0, 1)."""
    p = (rng.getrandbits(52) + 0.5) / 2**52
    return math.log(p / (1 - p))

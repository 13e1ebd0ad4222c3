"""The hidden true reward of a review. Evaluation may use it; training never does."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from rlhf_core.errors import ConfigError
from rlhf_core.simulation.grammar import KIND_OF_FEATURE, kind_of, words_of

if TYPE_CHECKING:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

COMFORTABLE_LENGTH = 24  # words
RAMBLING_RATE = 0.03  # per word beyond the comfortable length
NATURAL_REPETITION = 0.1  # share of the content words
STRAY_WEIGHT = 0.5
UNFINISHED_PENALTY = 0.25
_FUNCTION_WORDS = frozenset(
    words_of("a all and as found i is it more of really say that the there though to very was")
)


def true_reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The true reward of each response to its prompt, in [-2, 1]; pure and deterministic.

        reward  = sentiment - min(1, repetition + rambling + straying + unfinished)

        sentiment   VADER compound of the response, s / √(s² + 15) with s the sum of the valences
        repetition  share of the content words that occurred before in the response, beyond 0.1
        rambling    0.03 for each word beyond 24
        straying    0.5 times the share of the named features that belong to another kind of thing
                    than the prompt's (a hotel's battery); 0 if the prompt names no known kind
        unfinished  0.25 unless the response ends with a full stop, "!" or "?"

    Simulated annotators notice only part of the repetition and none of the other three: this is the
    gap between this reward and any model of their votes. A long series of superlatives, the obvious
    way to please them, loses here what it gains there.

    VADER: Hutto and Gilbert, ICWSM 2014, https://doi.org/10.1609/icwsm.v8i1.14550.

    Raises:
        ValueError: if `prompts` and `responses` differ in number.
    """
    return [_reward(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]


def sentiment(text: str) -> float:
    """VADER's compound score of a text, in [-1, 1]; 0 for a text without sentiment words."""
    return float(_analyzer().polarity_scores(text)["compound"])


def repetition(text: str) -> float:
    """Penalty in [0, 0.9) for content words that occurred before: their share beyond a tenth."""
    content = [word for word in words_of(text) if word not in _FUNCTION_WORDS]
    share = 1 - len(set(content)) / len(content) if content else 0.0
    return max(0.0, share - NATURAL_REPETITION)


def rambling(text: str) -> float:
    """Penalty for the words beyond the comfortable length; 0 for shorter texts."""
    return RAMBLING_RATE * max(0, len(words_of(text)) - COMFORTABLE_LENGTH)


def straying(prompt: str, text: str) -> float:
    """Share of the features named by a text that belong to another kind than the prompt's."""
    kind = kind_of(prompt)
    kinds = [KIND_OF_FEATURE[word] for word in words_of(text) if word in KIND_OF_FEATURE]
    return sum(other != kind for other in kinds) / len(kinds) if kind and kinds else 0.0


def _reward(prompt: str, text: str) -> float:
    unfinished = UNFINISHED_PENALTY * (not text.rstrip().endswith((".", "!", "?")))
    penalty = repetition(text) + rambling(text) + STRAY_WEIGHT * straying(prompt, text) + unfinished
    return sentiment(text) - min(1.0, penalty)


@cache
def _analyzer() -> "SentimentIntensityAnalyzer":
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ConfigError(
            "the simulated reviews need the package vaderSentiment: run "
            "pip install 'rlhf-pipeline[demo]', or set data.source to files"
        ) from None
    return SentimentIntensityAnalyzer()

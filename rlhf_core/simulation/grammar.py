"""The grammar of the simulation: prompts, and reviews of every mood. Knows nothing about rewards.

A review is two to five clauses about features of the thing reviewed, and often a closing sentence:

    prompt    "Review of the hotel in Rome, visited in winter:"
    response  " The room was very charming, though the bed was dull. I recommend it to everyone."

Each review has a mood, from bad to good, so sentiment varies far more between reviews than within
one. Some reviews repeat a word, ramble or stray to features of another kind of thing.
"""

import re
from itertools import chain, product
from random import Random
from typing import Literal

Polarity = Literal["positive", "negative", "neutral"]

FEATURES = {
    "hotel": ("room", "staff", "breakfast", "bed", "view", "pool"),
    "film": ("plot", "cast", "music", "ending", "script", "acting"),
    "phone": ("screen", "battery", "camera", "sound", "keyboard", "signal"),
}
KIND_OF_FEATURE = {feature: kind for kind in FEATURES for feature in FEATURES[kind]}
_HOW_MET = {"hotel": ("in", "visited"), "film": ("from", "seen"), "phone": ("from", "bought")}
_PLACES = (
    *("Athens", "Berlin", "Boston", "Cairo", "Delhi", "Dublin", "Geneva", "Lima", "Lisbon"),
    *("London", "Madrid", "Naples", "Oslo", "Paris", "Prague", "Rome", "Seoul", "Sydney"),
    *("Tokyo", "Vienna"),
)
_OCCASIONS = (
    *("in winter", "in spring", "in summer", "in autumn"),
    *("with friends", "with family", "for work", "for study"),
)
_ADJECTIVES: dict[Polarity, tuple[str, ...]] = {
    "positive": (
        *("lovely", "great", "superb", "wonderful", "charming", "brilliant"),
        *("excellent", "perfect", "beautiful", "pleasant", "impressive", "delightful"),
    ),
    "negative": (
        *("awful", "terrible", "horrible", "bad", "poor", "dull"),
        *("ugly", "weak", "annoying", "disappointing", "dreadful", "useless"),
    ),
    "neutral": ("plain", "small", "standard", "simple", "average", "ordinary", "typical", "basic"),
}
_CLOSINGS: dict[Polarity, tuple[str, ...]] = {
    "positive": ("I loved it.", "It was a joy.", "I recommend it to everyone.", "I was happy."),
    "negative": ("I hated it.", "It was a waste of money.", "I regret it.", "I was sad."),
    "neutral": ("It was as expected.", "That is all.", "There is more to say."),
}
_SPECIFIERS = ("", "very ", "really ")

_CLAUSE_COUNTS, _CLAUSE_WEIGHTS = (2, 3, 4, 5), (3, 4, 3, 1)
_NEUTRAL_SHARE = 0.2  # of the clauses
_SPECIFIER_WEIGHTS = (6, 1, 1)
_JOINED_SHARE = 0.3  # of the clauses are joined to the one before
_STRAY_SHARE = 0.04  # of the clauses speak of another kind of thing
_CLOSING_SHARE = 0.6  # of the reviews
_MOOD_SHAPE = (0.7, 0.8)  # of a Beta: moods near the two ends are more common than mixed ones


def all_prompts() -> list[str]:
    """Every prompt of the grammar, in a fixed order: kind x place x occasion, all distinct."""
    return [
        f"Review of the {kind} {_HOW_MET[kind][0]} {place}, {_HOW_MET[kind][1]} {occasion}:"
        for kind, place, occasion in product(FEATURES, _PLACES, _OCCASIONS)
    ]


def kind_of(prompt: str) -> str:
    """The kind of thing that a prompt asks about, or "" if it names none."""
    words = set(words_of(prompt))
    return next((kind for kind in FEATURES if kind in words), "")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation or digits."""
    return re.findall(r"[a-z']+", text.lower())


def vocabulary() -> set[str]:
    """Every word that a prompt or a review can contain, in lower case."""
    pieces = chain(
        all_prompts(),
        KIND_OF_FEATURE,
        *_ADJECTIVES.values(),
        *_CLOSINGS.values(),
        _SPECIFIERS,
        ("The was. I found the. and, though",),
    )
    return {word for piece in pieces for word in words_of(piece)}


def write_review(prompt: str, rng: Random) -> str:
    """A review that answers one of `all_prompts()`; it begins with a space.

    The mood m is drawn from Beta(0.7, 0.8). A clause, or the closing sentence, is neutral with
    probability 0.2, else positive with probability m and negative with probability 1 - m.
    """
    mood = rng.betavariate(*_MOOD_SHAPE)
    count = rng.choices(_CLAUSE_COUNTS, _CLAUSE_WEIGHTS)[0]
    sentences = _sentences(kind_of(prompt), count, mood, rng)
    if rng.random() < _CLOSING_SHARE:
        sentences.append(rng.choice(_CLOSINGS[_polarity(mood, rng)]))
    return " " + " ".join(sentences)


def _sentences(kind: str, count: int, mood: float, rng: Random) -> list[str]:
    sentences: list[str] = []
    previous: Polarity = "neutral"
    for feature in _features(kind, count, rng):
        polarity = _polarity(mood, rng)
        specifier = rng.choices(_SPECIFIERS, _SPECIFIER_WEIGHTS)[0]
        praise = specifier + rng.choice(_ADJECTIVES[polarity])
        if sentences and rng.random() < _JOINED_SHARE:
            joint = " and" if polarity == previous else ", though"
            sentences[-1] = f"{sentences[-1][:-1]}{joint} the {feature} was {praise}."
        elif not specifier and rng.random() < 0.25:
            sentences.append(f"I found the {feature} {praise}.")
        else:
            sentences.append(f"The {feature} was {praise}.")
        previous = polarity
    return sentences


def _features(kind: str, count: int, rng: Random) -> list[str]:
    """Distinct features of the kind; occasionally one is replaced by a feature of another kind."""
    others = [feature for feature, other in KIND_OF_FEATURE.items() if other != kind]
    return [
        rng.choice(others) if rng.random() < _STRAY_SHARE else feature
        for feature in rng.sample(FEATURES[kind], count)
    ]


def _polarity(mood: float, rng: Random) -> Polarity:
    if rng.random() < _NEUTRAL_SHARE:
        return "neutral"
    return "positive" if rng.random() < mood else "negative"

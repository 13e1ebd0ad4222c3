"""How large a show is. It imports nothing, so that `--help` is quick."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """How much there is of everything."""

    people: int = 12
    spammers: int = 6  # of the round that ends in a refusal
    prompts: int = 480
    demonstrations: int = 5000
    first: int = 80  # votes before the first policy, on pairs of the grammar
    each: int = 160  # prompts of a round: a pair each, but for answers that are equal
    rounds: int = 3

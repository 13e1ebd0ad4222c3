"""Who is ordered how: the design, a random control arm beside it, and a hold-out.

    design     the most informative first
    random     in random order; what the design is compared with
    hold_out   in random order, to test on; never trained on, and for nothing else

A hash of the prompt decides, so the arm of a prompt is the same in every process and whatever else
is in the queue, and nobody can choose it. Prompts that are nearly equal are in one arm: else a
reward model would be tested on what it has seen.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from pydantic import Field, model_validator

from rlhf_core.config import Section

Arm: TypeAlias = Literal["design", "random", "hold_out"]
ARMS: tuple[Arm, ...] = ("design", "random", "hold_out")


class Shares(Section):
    """How labels are shared out."""

    random: float = Field(
        0.2, gt=0, lt=1, description="Share of the labels in random order, the control arm"
    )
    hold_out: float = Field(
        0.1, ge=0, lt=1, description="Share of the labels that are held out, never trained on"
    )

    @model_validator(mode="after")
    def _something_is_left(self) -> "Shares":
        if self.random + self.hold_out >= 1:
            raise ValueError(
                f"random ({self.random}) and hold_out ({self.hold_out}) leave nothing to the "
                "design: their sum must be below 1"
            )
        return self

    def of(self, arm: Arm) -> float:
        """The share of an arm."""
        rest = 1 - self.random - self.hold_out
        return {"design": rest, "random": self.random, "hold_out": self.hold_out}[arm]


def hashed(key: str, salt: str) -> float:
    """A number in [0, 1) that is as good as random, and always the same: blake2b of both."""
    digest = hashlib.blake2b(f"{salt}\0{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def arm_of(key: str, salt: str, shares: Shares, *, trained_on: bool = False) -> Arm:
    """The arm of a prompt, or of a group of nearly equal ones.

    Args:
        key: of the prompt.
        salt: of the project, so that the arms of two projects have nothing to do with each other.
        trained_on: whether there are votes on it from before, which training may have seen: it
            is in the design or in the random arm then.
    """
    place = hashed(key, f"{salt}/arm")
    if place < shares.hold_out:
        if not trained_on:
            return "hold_out"
        # Shared out anew, so that a prompt in another arm stays there when it gets a vote.
        place = shares.hold_out + place / shares.hold_out * (1 - shares.hold_out)
    return "random" if place < shares.hold_out + shares.random else "design"


class Known(NamedTuple):
    """A group of nearly equal prompts, and what became of its labels."""

    name: str  # the key of its first prompt, which stays the first whatever else comes in
    held_out: bool = False  # it has labels, all of them in the hold-out
    trained_on: bool = False  # it has labels that training may have seen

    def arm(self, salt: str, shares: Shares) -> Arm:
        """The arm of its next labels: once held out it stays so, and once trained on it is never
        held out."""
        if self.held_out and not self.trained_on:
            return "hold_out"
        return arm_of(self.name, salt, shares, trained_on=self.trained_on)


def interleaved(arms: Mapping[Arm, Sequence[int]], shares: Shares) -> list[int]:
    """One sequence of what each arm has in order, every stretch of it in about these shares.

    The arm that is furthest behind its share comes next; what an arm that has run out would have
    had goes to the others in proportion.
    """
    behind = dict.fromkeys(arms, 0.0)
    taken: Counter[Arm] = Counter()
    sequence: list[int] = []
    for _ in range(sum(map(len, arms.values()))):
        left = [arm for arm in ARMS if arm in arms and taken[arm] < len(arms[arm])]
        total = sum(shares.of(arm) for arm in left)
        for arm in left:
            behind[arm] += shares.of(arm) / total if total else 1 / len(left)
        turn = max(left, key=lambda arm: round(behind[arm], 9))  # no rounding decides a draw
        behind[turn] -= 1
        sequence.append(arms[turn][taken[turn]])
        taken[turn] += 1
    return sequence

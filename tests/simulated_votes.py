"""Votes of people whose habits are known."""

from dataclasses import dataclass

import numpy as np

from rlhf_core.agreement.votes import FRESH, GOLD, REPEAT, UNKNOWN, Votes

CAREFUL = 0.85


@dataclass(frozen=True)
class Habit:
    """How somebody votes: first by habit, and otherwise by looking."""

    right: float = CAREFUL  # chance of the better answer when looking
    press: float = 0.0  # chance of pressing left without looking
    long: float = 0.0  # chance of taking the longer answer without looking
    ties: float = 0.0
    seconds: float = 60.0

    @property
    def left(self) -> float:
        """The share of left answers to expect of decided votes, with drawn sides."""
        return self.press + (1 - self.press) / 2

    @property
    def longer(self) -> float:
        """The share of longer answers to expect, if the better one is as often the shorter one."""
        return (1 - self.press) * (self.long + (1 - self.long) / 2) + self.press / 2

    @property
    def gold(self) -> float:
        """The share of right answers to expect."""
        habit = self.press + (1 - self.press) * self.long
        return habit / 2 + (1 - habit) * self.right


PEOPLE = {
    "careful": Habit(),
    "spammer": Habit(right=0.5, seconds=0.6),
    "adversary": Habit(right=0.15),
    "presser": Habit(press=0.6),
    "lover": Habit(long=0.6),
    "fast": Habit(seconds=0.5),
}


def simulate(
    people, *, pairs=200, each=3, gold=40, repeats=30, prompts=None, seed=0, drift=None
) -> Votes:
    """Each pair gets votes of `each` people drawn at random; all get the control questions.

    Args:
        people: habits by name. prompts: how many; None = one a pair. drift: a Habit that everybody
            has come to by the end.
    """
    random = np.random.default_rng(seed)
    names, habits = tuple(people), list(people.values())
    total = pairs + gold
    truth = random.integers(0, 2, total)
    long = random.integers(0, 2, total)
    rows = []  # pair, annotator, kind
    for pair in range(pairs):
        rows += [(pair, i, FRESH) for i in random.choice(len(names), min(each, len(names)), False)]
    rows += [(pairs + g, i, GOLD) for g in range(gold) for i in range(len(names))]
    rows = [rows[i] for i in random.permutation(len(rows))]
    fresh = [(pair, who) for pair, who, kind in rows if kind == FRESH]
    rows += [(*fresh[i], REPEAT) for i in random.permutation(len(fresh))[: repeats * len(names)]]
    choice, first, seconds = [], [], []
    for n, (pair, who, _) in enumerate(rows):
        habit = habits[who]
        if drift is not None and random.random() < n / len(rows):
            habit = drift
        left = int(random.integers(0, 2))
        if random.random() < habit.press:
            said = left
        elif random.random() < habit.long:
            said = long[pair]
        else:
            said = truth[pair] if random.random() < habit.right else 1 - truth[pair]
        choice.append(2 if random.random() < habit.ties else int(said))
        first.append(left)
        seconds.append(habit.seconds * random.lognormal(0, 0.2))
    pair, who, kind = (np.array(column) for column in zip(*rows, strict=True))
    lengths = np.where(long[:, None] == [0, 1], 300, 200)
    return Votes(
        pair=pair.astype(np.int64),
        annotator=who.astype(np.int64),
        choice=np.array(choice, dtype=np.int8),
        first=np.array(first, dtype=np.int8),
        kind=kind.astype(np.int8),
        seconds=np.array(seconds),
        at=1.75e9 + np.arange(len(rows)) * 60.0,
        reason=np.full(len(rows), UNKNOWN),
        prompt=np.arange(total) if prompts is None else random.integers(0, prompts, total),
        characters=lengths.astype(np.int64),
        gold=np.where(np.arange(total) < pairs, UNKNOWN, truth).astype(np.int8),
        groups={},
        names=names,
        reasons=(),
    )

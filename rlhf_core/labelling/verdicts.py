"""How sure a verdict makes us, given what the judge is like.

    P(a is better | the judge said so) = ∫₀^∞ p(g)·P(said | g) dg / ∫ p(g)·P(said | g) dg
    P(said "left" | g) = σ(α·g + b + c·l),   g ~ N(0, s²) the reward of left less that of right

α, b and c are the judge's reliability and its liking for the left and for length, l the length of
left less that of right: the likelihood of `rlhf_core.functional.annotators`, from whose fit they
come, and s is the spread of the rewards there. A judge that likes what is long makes us less sure
where the longer answer won, and surer where the shorter did. A tie says nothing here.

Two verdicts that agree are worth as much as the one that says more, which is the one against the
judge's liking for a side. A judge that is asked twice errs alike: with one whim w in both orders it
prefers a from the left where α·g + w + b > 0, from the right where α·g + w - b > 0, and says so in
both exactly where the harder of the two holds. If its whims had nothing to do with each other, two
verdicts would be worth more than this.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

_WIDTH, _POINTS = 6.0, 1201  # of the integral: standard deviations to either side, and points


@dataclass(frozen=True)
class JudgeHabits:
    """What a reward model has learnt of a judge."""

    reliability: float  # α
    left: float  # b, logits
    length: float  # c, logits a unit of length
    length_unit: float  # characters
    reward_gap: float  # s, logits

    def chance_of_left(self, left_won: bool, characters: tuple[int, int]) -> float:
        """The chance that the left answer is better, after a verdict.

        Args:
            left_won: whether the judge said so; else it said right.
            characters: of the left and of the right answer.
        """
        gap = np.linspace(-_WIDTH, _WIDTH, _POINTS)
        prior = np.exp(-(gap**2) / 2)
        liking = self.left + self.length * (characters[0] - characters[1]) / self.length_unit
        said = expit((1 if left_won else -1) * (self.reliability * self.reward_gap * gap + liking))
        weight = prior * said
        better = weight[gap > 0].sum() + weight[gap == 0].sum() / 2
        return float(better / weight.sum())

"""What a verdict is worth, given what the judge is like."""

import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import expit

from rlhf_core.labelling.verdicts import JudgeHabits

PLAIN = JudgeHabits(1.0, 0.0, 0.0, 100.0, 2.0)


def by_quadrature(habits, left_won, lengths):
    """The integral of the docstring, by scipy."""
    liking = habits.left + habits.length * (lengths[0] - lengths[1]) / habits.length_unit
    sign = 1 if left_won else -1

    def weight(gap):
        said = expit(sign * (habits.reliability * gap + liking))
        return stats.norm.pdf(gap, scale=habits.reward_gap) * said

    upper = integrate.quad(weight, 0, 12 * habits.reward_gap)[0]
    return upper / (upper + integrate.quad(weight, -12 * habits.reward_gap, 0)[0])


@pytest.mark.parametrize("left_won", [True, False])
@pytest.mark.parametrize("lengths", [(100, 100), (300, 50)])
@pytest.mark.parametrize(
    "habits",
    [PLAIN, JudgeHabits(2.5, 0.7, 1.2, 80.0, 1.5), JudgeHabits(-0.5, -1.0, 0.0, 1.0, 3.0)],
)
def test_it_is_the_integral(habits, lengths, left_won):
    found = habits.chance_of_left(left_won, lengths)
    assert found == pytest.approx(by_quadrature(habits, left_won, lengths), abs=2e-3)


def test_it_is_what_simulation_says():
    random = np.random.default_rng(0)
    habits = JudgeHabits(1.2, 0.8, 0.5, 100.0, 2.0)
    gap = random.normal(0, 2.0, 400_000)
    liking = 0.8 + 0.5 * (150 - 50) / 100
    won = random.random(len(gap)) < expit(1.2 * gap + liking)
    assert habits.chance_of_left(True, (150, 50)) == pytest.approx((gap[won] > 0).mean(), abs=4e-3)
    assert habits.chance_of_left(False, (150, 50)) == pytest.approx(
        (gap[~won] > 0).mean(), abs=4e-3
    )


def test_a_liking_for_length_is_taken_off():
    fond = JudgeHabits(1.0, 0.0, 1.0, 100.0, 2.0)
    long, short = fond.chance_of_left(True, (300, 100)), fond.chance_of_left(True, (100, 300))
    assert short > PLAIN.chance_of_left(True, (100, 300)) > long > 0.5


def test_who_says_nothing_is_worth_nothing_and_who_says_the_contrary_as_much():
    assert JudgeHabits(0.0, 2.0, 1.0, 1.0, 2.0).chance_of_left(True, (5, 1)) == pytest.approx(0.5)
    contrary = JudgeHabits(-1.0, 0.0, 0.0, 100.0, 2.0)
    assert contrary.chance_of_left(True, (1, 1)) == pytest.approx(
        PLAIN.chance_of_left(False, (1, 1))
    )
    assert PLAIN.chance_of_left(True, (1, 1)) + PLAIN.chance_of_left(False, (1, 1)) == (
        pytest.approx(1)
    )

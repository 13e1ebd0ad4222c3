"""Levels: Holm within a family, and a budget over the looks at one champion."""

import pytest

from rlhf_core.functional.holm import holm, passes
from rlhf_core.promotion.looks import first_alpha, take_look


def test_holm_by_hand():
    # 0.005 < 0.05 / 4 and 0.01 < 0.05 / 3 pass; 0.03 is not below 0.05 / 2, so it ends there.
    levels = holm([0.01, 0.04, 0.03, 0.005], 0.05)
    assert levels == pytest.approx([0.05 / 3, 0.025, 0.025, 0.0125])
    assert holm([0.02, 0.02], 0.025) == pytest.approx([0.0125, 0.0125])
    assert holm([0.012, 0.02], 0.025) == pytest.approx([0.0125, 0.025])
    assert holm([], 0.05) == []


def test_a_p_value_at_its_level_does_not_pass():
    assert passes(0.0249, 0.025)
    assert not passes(0.025, 0.025)
    assert not passes(0.025 - 1e-17, 0.025)  # equal but for rounding


def test_the_looks_of_a_reign_never_spend_more_than_the_budget():
    spent, looks = [], []
    for number in range(1, 1001):
        looks.append(take_look(number, 0.05, spent, "models:/p/1"))
        spent.append(looks[-1].alpha)
    assert spent[:3] == pytest.approx([0.025, 0.05 / 6, 0.05 / 12])
    assert sum(spent) == pytest.approx(0.05 * 1000 / 1001)
    assert (looks[19].spent, looks[19].left) == pytest.approx((0.05 * 20 / 21, 0.05 / 21))
    assert first_alpha(0.05) == spent[0]


def test_looks_that_met_spend_less():
    both = [take_look(2, 0.05, [], "x") for _ in range(2)]  # each saw the other, with no alpha yet
    third = take_look(3, 0.05, [look.alpha for look in both], "x")
    assert sum(look.alpha for look in (*both, third)) < 0.05 * 3 / 4


def test_a_budget_that_was_lowered_is_kept():
    first = take_look(1, 0.2, [], "x")
    assert first.alpha == pytest.approx(0.1)
    spent = [first.alpha]
    lowered = take_look(2, 0.12, spent, "x")
    assert lowered.alpha == pytest.approx(0.02 / 3)  # of what is left, and not 0.12 / 6
    exhausted = take_look(2, 0.05, spent, "x")
    assert (exhausted.alpha, exhausted.left) == (0.0, 0.0)
    with pytest.raises(ValueError, match="the number 1"):
        take_look(0, 0.05, [], "x")

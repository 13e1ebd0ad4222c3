"""p-values by hand and by enumeration, and what so many prompts can show."""

import pytest
import torch
from scipy import stats

from rlhf_core.functional.interval import Interval
from rlhf_core.functional.ranking import win_rate
from rlhf_core.promotion.evidence import (
    can_show,
    least_excess,
    p_above,
    p_excess_below,
    p_of_interval,
    prompts_needed,
    smallest_effect,
)


def won(wins, prompts):
    return [1.0] * wins + [0.0] * (prompts - wins)


@pytest.mark.parametrize(
    ("points", "least", "p"),
    [
        (won(5, 5), 0.5, 1 / 32),
        (won(8, 10), 0.5, (45 + 10 + 1) / 1024),
        (won(2, 3), 0.5, (3 + 1) / 8),
        # Half of them won where a fifth was asked: points vary more than p₀ lets expect, and
        # t = 0.3·√10 / √(2.5 / 9) = 1.8 decides, of nine degrees of freedom.
        (won(5, 10), 0.2, 0.0527),
        ([0.5] * 40, 0.5, 1.0),
        (won(3, 10), 0.5, 1.0),
        (won(1, 9), 0.0, 0.0),
        (won(0, 9), 0.0, 1.0),
        (won(9, 9), 1.0, 1.0),
    ],
)
def test_p_values_by_hand(points, least, p):
    assert p_above(points, least) == pytest.approx(p, abs=5e-5)


def test_ties_count_half_and_stand_between_their_neighbours():
    tied = [*won(7, 9), 0.5]
    assert p_above(won(8, 10), 0.5) < p_above(tied, 0.5) < p_above(won(7, 10), 0.5)


@pytest.mark.parametrize("least", [0.2, 0.4, 0.5, 0.6, 0.9])
@pytest.mark.parametrize("prompts", [1, 2, 4, 6, 10, 17, 30, 91])
@pytest.mark.parametrize("alpha", [0.025, 0.0083, 0.00012])
def test_the_level_holds_by_enumeration(prompts, least, alpha):
    """Verdicts of 0 and 1 vary most; of those the chance of every result is known."""
    refuted = [n for n in range(prompts + 1) if p_above(won(n, prompts), least) < alpha]
    assert stats.binom.pmf(refuted, prompts, least).sum() <= alpha


def test_the_level_holds_for_several_answers_that_agree():
    draws = torch.Generator().manual_seed(0)
    for prompts, answers in ((8, 3), (40, 4)):
        agree = torch.rand(4000, prompts, 1, generator=draws) < 0.6
        shared = torch.rand(4000, prompts, 1, generator=draws) < 0.5
        own = torch.rand(4000, prompts, answers, generator=draws) < 0.5
        means = torch.where(agree, shared.expand_as(own), own).double().mean(2)
        refuted = sum(p_above(points, 0.5) < 0.05 for points in means.tolist())
        assert refuted / 4000 <= 0.05


@pytest.mark.parametrize("wins", range(1, 31))
def test_it_is_never_more_liberal_than_wilsons_interval(wins):
    if p_above(won(wins, 30), 0.5) < 0.025:
        assert win_rate(wins, 0, 30 - wins).low > 0.5


def test_an_interval_gives_a_p_value_too():
    assert p_of_interval(Interval(0.6, 0.5, 0.7), 0.5) == pytest.approx(0.025)
    assert p_of_interval(Interval(0.6, 0.55, 0.7), 0.5) == pytest.approx(
        stats.norm.sf(2 * 1.959964), rel=1e-4
    )
    for value, least, p in ((0.5, 0.5, 1.0), (0.4, 0.5, 1.0), (0.4, 0.0, 0.0)):
        assert p_of_interval(Interval(value, 0.1, 0.9), least) == p


def test_an_excess_is_ruled_out_as_wilson_and_newcombe_have_it():
    # Nothing on both sides: z² / (91 + z²) = 0.1 at z = √(91 / 9).
    assert p_excess_below(0.0, 0.0, 91, 0.1) == pytest.approx(stats.norm.sf((91 / 9) ** 0.5))
    assert least_excess(91, 0.025) == pytest.approx(3.8415 / (91 + 3.8415), rel=1e-4)
    # Newcombe's method 10 for 56/70 and 48/80: 0.0524 to 0.3339, so 0.3339 has p 0.025. Ours takes
    # one number of prompts, that of both arms.
    u, low = win_rate(56, 0, 24).high, win_rate(48, 0, 32).low
    bound = 0.1 + ((u - 0.7) ** 2 + (0.6 - low) ** 2) ** 0.5
    assert p_excess_below(0.7, 0.6, 80, bound) == pytest.approx(0.025, abs=1e-6)
    assert p_excess_below(0.3, 0.1, 1000, 0.1) == 1.0


def test_the_smallest_effect_by_hand():
    # Of six prompts all have to be won, and w⁶ = 0.85.
    assert smallest_effect(6, 0.5, 0.025) == pytest.approx(0.85 ** (1 / 6) - 0.5)
    assert smallest_effect(5, 0.5, 0.025) is None
    assert smallest_effect(5, 0.0, 0.025) == 0.0
    assert not can_show(5, 0.5, 0.025)
    assert can_show(6, 0.5, 0.025)


@pytest.mark.parametrize(("effect", "least"), [(0.05, 0.5), (0.2, 0.5), (0.1, 0.4)])
def test_so_many_prompts_show_it_with_the_power(effect, least):
    prompts = prompts_needed(effect, least, 0.025)
    needed = [n for n in range(prompts + 1) if p_above(won(n, prompts), least) < 0.025]
    power = stats.binom.pmf(needed, prompts, least + effect).sum()
    assert 0.85 <= power < 0.9
    # The textbook's number for a share, without a correction for whole numbers of wins.
    true = least + effect
    plain = (1.96 * (least * (1 - least)) ** 0.5 + 1.0364 * (true * (1 - true)) ** 0.5) / effect
    assert plain**2 < prompts < plain**2 + 1.5 / effect


def test_what_no_number_of_prompts_shows():
    assert prompts_needed(0.05, 1.0, 0.025) is None
    assert prompts_needed(1e-9, 0.5, 0.025, most=1000) is None
    with pytest.raises(ValueError, match="at least one point"):
        p_above([], 0.5)

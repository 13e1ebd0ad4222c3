"""Bradley-Terry strengths against closed forms and a plain maximum of the likelihood."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from rlhf_core.evaluation.tournament.strengths import (
    Match,
    Result,
    choose,
    difference,
    intervals,
    resampled,
    strengths,
    strongest,
)


def games(first, second, outcomes, start=0):
    """Results on a prompt each, as a text of a, b and t."""
    words = {"a": "a", "b": "b", "t": "tie", "-": None}
    return [
        Result(Match(first, second, start + n, 0), words[outcome])
        for n, outcome in enumerate(outcomes)
    ]


def simulated(theta, prompts, rng, ties=0.1):
    """Every pair on every prompt, by the model with strengths theta."""
    found = []
    for prompt in range(prompts):
        for i, j in combinations(range(len(theta)), 2):
            won = rng.random() < expit(theta[i] - theta[j])
            winner = "tie" if rng.random() < ties else "a" if won else "b"
            found.append(Result(Match(i, j, prompt, 0), winner))
    return found


@pytest.mark.parametrize(
    ("outcomes", "odds"),
    [
        ("a" * 30 + "b" * 10, 10 / 30),
        ("b" * 7 + "a", 7),
        ("a" * 6 + "b" * 2 + "t" * 8, 6 / 10),
        ("ab--", 1),
    ],
)
def test_two_entrants_have_the_logarithm_of_wins_over_losses(outcomes, odds):
    found = strengths(games(0, 1, outcomes), 2, prior=0)
    assert found == pytest.approx([0, math.log(odds)], abs=1e-6)


def test_strengths_that_explain_the_counts_are_found():
    # θ = 0, log 2, log 4: the second beats the first in 2 of 3, the third the first in 4 of 5.
    results = [
        *games(0, 1, "a" * 5 + "b" * 10),
        *games(0, 2, "a" * 3 + "b" * 12),
        *games(1, 2, "a" * 5 + "b" * 10),
    ]
    assert strengths(results, 3, prior=0) == pytest.approx([0, math.log(2), math.log(4)], abs=1e-6)


def test_they_are_the_maximum_of_the_likelihood_with_ties_as_half_a_win():
    rng = np.random.default_rng(3)
    results = simulated([0, 0.7, -0.5, 1.5, 0.2], 12, rng, ties=0.2)
    points = {"a": 1.0, "tie": 0.5, "b": 0.0}

    def cost(rest):
        theta = np.concatenate([[0], rest])
        return -sum(
            points[winner] * math.log(expit(theta[m.first] - theta[m.second]))
            + (1 - points[winner]) * math.log(expit(theta[m.second] - theta[m.first]))
            for m, winner in results
        )

    best = minimize(cost, np.zeros(4), tol=1e-10).x
    assert strengths(results, 5, prior=0)[1:] == pytest.approx(best, abs=1e-4)


def test_an_entrant_that_wins_everything_has_a_strength():
    # A tie of weight 1/2 is 1/4 of a win for each of the two.
    won = strengths(games(0, 1, "b" * 20), 2)
    assert won == pytest.approx([0, math.log(20.25 / 0.25)], abs=1e-6)
    three = strengths([*games(0, 1, "b" * 20), *games(1, 2, "b" * 20)], 3)
    assert 0 < three[1] < three[2] < 10
    assert strengths([], 3) == pytest.approx([0, 0, 0])


def test_the_prior_is_small_where_there_are_verdicts():
    results = simulated([0, 1, 2], 50, np.random.default_rng(0))
    with_it, without = strengths(results, 3), strengths(results, 3, prior=0)
    assert np.abs(with_it - without).max() < 0.02 * np.abs(without).max()


def test_verdicts_on_one_prompt_do_not_count_as_so_many():
    once = games(0, 1, "aab" * 8)
    five_times = [
        Result(match._replace(sample=n), winner) for match, winner in once for n in range(5)
    ]
    drawn, same = (
        resampled(results, 2, resamples=200, rng=np.random.default_rng(1), prior=0)
        for results in (once, five_times)
    )
    assert same == pytest.approx(drawn)
    alone = [Result(Match(0, 1, n, 0), winner) for n, (_, winner) in enumerate(five_times)]
    narrower = resampled(alone, 2, resamples=200, rng=np.random.default_rng(1), prior=0)
    assert narrower.std(0)[1] < 0.6 * drawn.std(0)[1]


def test_the_intervals_cover():
    theta, rng = np.array([0, 0.8, 1.4]), np.random.default_rng(5)
    covered = 0
    for _ in range(60):
        results = simulated(theta, 40, rng, ties=0)
        drawn = resampled(results, 3, resamples=100, rng=rng)
        bounds = intervals(strengths(results, 3), drawn)
        covered += sum(low <= t <= high for t, (_, low, high) in zip(theta, bounds, strict=True))
    # 60 zeros, and 120 that cover with 0.95: below 106 with a chance of 1 in 10,000.
    assert covered - 60 >= 106


def test_a_difference_is_paired():
    values = np.array([0.0, 1.0, 1.5])
    shifts = np.linspace(-3, 3, 41)[:, None]
    drawn = values + shifts * np.array([0, 1, 1])
    assert difference(values, drawn, 2, 1) == pytest.approx((0.5, 0.5, 0.5))
    [_, one, _] = intervals(values, drawn)
    assert one.high - one.low > 5


def test_the_first_within_one_standard_error_of_the_strongest_goes_on():
    values = np.array([0.0, 0.2, 1.0, 1.1, 1.05])
    # Differences to the strongest vary by 0.4 for the first and last, by 0.08 for the second.
    shifts = np.array([-1.0, 1.0])[:, None]
    drawn = values + shifts * np.array([0, 0.4, 0.08, 0, 0.4])
    assert strongest(values) == 3
    assert choose(values, drawn) == 3  # 0.1 behind is more than 0.08; what is later does not count
    assert choose(values, values + 2 * (drawn - values)) == 2
    # However large the errors, what is more than 0.2 behind is not taken.
    assert choose(values, values + 2.6 * (drawn - values)) == 2


def test_sft_is_never_chosen_and_the_last_goes_on_when_nobody_beats_it():
    values = np.array([0.0, -1.0, -2.0, -3.0])
    assert strongest(values) == 1
    assert choose(values, np.stack([values] * 20)) == 3
    noisy = np.array([0.0, 0.3, 0.2, 0.1])
    assert choose(noisy, noisy + np.linspace(-1, 1, 41)[:, None] * [0, 1, 1, 1]) == 3
    assert choose(np.zeros(3), np.zeros((20, 3))) == 2

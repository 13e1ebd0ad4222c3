"""Estimates of which the bounds hold, or are said to be unknown; never a point."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from rlhf_core.evaluation.intervals import (
    Estimate,
    calibration_estimate,
    calibration_noise,
    mean_estimate,
    rank_correlation,
)
from rlhf_core.functional.ranking import clustered_bootstrap, clustered_share, win_rate


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- a share ----


@pytest.mark.parametrize("k", [1, 2, 10, 60, 300])
@pytest.mark.parametrize("each", [0.0, 0.5, 1.0])
def test_clusters_that_all_agree_are_no_narrower_than_wilson(k, each):
    """Also on 1/2, where each prompt has a vote won and a vote lost."""
    outcome = torch.tensor([[1.0, 2 * each - 1] if each >= 0.5 else [0.0, 0.0]] * k).flatten()
    found = clustered_share(outcome, torch.arange(k).repeat_interleave(2), generator=seeded())
    wilson = stats.binomtest(round(each * k), k).proportion_ci(method="wilson")
    if (each * k) % 1 == 0:
        assert found.low <= wilson.low + 1e-9
        assert found.high >= wilson.high - 1e-9
    assert found.high > found.low


# ---- a mean ----


def test_a_mean_of_independent_values_is_at_least_as_wide_as_students():
    values = torch.tensor([0.2, 1.5, 0.7, 3.1, 0.9, 2.2, 1.1, 0.4, 1.9, 0.6, 2.5, 0.3])
    found = mean_estimate(values, torch.arange(12), seeded())
    low, high = stats.t.interval(
        0.95, 11, loc=values.double().mean().item(), scale=stats.sem(values.double().numpy())
    )
    assert found.value == pytest.approx(values.mean().item())
    assert found.low <= low + 1e-9
    assert found.high >= high - 1e-9
    drawn = clustered_bootstrap(values, torch.arange(12), generator=seeded())
    assert (found.low, found.high) == (
        pytest.approx(min(low, drawn.low)),
        pytest.approx(max(high, drawn.high)),
    )


def test_what_repeats_within_a_cluster_does_not_narrow_a_mean():
    values = torch.randn(15, generator=seeded(1))
    once = mean_estimate(values, torch.arange(15), seeded())
    thrice = mean_estimate(
        values.repeat_interleave(3), torch.arange(15).repeat_interleave(3), seeded()
    )
    assert (thrice.low, thrice.high) == (pytest.approx(once.low), pytest.approx(once.high))


@pytest.mark.parametrize("k", [1, 9])
def test_a_mean_of_few_clusters_has_no_bounds(k):
    found = mean_estimate(torch.arange(k).float(), torch.arange(k), seeded())
    assert (found.low, found.high) == (None, None)
    assert str(found).endswith("(interval unknown)")


def test_what_does_not_vary_has_no_bounds():
    found = mean_estimate(torch.full((40,), math.log(2)), torch.arange(40), seeded())
    assert (found.value, found.low) == (pytest.approx(math.log(2)), None)


def test_the_mean_of_a_skewed_loss_is_covered():
    draws, covered = seeded(3), 0
    for _ in range(300):
        level = torch.empty(12, 1).exponential_(generator=draws)
        values = (level * torch.empty(12, 3).exponential_(generator=draws)).flatten()
        found = mean_estimate(values, torch.arange(12).repeat_interleave(3), draws)
        covered += found.low <= 1 <= found.high
    # Students's interval on twelve such skewed values is known to fall short of 0.95.
    assert covered >= 0.8 * 300
    alone = clustered_bootstrap(values, torch.arange(12).repeat_interleave(3), generator=draws)
    assert found.high - found.low >= alone.high - alone.low


# ---- a calibration error ----


def test_the_calibration_error_of_a_coin_that_lies():
    """It says 0.9 and is right half of the time: 0.4 in each order."""
    says, won = torch.full((200,), 0.9), (torch.arange(200) % 2).float()
    both, outcomes = torch.cat([says, 1 - says]), torch.cat([won, 1 - won])
    found = calibration_estimate(both, outcomes, torch.arange(200).repeat(2), seeded())
    assert found.value == pytest.approx(0.4)
    se = 0.5 / math.sqrt(200)
    assert found.low == pytest.approx(0.4 - 1.96 * se, abs=0.015)
    assert found.high == pytest.approx(0.4 + 1.96 * se, abs=0.015)


def test_a_calibrated_model_stays_below_the_noise_as_often_as_is_said():
    draws, below = seeded(5), 0
    for _ in range(100):
        p = torch.rand(150, generator=draws)
        noise = calibration_noise(p, torch.arange(150), draws, draws=200)
        won = (torch.rand(150, generator=draws) < p).float()
        both, outcomes = torch.cat([p, 1 - p]), torch.cat([won, 1 - won])
        error = calibration_estimate(both, outcomes, torch.zeros(300).long(), draws).value
        below += error <= noise
    assert 88 <= below <= 100


def test_votes_on_one_pair_are_noisier_than_votes_on_many():
    p = torch.rand(100, generator=seeded(6)).repeat_interleave(5)
    one_pair_each = calibration_noise(p, torch.arange(500), seeded())
    five_votes = calibration_noise(p, torch.arange(100).repeat_interleave(5), seeded())
    assert five_votes > 1.5 * one_pair_each


# ---- a rank correlation ----


def test_the_rank_correlation_is_scipys_and_has_at_least_its_published_width():
    draws = np.random.default_rng(0)
    x = draws.normal(size=40)
    y = x + draws.normal(size=40)
    found = rank_correlation(x, y, np.arange(40), seeded())
    rho = stats.spearmanr(x, y).statistic
    assert found.value == pytest.approx(rho)
    half = 1.959964 * math.sqrt((1 + rho**2 / 2) / 37)
    assert found.low <= math.tanh(math.atanh(rho) - half) + 1e-6
    assert found.high >= math.tanh(math.atanh(rho) + half) - 1e-6


def test_samples_of_one_prompt_count_as_one():
    draws = np.random.default_rng(1)
    x, y = draws.normal(size=(2, 20))
    alone = rank_correlation(x, y, np.arange(20), seeded())
    copies = rank_correlation(*(np.repeat(v, 10) for v in (x, y, np.arange(20))), seeded())
    assert copies.high - copies.low >= 0.95 * (alone.high - alone.low)


def test_a_perfect_correlation_is_no_point():
    x = np.arange(12.0)
    found = rank_correlation(x, x**3, np.arange(12), seeded())
    assert found.value == pytest.approx(1)
    assert found.low < 0.8
    assert found.high == pytest.approx(1)
    opposite = rank_correlation(x, -x, np.arange(12), seeded())
    assert (opposite.low, opposite.high) == (
        pytest.approx(-found.high),
        pytest.approx(-found.low),
    )


def test_what_does_not_vary_has_no_correlation():
    x = np.arange(12.0)
    assert rank_correlation(x, np.ones(12), np.arange(12), seeded()) is None
    assert rank_correlation(np.ones(0), np.ones(0), np.ones(0, int), seeded()) is None
    assert rank_correlation(x[:9], -x[:9], np.arange(9), seeded()) == Estimate(value=-1.0)


def test_unrelated_ranks_are_covered():
    draws, covered = np.random.default_rng(2), 0
    for n in range(25):
        x, y = draws.normal(size=(2, 15))
        found = rank_correlation(x, y, np.arange(15), seeded(n))
        covered += found.low <= 0 <= found.high
    assert covered >= 22


def test_wilson_of_scipy_is_that_of_the_layer():
    for won, n in ((0, 5), (3, 7), (50, 50)):
        theirs = stats.binomtest(won, n).proportion_ci(method="wilson")
        ours = win_rate(won, 0, n - won)
        assert (ours.low, ours.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))

"""Win rates, best-of-n, bootstrap intervals and calibration."""

import math
from statistics import NormalDist

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.functional.ranking import (
    best_of_n_kl,
    clustered_bootstrap,
    clustered_share,
    expected_calibration_error,
    win_rate,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- win rate ---


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    # Newcombe 1998, table I, method 3: the score method without continuity correction
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_of_the_published_examples(wins, n, low, high):
    result = win_rate(wins, 0, n - wins)
    assert result.value == wins / n
    assert (round(result.low, 4), round(result.high, 4)) == (low, high)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("counts", [(3, 0, 7), (50, 20, 10), (1, 1, 0)])
def test_the_bounds_are_where_the_score_test_just_rejects(counts, confidence):
    # The definition that the closed form solves: |p - p̂| = z·√(p·(1 - p) / n).
    estimate, low, high = win_rate(*counts, confidence=confidence)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    for p in (low, high):
        assert abs(p - estimate) == pytest.approx(z * math.sqrt(p * (1 - p) / sum(counts)))
    assert low < estimate < high


def test_a_tie_is_half_a_win_and_sides_are_symmetric():
    assert win_rate(2, 4, 6) == win_rate(4, 0, 8)
    there, back = win_rate(7, 3, 2), win_rate(2, 3, 7)
    assert there.value + back.value == pytest.approx(1)
    assert (there.low, there.high) == pytest.approx((1 - back.high, 1 - back.low))


def test_the_bounds_stay_inside_zero_and_one():
    for n in range(1, 200):
        assert win_rate(0, 0, n).low == pytest.approx(0, abs=1e-15)
        assert 0 <= win_rate(0, 0, n).low < win_rate(0, 0, n).high <= 1
        assert 0 <= win_rate(n, 0, 0).low < win_rate(n, 0, 0).high <= 1


@pytest.mark.parametrize("counts", [(0, 0, 0), (-1, 0, 3)])
def test_counts_without_meaning_are_refused(counts):
    with pytest.raises(ValueError, match="counts"):
        win_rate(*counts)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_is_a_probability(confidence):
    with pytest.raises(ValueError, match="confidence"):
        win_rate(1, 0, 1, confidence=confidence)
    with pytest.raises(ValueError, match="confidence"):
        clustered_bootstrap(
            torch.ones(1), torch.zeros(1), confidence=confidence, generator=seeded()
        )


# --- best of n ---


def test_best_of_n_by_hand():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(0.19314718)  # log 2 - 1/2
    assert best_of_n_kl(16) == pytest.approx(1.83508872)  # 4·log 2 - 15/16
    with pytest.raises(ValueError, match="n must"):
        best_of_n_kl(0)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_best_of_n_is_the_limit_and_bound_of_the_exact_kl(n):
    # Among K equally likely responses with distinct scores, the best of n is the k-th with
    # probability (k/K)ⁿ - ((k-1)/K)ⁿ: its KL to the uniform distribution is a plain sum.
    def exact(k: int) -> float:
        grid = torch.arange(k + 1, dtype=torch.float64) / k
        best = grid[1:] ** n - grid[:-1] ** n
        return torch.special.xlogy(best, best * k).sum().item()

    assert exact(10) < exact(100) < best_of_n_kl(n)
    assert exact(1_000_000) == pytest.approx(best_of_n_kl(n), abs=1e-4)


# --- bootstrap ---


def test_two_clusters_by_hand():
    # Clusters (1, 1, 1) and (0). Draws: both the first 1/4 -> 1; one each 1/2 -> 3/4; both the
    # second 1/4 -> 0. The middle 40 % is 3/4 throughout; the middle 90 % reaches from 0 to 1.
    # Values drawn one by one, or a mean of cluster means (1/2), would give other numbers.
    values, clusters = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([5, 5, -2, 5])
    narrow = clustered_bootstrap(values, clusters, confidence=0.4, generator=seeded())
    wide = clustered_bootstrap(values, clusters, confidence=0.9, generator=seeded())
    assert narrow == (0.75, 0.75, 0.75)
    assert wide == (0.75, 0.0, 1.0)


def test_copies_inside_a_cluster_add_no_certainty():
    values = torch.randn(30, generator=seeded(1), dtype=torch.float64)
    once = clustered_bootstrap(values, torch.arange(30), generator=seeded())
    copies = clustered_bootstrap(values.repeat(4), torch.arange(30).repeat(4), generator=seeded())
    assert copies == pytest.approx(once)
    # treated as independent, the same copies would halve the interval
    naive = clustered_bootstrap(values.repeat(4), torch.arange(120), generator=seeded())
    assert naive.high - naive.low == pytest.approx((once.high - once.low) / 2, rel=0.15)


def test_the_width_is_that_of_the_normal_interval_of_a_mean():
    values = torch.randn(400, generator=seeded(2), dtype=torch.float64)
    result = clustered_bootstrap(values, torch.arange(400), resamples=4000, generator=seeded())
    expected = 2 * 1.959964 * values.std(unbiased=False).item() / 20
    assert result.value == pytest.approx(values.mean().item())
    assert result.high - result.low == pytest.approx(expected, rel=0.05)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    # 40 prompts with 1 to 8 samples each; what a prompt's samples share is most of the variance.
    generator, covered, naive = seeded(3), 0, 0
    for _ in range(300):
        sizes = torch.randint(1, 9, (40,), generator=generator)
        clusters = torch.arange(40).repeat_interleave(sizes)
        shared = torch.randn(40, generator=generator)[clusters]
        values = shared + 0.5 * torch.randn(len(clusters), generator=generator)
        by_prompt = clustered_bootstrap(values, clusters, resamples=400, generator=generator)
        by_value = clustered_bootstrap(
            values, torch.arange(len(values)), resamples=400, generator=generator
        )
        covered += by_prompt.low <= 0 <= by_prompt.high
        naive += by_value.low <= 0 <= by_value.high
    assert 0.90 <= covered / 300 <= 0.98  # ± 2 standard errors of 300 trials, less the small-K bias
    assert naive / 300 < 0.75


def test_the_bootstrap_is_reproducible_and_ignores_the_names_of_clusters():
    values = torch.randn(50, generator=seeded(4))
    clusters = torch.arange(50) // 5
    first = clustered_bootstrap(values, clusters, generator=seeded(5))
    assert clustered_bootstrap(values, clusters, generator=seeded(5)) == first
    assert clustered_bootstrap(values, clusters * 1000 - 7, generator=seeded(5)) == first
    assert clustered_bootstrap(values, clusters, generator=seeded(6)) != first


def test_one_cluster_is_a_point_and_no_value_is_refused():
    result = clustered_bootstrap(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]), generator=seeded())
    assert result == (1.5, 1.5, 1.5)
    with pytest.raises(ValueError, match="at least one"):
        clustered_bootstrap(torch.zeros(0), torch.zeros(0), generator=seeded())


# --- shares of points, cluster by cluster ---


def test_one_cluster_has_the_width_of_one_trial():
    won = clustered_share(torch.ones(4), torch.zeros(4).long(), generator=seeded())
    assert won == win_rate(1, 0, 0)
    assert (round(won.low, 3), won.high) == (0.207, 1.0)


def test_a_share_is_never_narrower_than_either_interval():
    for k in (2, 5, 40):
        outcome = torch.bernoulli(torch.full((k, 3), 0.7), generator=seeded(k)).flatten()
        clusters = torch.arange(k).repeat_interleave(3)
        found = clustered_share(outcome, clusters, generator=seeded())
        drawn = clustered_bootstrap(outcome, clusters, generator=seeded())
        p, z = outcome.mean().item(), NormalDist().inv_cdf(0.975)
        assert found.value == drawn.value == pytest.approx(p)
        assert found.low <= drawn.low
        assert found.high >= drawn.high
        # At the bounds, or before them, the score test with k trials rejects.
        for bound in (found.low, found.high):
            assert abs(bound - found.value) >= z * math.sqrt(bound * (1 - bound) / k) - 1e-6


@pytest.mark.parametrize(
    ("k", "won", "drawn_alone"), [(60, 50, True), (60, 57, False), (60, 60, False)]
)
def test_many_clusters_that_differ_are_drawn_alone(k, won, drawn_alone):
    outcome, clusters = (torch.arange(k) < won).float(), torch.arange(k)
    found = clustered_share(outcome, clusters, generator=seeded())
    drawn = clustered_bootstrap(outcome, clusters, generator=seeded())
    assert (found == drawn) is drawn_alone
    assert found.low < found.value


def test_a_cluster_with_most_of_the_values_counts_for_most():
    # 96 values of one cluster and one of each of four: (100)² / (96² + 4) = 1.08 clusters.
    clusters = torch.tensor([0] * 96 + [1, 2, 3, 4])
    found = clustered_share(torch.ones(100), clusters, generator=seeded())
    assert found.low == pytest.approx(win_rate(1, 0, 0).low, abs=0.02)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_share_lies_between_zero_and_one(value):
    with pytest.raises(ValueError, match="lie in"):
        clustered_share(torch.tensor([0.5, value]), torch.tensor([0, 1]), generator=seeded())


@pytest.mark.parametrize("k", [10, 20])
@pytest.mark.parametrize(("p", "spread"), [(0.5, 0.0), (0.7, 0.5), (0.9, 0.3)])
def test_few_clusters_cover_the_truth(k, p, spread):
    # Answers to one prompt agree more than those to different ones: each has its own share, which
    # is p + spread·(1 - p) or p - spread·p.
    generator, covered, draws = seeded(k), 0, 400
    for _ in range(draws):
        high = torch.rand(k, 1, generator=generator) < p
        share = torch.where(high, p + spread * (1 - p), p - spread * p).expand(k, 2)
        outcome = torch.bernoulli(share, generator=generator).flatten()
        clusters = torch.arange(k).repeat_interleave(2)
        found = clustered_share(outcome, clusters, resamples=200, generator=generator)
        covered += found.low <= p <= found.high
    assert covered >= 0.94 * draws


# --- calibration ---


def test_calibration_by_hand():
    # Two bins. [0, ½): predictions 0.1, 0.3, 0.35 (mean 0.25), one of three came true, gap 1/12.
    # [½, 1]: prediction 0.8, came true, gap 1/5.   ECE = 3/4·1/12 + 1/4·1/5 = 0.1125
    result = expected_calibration_error(
        torch.tensor([0.1, 0.3, 0.8, 0.35]), torch.tensor([False, True, True, False]), bins=2
    )
    assert result.error == pytest.approx(0.1125)
    assert result.counts.tolist() == [3, 1]
    assert result.mean_predicted.tolist() == pytest.approx([0.25, 0.8])
    assert result.observed.tolist() == pytest.approx([1 / 3, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges_belong_to_the_bin_above_and_one_to_the_last(dtype):
    edges = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], dtype=dtype)
    result = expected_calibration_error(edges, torch.zeros(11))
    assert result.counts.tolist() == [1] * 9 + [2]


def test_an_empty_bin_has_no_mean_and_no_weight():
    result = expected_calibration_error(torch.tensor([0.05, 0.95]), torch.tensor([0.5, 0.5]))
    assert result.error == pytest.approx(0.45)
    assert result.counts.sum() == 2
    assert result.observed.isnan().sum() == 8
    assert result.mean_predicted.isnan().sum() == 8


def test_a_calibrated_forecast_has_a_small_error_and_an_overconfident_one_a_large():
    truth = torch.rand(20_000, generator=seeded(7))
    outcomes = torch.rand(20_000, generator=seeded(8)) < truth
    assert expected_calibration_error(truth, outcomes).error < 0.02
    sure = (truth > 0.5).float()
    # Always sure: right with probability max(p, 1 - p), whose mean over [0, 1] is 3/4.
    assert expected_calibration_error(sure, outcomes).error == pytest.approx(0.25, abs=0.01)


def test_the_table_weighs_up_to_the_error():
    probabilities = torch.rand(500, generator=seeded(9))
    outcomes = torch.rand(500, generator=seeded(10)) < 0.5
    error, predicted, observed, counts = expected_calibration_error(probabilities, outcomes)
    gaps = ((predicted - observed).abs() * counts).nansum() / 500
    assert_close(gaps, torch.tensor(error, dtype=torch.float64))


def test_what_is_no_probability_is_refused():
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            expected_calibration_error(torch.tensor([bad]), torch.ones(1))
    with pytest.raises(ValueError, match="at least one"):
        expected_calibration_error(torch.zeros(0), torch.zeros(0))

"""Gao's forms recover what made the points, best-of-n is the mean over all subsets, and what cannot
be fitted is said."""

import itertools
import math

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection

from rlhf_core.evaluation.chart import Chart, draw
from rlhf_core.evaluation.overoptimisation import (
    Fit,
    Path,
    Point,
    Unfitted,
    best_of_n_path,
    fit_gains,
    gain_at,
    gain_over,
)
from rlhf_core.functional.interval import Interval
from rlhf_core.functional.ranking import best_of_n_mean

DISTANCES = np.linspace(0, 4, 17)


def log_form(d: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    return d * (alpha - beta * np.log(np.maximum(d, 1e-300)))


def path(distances, gains, kind="on_policy", name="run", chosen=None) -> Path:
    points = [
        Point(
            number=i,
            kl=Interval(d**2, d**2 - 0.1, d**2 + 0.1),
            gains={"truth": Interval(g, g - 0.1, g + 0.1)},
        )
        for i, (d, g) in enumerate(zip(distances, gains, strict=True))
    ]
    return Path(name=name, kind=kind, points=tuple(points), chosen=chosen)


def test_the_log_form_is_recovered_with_its_peak_worked_by_hand():
    # α 0.6, β 0.3: d* = exp(2 - 1) = e, KL* = e² = 7.389, R(d*) = β·d* = 0.815
    fit = fit_gains([path(DISTANCES, log_form(DISTANCES, 0.6, 0.3))], "truth")
    assert isinstance(fit, Fit)
    assert fit.alpha.value == pytest.approx(0.6)
    assert fit.beta.value == pytest.approx(0.3)
    assert fit.r2 == pytest.approx(1)
    assert fit.peak == pytest.approx(math.e)
    assert fit.peak_kl.value == pytest.approx(7.389, abs=1e-3)
    assert fit.gain(fit.peak) == pytest.approx(0.8155, abs=1e-4)
    assert fit.gain(0.0) == 0


def test_the_linear_form_is_recovered_with_its_peak_worked_by_hand():
    # α 0.8, β 0.2: d* = 0.8 / 0.4 = 2, KL* = 4, R(d*) = 2·(0.8 - 0.4) = 0.8
    found = path(DISTANCES, DISTANCES * (0.8 - 0.2 * DISTANCES), "best_of_n")
    fit = fit_gains([found], "truth")
    assert (fit.alpha.value, fit.beta.value) == pytest.approx((0.8, 0.2))
    assert fit.peak_kl.value == pytest.approx(4)
    assert fit.gain(2.0) == pytest.approx(0.8)


@pytest.mark.parametrize("runs", [1, 3])
def test_the_intervals_cover_what_made_the_points(runs):
    """With one run the noise is that of points; with several each run has parameters of its own, as
    seeds have, and the jackknife has to see that."""
    rng = np.random.default_rng(0)
    spread = 0.0 if runs == 1 else 0.05
    trials, covered, peaks = 300, 0, 0
    for _ in range(trials):
        paths = []
        for run in range(runs):
            alpha, beta = rng.normal(0.6, spread), rng.normal(0.3, spread / 2)
            noise = rng.normal(0, 0.05, len(DISTANCES))
            paths.append(path(DISTANCES, log_form(DISTANCES, alpha, beta) + noise, name=f"{run}"))
        fit = fit_gains(paths, "truth")
        covered += fit.alpha.low <= 0.6 <= fit.alpha.high
        peaks += fit.peak_kl.low <= math.exp(2) <= fit.peak_kl.high
    assert 0.91 * trials <= covered < trials
    assert 0.91 * trials <= peaks < trials


def test_points_without_a_peak_have_none_and_the_sentence_says_so():
    fit = fit_gains([path(DISTANCES, DISTANCES * 0.5)], "truth")  # β = 0
    assert fit.peak is None
    assert "no peak is predicted" in fit.sentence()
    falling = path(DISTANCES, DISTANCES * (-0.1 - 0.2 * DISTANCES), "best_of_n")
    assert "falls from the start" in fit_gains([falling], "truth").sentence()


def test_a_peak_beyond_the_points_is_called_an_extrapolation():
    near = DISTANCES[DISTANCES <= 2]
    fit = fit_gains([path(near, log_form(near, 0.6, 0.3))], "truth")
    assert fit.peak_kl.value == pytest.approx(7.389, abs=1e-3)
    assert "beyond the farthest point (4.0 nats)" in fit.sentence()


@pytest.mark.parametrize(
    "paths",
    [
        [path([0, 0, 0], [0, 0.1, -0.1])],
        [path([0, 1, 1, 1], [0, 0.1, 0.2, 0.3])],
        [path([0, 0.5, 2], [0, 0.1, 0.2])],
    ],
    ids=["KL near 0", "one distance", "two distances"],
)
def test_too_little_to_fit_is_a_sentence_and_still_a_chart(paths):
    fit = fit_gains(paths, "truth")
    assert isinstance(fit, Unfitted)
    assert "three different points" in fit.sentence()
    draw([Chart(title="", paths=tuple(paths))]).savefig("/dev/null", format="png")


def test_a_negative_estimate_of_the_kl_counts_as_no_distance():
    point = Point(number=1, kl=Interval(-0.2, -0.5, 0.1), gains={})
    assert point.distance == 0


def test_best_of_n_is_the_mean_over_all_subsets():
    generator = torch.Generator().manual_seed(0)
    scores, values = torch.rand(2, 3, 6, generator=generator)
    for n in range(1, 7):
        subsets = list(itertools.combinations(range(6), n))
        brute = [
            np.mean([v[max(subset, key=lambda i: s[i])] for subset in subsets])
            for s, v in zip(scores.tolist(), values.tolist(), strict=True)
        ]
        assert best_of_n_mean(scores, values, n).tolist() == pytest.approx(brute)
    with pytest.raises(ValueError, match="between 1 and the 6 samples"):
        best_of_n_mean(scores, values, 7)


def test_best_of_n_of_uniform_scores_is_the_known_order_statistic():
    # The largest of n uniform numbers has mean n / (n + 1).
    scores = torch.rand(400, 64, generator=torch.Generator().manual_seed(0))
    for n in (1, 2, 8, 64):
        assert best_of_n_mean(scores, scores, n).mean().item() == pytest.approx(
            n / (n + 1), abs=0.01
        )


def test_a_path_of_best_of_n_starts_at_sft():
    scores = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    found = best_of_n_path("pool", scores, {"proxy": scores, "truth": -scores}, seed=0)
    assert [point.number for point in found.points] == [1, 2, 3, 4, 6, 8, 12]
    first, last = found.points[0], found.points[-1]
    assert first.kl.value == 0
    assert first.gains["proxy"].value == pytest.approx(0)
    assert last.kl.value == pytest.approx(math.log(12) - 11 / 12)
    assert last.gains["proxy"].low > 1
    assert last.gains["truth"].value == pytest.approx(-last.gains["proxy"].value)


def test_the_gain_at_a_kl_is_read_off_a_line_through_the_points_around_it():
    line = path([0, 1, 2, 2.4, 2.8, 3.2, 4], [0.0, 9, 1.0, 1.2, 1.4, 1.6, 9])
    assert gain_at(line, "truth", 2.5**2) == pytest.approx(1.25)  # 1 and 4 are too far away
    assert gain_at(path([1, 3], [1, 2]), "truth", 2.5**2) == pytest.approx(1.75)
    assert gain_at(path([1, 2], [1, 2]), "truth", 2.5**2) is None


def test_a_gain_is_paired_by_prompt():
    values, prompt = torch.tensor([1.0, 3.0, 11.0, 13.0]), torch.tensor([0, 0, 1, 1])
    gain = gain_over(values, prompt, torch.tensor([1.0, 11.0]), seed=0)
    assert gain == (1, 1, 1)  # both prompts gained 1, however much they differ


def test_the_chart_draws_every_run_with_its_choice_budget_and_peak():
    runs = [
        path(DISTANCES, log_form(DISTANCES, a, 0.3), name=f"seed {i}", chosen=16)
        for i, a in enumerate((0.5, 0.6, 0.7))
    ]
    pool = path(DISTANCES[:8], DISTANCES[:8] * (0.8 - 0.2 * DISTANCES[:8]), "best_of_n")
    chart = Chart(title="clean", paths=(*runs, pool), kl_budget=9)
    (axes,) = draw([chart]).axes
    assert len(axes.containers) == 4  # each run and the pool, with error bars
    scattered = [c for c in axes.collections if isinstance(c, PathCollection)]
    rings = [c for c in scattered if len(c.get_facecolors()) == 0]
    assert sorted(ring.get_offsets()[0][0] for ring in rings) == pytest.approx([4, 4, 4])
    stars = [c.get_offsets()[0] for c in scattered if c not in rings]
    assert sorted(star[0] for star in stars) == pytest.approx([2, math.e])
    assert 3.0 in [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
    table = chart.rows()
    assert len(table) == 3 * 17 + 8
    assert table[16]["chosen"]
    assert table[16]["truth_low"] == pytest.approx(table[16]["truth"] - 0.1)

"""Win rates at equal length: a truth that is known, scipy as a second implementation, and the
columns that AlpacaEval published."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import spearmanr

from rlhf_core.functional.length_control import (
    PRIOR,
    Verdicts,
    _at_equal_length,
    length_controlled_win_rates,
)

SHARED = Path(__file__).parents[4] / "shared" / "data"


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def verdicts(theta, phi, prompts=400, seed=0, longer=0.0):
    """Votes on candidates of known strength and length effect; prompts differ in difficulty."""
    chance = np.random.default_rng(seed)
    gamma = chance.normal(size=prompts)
    difference = chance.normal(longer, 1, size=(len(theta), prompts)) * 100
    x = np.tanh(difference / difference.std(1, keepdims=True))
    p = expit(np.array(theta)[:, None] + np.array(phi)[:, None] * x + gamma)
    won = chance.random(p.shape) < p
    candidate, prompt = np.indices(p.shape)
    flat = [torch.from_numpy(a.reshape(-1).copy()) for a in (won, difference, candidate, prompt)]
    return Verdicts(flat[0].double(), *flat[1:]), expit(np.array(theta)[:, None] + gamma).mean(1)


@pytest.mark.parametrize("others", [[], [(0.0, 0.0)], [(0.0, 2.0), (0.5, 0.0), (0.0, 0.0)]])
def test_a_candidate_that_is_only_longer_wins_half_at_equal_length(others):
    """However many others there are, which is how well the prompts' difficulty is known."""
    raw, rates = [], []
    for seed in range(6):
        strengths, effects = zip((0.0, 2.0), *others, strict=True)
        found, _ = verdicts(strengths, effects, longer=1.0, seed=seed)
        raw.append(found.preference[found.candidate == 0].mean())
        rates.append(length_controlled_win_rates(found, resamples=1, generator=draws())[0].value)
    assert min(raw) > 0.62
    assert np.mean(rates) == pytest.approx(0.5, abs=0.05)


def test_the_truth_is_found_and_covered():
    inside = []
    for seed in range(6):
        found, truth = verdicts([-1.0, 0.0, 0.7, 1.5], [1.0, -1.0, 0.5, 0.0], seed=seed)
        rates = length_controlled_win_rates(found, resamples=200, generator=draws())
        for rate, true in zip(rates, truth, strict=True):
            assert rate.low <= rate.value <= rate.high
            inside.append(rate.low <= true <= rate.high)
    assert sum(inside) >= 20  # of 24 intervals of 95 %


def test_newton_agrees_with_scipy():
    chance = np.random.default_rng(1)
    x, gamma, y = chance.normal(size=(3, 40))
    y, weights = expit(y), chance.integers(0, 4, 40).astype(float)
    features = np.stack([np.ones(40), x, gamma], 1)

    def loss(beta):
        z = features @ beta
        return (weights * (np.logaddexp(0, z) - y * z)).sum() + (
            np.array(PRIOR) * beta**2
        ).sum() / 2

    beta = minimize(loss, np.zeros(3), tol=1e-12).x
    expected = np.average(expit(beta[0] + beta[2] * gamma), weights=weights)
    given = (torch.from_numpy(a) for a in (y, x, gamma, weights[None]))
    assert _at_equal_length(*given).item() == pytest.approx(expected, abs=1e-6)


def test_one_who_always_wins_keeps_an_interval():
    found, _ = verdicts([0.0, 0.0], [0.0, 0.0], prompts=8)
    won = found._replace(preference=torch.where(found.candidate == 0, 1.0, found.preference))
    rate = length_controlled_win_rates(won, resamples=100, generator=draws())[0]
    assert 0.9 < rate.value < 1
    assert rate.low < 0.7  # Wilson's bound for 8 of 8 is 0.68


def test_equal_lengths_change_little():
    found, _ = verdicts([0.5, -0.5], [0.0, 0.0])
    level = found._replace(length_difference=torch.zeros_like(found.length_difference))
    rates = length_controlled_win_rates(level, resamples=50, generator=draws())
    for number, rate in enumerate(rates):
        raw = found.preference[found.candidate == number].mean().item()
        assert rate.value == pytest.approx(raw, abs=0.01)


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_a_preference_outside_0_and_1_is_refused(bad):
    found, _ = verdicts([0.0], [0.0], prompts=4)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        length_controlled_win_rates(
            found._replace(preference=torch.full((4,), bad)), generator=draws()
        )


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs the published verdicts in {SHARED.name}")
def test_the_published_columns_are_reproduced():
    table = pd.read_csv(SHARED / "alpacaeval2-verdicts-and-lengths.csv")
    published = pd.read_csv(SHARED / "alpacaeval2-published-win-rates.csv", index_col="model")
    candidate, names = pd.factorize(table["model"])
    raw = 100 * table.groupby("model")["preference"].mean()
    assert (raw - published["win_rate"]).abs().max() < 1e-4
    found = Verdicts(
        torch.tensor(table["preference"].to_numpy()),
        torch.tensor(table["length_difference"].to_numpy()),
        torch.from_numpy(candidate),
        torch.tensor(pd.factorize(table["instruction"])[0]),
    )
    rates = length_controlled_win_rates(found, resamples=20, generator=draws())
    ours = pd.Series([100 * rate.value for rate in rates], index=names)
    theirs = published["length_controlled_win_rate"].loc[names]
    assert spearmanr(ours, theirs).statistic >= 0.975
    assert (ours - theirs).abs().mean() <= 1.5

"""The last layer against scipy, sampling, and what must not change it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from rlhf_core.labelling.probe import fit_probe, no_votes, space_of


def votes(seed=0, n=80, d=4):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g).double()
    return x, (torch.rand(n, generator=g) < torch.sigmoid(x @ torch.ones(d).double())).double()


def test_the_mode_is_that_of_a_general_optimiser():
    x, y = votes()
    y[:5] = 0.5  # ties

    def energy(w):
        z = x.numpy() @ w
        return (np.logaddexp(0, z) - y.numpy() * z).sum() + w @ w / (2 * 3.0**2)

    expected = minimize(energy, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(fit_probe(x, y).mean.numpy(), expected, atol=1e-5)


def test_the_precision_is_the_curvature_there():
    x, y = votes()
    fit = fit_probe(x, y)

    def energy(w):
        return (torch.nn.functional.softplus(x @ w) - y * (x @ w)).sum() + w @ w / 18

    torch.testing.assert_close(fit.precision, torch.autograd.functional.hessian(energy, fit.mean))


def test_one_direction_by_hand():
    # One pair, won by a: the mode solves σ(w) - 1 + w/9 = 0, w = 1.3915...
    fit = fit_probe(torch.ones(1, 1), torch.ones(1))
    w = fit.mean.item()
    assert 1 / (1 + np.exp(-w)) - 1 + w / 9 == pytest.approx(0, abs=1e-9)
    assert fit.precision.item() == pytest.approx(w / 9 * (1 - w / 9) + 1 / 9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_an_exchanged_pair_is_the_same_vote(seed):
    x, y = votes(seed)
    g = torch.Generator().manual_seed(seed)
    other = torch.rand(len(x), generator=g) < 0.5
    exchanged = torch.where(other.unsqueeze(1), -x, x), torch.where(other, 1 - y, y)
    torch.testing.assert_close(fit_probe(*exchanged).mean, fit_probe(x, y).mean, atol=1e-6, rtol=0)


def test_separable_votes_have_a_mode_too():
    x = torch.tensor([[1000.0], [-1000.0]])
    assert fit_probe(x, torch.tensor([1.0, 0.0])).mean.isfinite().all()


def test_without_votes_it_is_the_prior():
    fit = fit_probe(torch.zeros(0, 3), torch.zeros(0))
    assert torch.equal(fit.mean, torch.zeros(3).double())
    torch.testing.assert_close(fit.precision, no_votes(3).precision)


def test_votes_in_two_goes_are_nearly_votes_in_one():
    x, y = votes(n=400)
    twice = fit_probe(x[200:], y[200:], fit_probe(x[:200], y[:200]))
    torch.testing.assert_close(twice.mean, fit_probe(x, y).mean, atol=0.05, rtol=0)


def test_chances_average_over_what_the_layer_may_be():
    x, y = votes(n=20)
    fit = fit_probe(x, y)
    g = torch.Generator().manual_seed(3)
    root = torch.linalg.cholesky(torch.linalg.inv(fit.precision))
    drawn = fit.mean + (root @ torch.randn(4, 100_000, generator=g).double()).T
    expected = torch.sigmoid(x @ drawn.T).mean(1)
    torch.testing.assert_close(fit.chances(x), expected, atol=0.02, rtol=0)
    p = fit.chances(x)
    torch.testing.assert_close(fit.information(x), p * (1 - p))
    won = torch.ones(len(x)).double()
    torch.testing.assert_close(fit.losses(x, won), -p.log())


def test_a_space_keeps_what_varies_and_scales_it_to_one():
    g = torch.Generator().manual_seed(0)
    x = (
        torch.randn(200, 2, generator=g).double()
        @ torch.tensor([[3.0, 0, 0], [0, 5.0, 0]]).double()
    )
    space = space_of(x)
    assert space.directions.shape == (3, 2)  # the third never varies
    assert space(x).square().sum(1).mean().item() == pytest.approx(1)
    # Distances stay, up to the scale.
    apart = [(space(x)[:99] - space(x)[101:200]).norm(dim=1), (x[:99] - x[101:200]).norm(dim=1)]
    torch.testing.assert_close(apart[0] * space.scale, apart[1])
    assert space_of(x, most=1).directions[:, 0].abs().argmax() == 1
    assert space_of(torch.zeros(3, 2)).scale == 1


@pytest.mark.parametrize("x", [torch.zeros(0, 2), torch.full((2, 2), float("inf"))])
def test_a_space_of_nothing_is_refused(x):
    with pytest.raises(ValueError, match="finite features"):
        space_of(x)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.ones(2, 2), torch.ones(3)),
        (torch.full((2, 2), float("nan")), torch.ones(2)),
        (torch.ones(2, 2), torch.tensor([0.0, 2.0])),
    ],
)
def test_votes_that_are_none_are_refused(x, y):
    with pytest.raises(ValueError, match="fit_probe"):
        fit_probe(x, y)

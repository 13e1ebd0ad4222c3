"""Shaped rewards and missing EOS."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.functional.advantages import gae
from rlhf_core.functional.rewards import (
    Moments,
    against_reference,
    combine,
    excess_length,
    missing_eos,
    shaped_rewards,
    whiten,
)

SCORES = torch.tensor([10.0, 20.0, 30.0, 40.0])
KL = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0], [9.0, 6.0, 7.0], [9.0, 9.0, 9.0]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1], [0, 0, 0]])


def test_shaped_rewards_by_hand():
    # β = 0.1; padded on the right, full, padded on the left, and a row without a token.
    expected = [
        [-0.1, -0.2 + 10, 0.0],
        [-0.3, -0.4, -0.5 + 20],
        [0.0, -0.6, -0.7 + 30],
        [0.0, 0.0, 0.0],
    ]
    assert_close(shaped_rewards(SCORES, KL, MASK, kl_coef=0.1), torch.tensor(expected))


def test_the_score_lands_once_even_where_the_mask_has_a_hole():
    mask = torch.tensor([[1, 0, 1, 0]])
    result = shaped_rewards(torch.tensor([5.0]), torch.zeros(1, 4), mask, kl_coef=0.1)
    assert result.tolist() == [[0.0, 0.0, 5.0, 0.0]]


def test_a_row_sums_to_its_score_less_the_price_of_its_kl():
    generator = torch.Generator().manual_seed(0)
    kl, scores = torch.randn(5, 8, generator=generator), torch.randn(5, generator=generator)
    mask = torch.arange(8) < torch.tensor([1, 3, 8, 5, 2]).unsqueeze(1)
    rewards = shaped_rewards(scores, kl, mask, kl_coef=0.3)
    objective = scores - 0.3 * (kl * mask).sum(1)
    assert_close(rewards.sum(1), objective)
    # and with γ = λ = 1 the first return is that sum as well
    assert_close(gae(rewards, kl, mask, lam=1.0).returns[:, 0], objective)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_what_lies_under_the_mask_changes_nothing(garbage):
    scores = SCORES.clone()
    scores[3] = garbage  # a row without a token has no say either
    kl = KL.masked_fill(MASK == 0, garbage).requires_grad_()
    result = shaped_rewards(scores, kl, MASK, kl_coef=0.1)
    assert torch.equal(result, shaped_rewards(SCORES, KL, MASK, kl_coef=0.1))
    result.sum().backward()
    assert torch.equal(kl.grad, -0.1 * MASK)


def test_missing_eos_by_hand():
    scores, finished = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([True, False, False])
    assert missing_eos(scores, finished, mode="replace", value=-1.0).tolist() == [1.0, -1.0, -1.0]
    assert missing_eos(scores, finished, mode="subtract", value=1.0).tolist() == [1.0, 1.0, -4.0]
    with pytest.raises(ValueError, match="ignore"):
        missing_eos(scores, finished, mode="ignore", value=1.0)  # type: ignore[arg-type]


# --- several rewards as one ---

PARTS = torch.tensor([[1.0, 5.0], [3.0, 5.0], [2.0, -4.0]])


def test_combined_by_hand():
    # Second response: mean 2, squared deviations 9, 9 and 36, so a variance of 18.
    expected = {
        "sum": [6.0, 6.0],
        "mean": [2.0, 2.0],
        "min": [1.0, -4.0],
        "mean_minus_variance": [2.0 - 0.5 * 2 / 3, 2.0 - 0.5 * 18],
    }
    for how, values in expected.items():
        assert_close(combine(PARTS, how=how, variance_coef=0.5), torch.tensor(values))


@pytest.mark.parametrize("how", ["sum", "mean", "min", "mean_minus_variance"])
def test_one_part_is_itself_whatever_combines_it(how):
    assert torch.equal(combine(PARTS[:1], how=how), PARTS[0])


def test_no_combination_believes_a_part_more_than_the_mean_does():
    draws = torch.Generator().manual_seed(0)
    parts = torch.randn(5, 100, generator=draws)
    mean = combine(parts, how="mean")
    for how in ("min", "mean_minus_variance"):
        assert (combine(parts, how=how) <= mean + 1e-6).all()


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(ValueError, match="no part"):
        combine(torch.zeros(0, 3), how="mean")
    with pytest.raises(ValueError, match="must be sum, mean, min or mean_minus_variance"):
        combine(PARTS, how="median")
    with pytest.raises(ValueError, match="shape"):
        combine(PARTS[0], how="sum")


def test_whitening_by_hand():
    moments = Moments().with_values(torch.tensor([1.0, 3.0]))
    assert moments == (2, 2.0, 2.0)
    moments = moments.with_values(torch.tensor([5.0, 7.0, 9.0]))  # all five: mean 5, var 8
    assert moments == (5, 5.0, pytest.approx(40.0))
    assert_close(whiten(torch.tensor([5.0, 9.0]), moments), torch.tensor([0.0, 4 / 8**0.5]))


def test_moments_in_parts_are_those_of_all_values():
    draws = torch.Generator().manual_seed(0)
    parts = [1e4 + 3 * torch.randn(n, generator=draws).double() for n in (1, 7, 64, 3)]
    moments = Moments()
    for part in parts:
        moments = moments.with_values(part)
    whole = torch.cat(parts)
    assert moments.number == len(whole)
    assert moments.mean == pytest.approx(whole.mean().item(), rel=1e-12)
    assert moments.std == pytest.approx(whole.std(correction=0).item(), rel=1e-9)
    assert moments.with_values(torch.zeros(0)) == moments


def test_scores_that_never_differ_are_only_centred():
    moments = Moments().with_values(torch.full((4,), 2.0))
    assert whiten(torch.full((4,), 2.0), moments).tolist() == [0.0] * 4
    assert Moments().std == 0


def test_against_reference_by_hand():
    # σ(0) = 1/2, σ(ln 3) = 3/4, σ(-ln 3) = 1/4
    ln3 = math.log(3)
    result = against_reference(torch.tensor([ln3, 0.0]), torch.tensor([[0.0, ln3], [ln3, ln3]]))
    assert_close(result, torch.tensor([(3 / 4 + 1 / 2) / 2, 1 / 4]))


def test_against_reference_is_bounded_and_keeps_the_order():
    scores = torch.linspace(-50, 50, 101).double()
    reference = torch.tensor([[-1.0, 2.0]]).double().expand(101, 2)
    result = against_reference(scores, reference)
    assert ((result >= 0) & (result <= 1)).all()
    assert (result.diff()[30:70] > 0).all()
    # a point of score far above the reference is worth less than one nearby
    assert result.diff()[90] < 1e-9 < 0.1 < result.diff().max()
    with pytest.raises(ValueError, match="no reference"):
        against_reference(scores, reference[:, :0])


def test_excess_length_by_hand():
    penalty = excess_length(torch.tensor([3, 10, 14]), limit=10, coef=0.25)
    assert penalty.tolist() == [0.0, 0.0, 1.0]

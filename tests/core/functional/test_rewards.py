"""Shaped rewards and missing EOS."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.functional.advantages import gae
from rlhf_core.functional.rewards import missing_eos, shaped_rewards

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

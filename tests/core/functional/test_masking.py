"""Masked means and whitening."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.functional.masking import masked_mean, masked_whiten

GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e30]
KEEP = torch.tensor([[True, True, False], [True, False, False]])


def test_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, 70.0], [6.0, 80.0, 90.0]])
    assert masked_mean(x, KEEP).item() == 3.0  # (1 + 2 + 6) / 3, not the mean of the row means
    assert masked_mean(x, KEEP, dim=1).tolist() == [1.5, 6.0]
    assert masked_mean(x, KEEP, dim=0).tolist() == [3.5, 2.0, 0.0]
    assert masked_mean(x, KEEP, dim=(0, 1)).item() == 3.0


def test_mean_without_a_mask_is_the_mean():
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert_close(masked_mean(x, torch.ones(3, 5)), x.mean())
    assert_close(masked_mean(x, torch.ones(3, 5), dim=-1), x.mean(-1))


def test_whitening_by_hand():
    # mean 4, squared distances 4 + 0 + 4: variance 8 / 2 = 4, or 8 / 3 when biased
    x = torch.tensor([[2.0, 4.0], [6.0, 99.0]])
    mask = torch.tensor([[1, 1], [1, 0]])
    assert_close(masked_whiten(x, mask), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    assert_close(masked_whiten(x, mask, shift_mean=False), torch.tensor([[3.0, 4.0], [5.0, 0.0]]))
    root = 1.5**0.5  # 2 / √(8 / 3)
    assert_close(masked_whiten(x, mask, unbiased=False), torch.tensor([[-root, 0.0], [root, 0.0]]))


def test_the_epsilon_sits_inside_the_root():
    # mean 1e-4, variance 2·(1e-4)² = 2e-8: 1e-4 / √(2e-8 + 1e-8) = 1 / √3.
    # Without it, or outside the root, the result would be 1 / √2 = 0.7071.
    x = torch.tensor([[0.0, 2e-4]])
    whitened = masked_whiten(x, torch.ones(1, 2))
    assert_close(whitened, torch.tensor([[-(3**-0.5), 3**-0.5]]))


@pytest.mark.parametrize("unbiased", [True, False])
def test_whitened_values_have_mean_zero_and_variance_one(unbiased):
    generator = torch.Generator().manual_seed(1)
    x = 5 + 3 * torch.randn(8, 9, generator=generator)
    mask = torch.rand(8, 9, generator=generator) < 0.6
    kept = masked_whiten(x, mask, unbiased=unbiased)[mask]
    assert_close(kept.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert_close(kept.var(unbiased=unbiased), torch.tensor(1.0), atol=1e-5, rtol=0)
    moved = masked_whiten(x, mask, unbiased=unbiased, shift_mean=False)[mask]
    assert_close(moved.mean(), x[mask].mean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_what_lies_under_the_mask_changes_neither_result_nor_gradient(garbage, shift_mean):
    clean = torch.tensor([[1.0, 3.0, 0.0], [7.0, 0.0, 0.0]], requires_grad=True)
    dirty = clean.detach().masked_fill(~KEEP, garbage).requires_grad_()
    weight = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, 6.0]])
    for x in (clean, dirty):
        result = masked_whiten(x, KEEP, shift_mean=shift_mean)
        assert (result[~KEEP] == 0).all()
        ((result * weight).sum() + masked_mean(x, KEEP)).backward()
    assert torch.equal(
        masked_whiten(clean, KEEP, shift_mean=shift_mean),
        masked_whiten(dirty, KEEP, shift_mean=shift_mean),
    )
    assert clean.grad is not None
    assert dirty.grad is not None
    assert torch.equal(clean.grad, dirty.grad)
    assert (dirty.grad[~KEEP] == 0).all()


def test_padding_on_either_side_changes_nothing():
    generator = torch.Generator().manual_seed(2)
    x, pad = torch.randn(3, 4, generator=generator), torch.full((3, 2), 7.0)
    mask, off = torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.bool)
    plain = masked_whiten(x, mask)
    right = masked_whiten(torch.cat([x, pad], 1), torch.cat([mask, off], 1))
    left = masked_whiten(torch.cat([pad, x], 1), torch.cat([off, mask], 1))
    assert_close(right[:, :4], plain)
    assert_close(left[:, 2:], plain)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_no_place_or_a_lone_place_stays_finite(kept, shift_mean):
    x = torch.tensor([[3.0, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, False]]) if kept else torch.zeros(1, 2)
    result = masked_whiten(x, mask, shift_mean=shift_mean)
    mean = masked_mean(x, mask)
    (result.sum() + mean).backward()
    assert mean.item() == 3.0 * kept
    assert result.tolist() == [[0.0 if shift_mean else 3.0 * kept, 0.0]]
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_float32_agrees_with_float64():
    generator = torch.Generator().manual_seed(3)
    x = 2 + torch.randn(16, 64, generator=generator, dtype=torch.float64)
    mask = torch.rand(16, 64, generator=generator) < 0.5
    for function in (masked_mean, masked_whiten):
        assert_close(function(x.float(), mask).double(), function(x, mask), atol=1e-5, rtol=0)

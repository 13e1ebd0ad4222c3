"""Generalised advantage estimation."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.functional.advantages import gae


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Right-padded rows of 1, 4, 7 and 0 tokens; garbage under the mask."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 4, 7, generator=generator, dtype=dtype)
    mask = torch.arange(7) < torch.tensor([1, 4, 7, 0]).unsqueeze(1)
    return rewards, values, mask


def by_definition(rewards, values, gamma, lam):
    """Equation 16 of the paper as a double sum, for one row without padding."""
    length = len(rewards)
    following = [*values[1:], torch.tensor(0.0)]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(length)]
    return torch.stack(
        [
            sum(((gamma * lam) ** k * deltas[t + k] for k in range(length - t)), torch.tensor(0.0))
            for t in range(length)
        ]
    )


def test_three_tokens_by_hand():
    # γ = 0.9, λ = 0.8, γλ = 0.72
    # δ₂ = 2 + 0   - 1.5 = 0.5     Â₂ = 0.5
    # δ₁ = 0 + 1.35 - 1  = 0.35    Â₁ = 0.35 + 0.72·0.5  = 0.71
    # δ₀ = 1 + 0.9 - 0.5 = 1.4     Â₀ = 1.4  + 0.72·0.71 = 1.9112
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    result = gae(rewards, values, torch.ones(1, 3), gamma=0.9, lam=0.8)
    assert_close(result.advantages, torch.tensor([[1.9112, 0.71, 0.5]]))
    assert_close(result.returns, torch.tensor([[2.4112, 1.71, 2.0]]))


def test_the_defaults_are_those_of_rlhf():
    # γ = 1, λ = 0.95: δ = (0 + 2 - 1, 3 - 2) = (1, 1), Â = (1 + 0.95, 1)
    result = gae(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 2.0]]), torch.ones(1, 2))
    assert_close(result.advantages, torch.tensor([[1.95, 1.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (0.7, 0.0)])
def test_agrees_with_the_definition_row_by_row(gamma, lam):
    rewards, values, mask = batch(0)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(mask.sum(1).tolist()):
        if length:
            expected = by_definition(rewards[row, :length], values[row, :length], gamma, lam)
            assert_close(advantages[row, :length], expected)
            assert_close(returns[row, :length], expected + values[row, :length])
        assert (advantages[row, length:] == 0).all()
        assert (returns[row, length:] == 0).all()


def test_lambda_one_gives_the_discounted_return_and_lambda_zero_the_one_step_error():
    rewards, values, _ = batch(1)
    mask = torch.ones_like(rewards)
    returns = torch.zeros_like(rewards)
    later = torch.zeros(4, dtype=torch.float64)
    for t in range(6, -1, -1):
        later = returns[:, t] = rewards[:, t] + 0.9 * later
    assert_close(gae(rewards, values, mask, gamma=0.9, lam=1.0).returns, returns)
    following = torch.cat([values[:, 1:], torch.zeros(4, 1)], 1)
    one_step = rewards + 0.9 * following - values
    assert_close(gae(rewards, values, mask, gamma=0.9, lam=0.0).advantages, one_step)


def test_a_perfect_critic_has_no_advantage():
    rewards, _, mask = batch(2)
    values = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    assert_close(gae(rewards, values, mask).advantages, torch.zeros_like(rewards))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_what_lies_under_the_mask_changes_neither_result_nor_gradient(garbage):
    rewards, values, mask = batch(3)
    clean = [x.masked_fill(~mask, 0).requires_grad_() for x in (rewards, values)]
    dirty = [x.masked_fill(~mask, garbage).requires_grad_() for x in (rewards, values)]
    results = [gae(*pair, mask, gamma=0.9) for pair in (clean, dirty)]
    for result in results:
        (result.advantages.square().sum() + result.returns.sum()).backward()
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)
    for expected, found in zip(clean, dirty, strict=True):
        assert torch.equal(expected.grad, found.grad)


def test_padding_is_stepped_over_wherever_it_lies():
    rewards, values, _ = batch(4)
    plain = gae(rewards, values, torch.ones_like(rewards))
    for columns in ([0, 1], [7, 8], [0, 8], [3, 4], [1, 5]):  # left, right, around, inside
        mask = torch.ones(4, 9, dtype=torch.bool)
        mask[:, columns] = False
        spread = [torch.full((4, 9), 9.0, dtype=torch.float64) for _ in range(2)]
        for target, source in zip(spread, (rewards, values), strict=True):
            target[mask] = source.flatten()
        result = gae(*spread, mask)
        assert torch.equal(result.advantages[mask].view(4, 7), plain.advantages)
        assert torch.equal(result.returns[mask].view(4, 7), plain.returns)
        assert (result.advantages[~mask] == 0).all()
        assert (result.returns[~mask] == 0).all()


def test_a_single_token_and_no_token():
    # Nothing follows: Â = r - V, return = r.
    rewards, values = torch.tensor([[2.0], [3.0]]), torch.tensor([[0.5], [9.0]])
    result = gae(rewards, values, torch.tensor([[True], [False]]))
    assert result.advantages.tolist() == [[1.5], [0.0]]
    assert result.returns.tolist() == [[2.0], [0.0]]
    assert gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0)).returns.shape == (2, 0)


def test_float32_agrees_with_float64():
    generator = torch.Generator().manual_seed(5)
    rewards, values = torch.randn(2, 8, 200, generator=generator)
    mask = torch.ones(8, 200)
    single, double = gae(rewards, values, mask), gae(rewards.double(), values.double(), mask)
    for x, y in zip(single, double, strict=True):
        assert_close(x.double(), y, atol=1e-5, rtol=1e-5)

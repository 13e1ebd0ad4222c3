"""Generalised advantage estimation, and advantages within a group."""

from functools import partial
from statistics import mean, stdev

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.functional.advantages import gae, group_relative, leave_one_out


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


# --- groups ---


def test_group_relative_by_hand():
    # (1, 2, 3): mean 2, std √((1 + 0 + 1) / 2) = 1.  (0, 0, 3): mean 1, std √((1 + 1 + 4) / 2) = √3
    scores = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 3.0])
    one, root = 1 + 1e-4, 3**0.5 + 1e-4
    expected = torch.tensor([-1 / one, 0, 1 / one, -1 / root, -1 / root, 2 / root])
    assert_close(group_relative(scores, 3), expected)
    assert group_relative(scores, 3, scale=False).tolist() == [-1, 0, 1, -1, -1, 2]


def test_leave_one_out_by_hand():
    # (1, 2, 6): 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2;  (5, 5, 2) likewise
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 2.0])
    assert_close(leave_one_out(scores, 3), torch.tensor([-3.0, -1.5, 4.5, 1.5, 1.5, -3.0]))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_groups_agree_with_a_loop(size):
    scores = torch.randn(3 * size, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    alone, scaled, centred = [], [], []
    for i, score in enumerate(scores):
        start = i // size * size
        group = [float(s) for s in scores[start : start + size]]
        others = [float(s) for j, s in enumerate(scores) if start <= j < start + size and j != i]
        alone.append(float(score) - mean(others))
        centred.append(float(score) - mean(group))
        scaled.append(centred[-1] / (stdev(group) + 1e-4))
    for found, expected in (
        (leave_one_out(scores, size), alone),
        (group_relative(scores, size), scaled),
        (group_relative(scores, size, scale=False), centred),
    ):
        assert_close(found, torch.tensor(expected, dtype=torch.float64))


GROUPED = pytest.mark.parametrize(
    "function",
    [group_relative, partial(group_relative, scale=False), leave_one_out],
    ids=["grpo", "dr grpo", "rloo"],
)


@GROUPED
def test_a_group_adds_up_to_zero_and_knows_nothing_of_the_others(function):
    scores = torch.randn(12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = function(scores, 4).view(3, 4)
    assert_close(found.sum(1), torch.zeros(3, dtype=torch.float64))
    assert_close(function(scores[4:8], 4), found[1])
    assert_close(function(scores + 100, 4), found.flatten())  # nor of what all scores share


@GROUPED
@pytest.mark.parametrize("score", [0.1, 1e8, -0.3])
def test_a_group_that_agrees_is_exactly_zero(function, score):
    assert function(torch.full((7,), score), 7).tolist() == [0.0] * 7


@GROUPED
def test_groups_in_float32_agree_with_float64(function):
    scores = torch.randn(40, generator=torch.Generator().manual_seed(8))
    assert_close(function(scores, 4).double(), function(scores.double(), 4), atol=1e-5, rtol=1e-5)


@GROUPED
def test_what_is_no_group_is_refused(function):
    with pytest.raises(ValueError, match="multiple"):
        function(torch.zeros(5), 2)
    with pytest.raises(ValueError, match="at least 2"):
        function(torch.zeros(4), 1)

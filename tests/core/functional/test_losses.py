"""The losses of SFT, the reward model, PPO and DPO."""

import math

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from rlhf_core.functional.logprobs import token_logprobs
from rlhf_core.functional.losses import (
    bradley_terry,
    clipped_policy,
    clipped_value,
    completion_nll,
    dpo,
    importance_weights,
    pointwise_mse,
    token_nll,
)

GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e30]
LENGTHS = torch.tensor([1, 4, 6, 0])
MASK = torch.arange(6) < LENGTHS.unsqueeze(1)


def draw(seed: int, count: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """`count` tensors of (4, 6), wide enough that both clips decide somewhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 6, generator=generator, dtype=dtype).mul(0.5).unbind()


def policy_loss(x, y, z, mask, **kwargs):
    return clipped_policy(x, y, z, mask, dual_clip=1.5, **kwargs)


CLIPPED = pytest.mark.parametrize("loss", [policy_loss, clipped_value], ids=["policy", "value"])


# --- SFT ---


def test_token_nll_by_hand():
    # Tokens of probability 1/2 and 1/8: log 2 + log 8 = 4·log 2, over 2 tokens or over 8.
    logprobs = torch.tensor([0.5, 0.125]).log().requires_grad_()
    assert_close(token_nll(logprobs), torch.tensor(2 * math.log(2)))
    loss = token_nll(logprobs, normalizer=8)
    assert_close(loss, torch.tensor(math.log(2) / 2))
    loss.backward()
    assert logprobs.grad.tolist() == [-1 / 8, -1 / 8]


def test_token_nll_of_unequal_parts_adds_up_under_one_normalizer():
    logprobs = -torch.rand(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [token_nll(part, normalizer=7) for part in (logprobs[:1], logprobs[1:5], logprobs[5:])]
    assert_close(sum(parts), token_nll(logprobs))
    assert_close(token_nll(logprobs), -logprobs.mean())


def test_token_nll_without_a_token_is_zero():
    assert token_nll(torch.zeros(0)).item() == 0.0


def test_nll_by_hand():
    # Weights 1 : 3, so π = (1/4, 3/4): log 4/3 for label 1, log 4 for label 0.
    logits = torch.tensor([[[0.0, math.log(3)]] * 3])
    total, tokens = completion_nll(logits, torch.tensor([[-100, 1, 0]]))
    assert_close(total, torch.tensor(math.log(4 / 3) + math.log(4)))
    assert tokens.item() == 2


def test_nll_agrees_with_cross_entropy_and_with_token_logprobs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 9, generator=generator, dtype=torch.float64)
    tokens = torch.randint(9, (4, 6), generator=generator)
    total, count = completion_nll(logits, tokens.masked_fill(~MASK, -100))
    reference = functional.cross_entropy(
        logits.transpose(1, 2), tokens.masked_fill(~MASK, -100), ignore_index=-100
    )
    assert_close(total / count, reference)
    assert_close(total, -token_logprobs(logits, tokens)[MASK].sum())
    assert count == MASK.sum()


@pytest.mark.parametrize("garbage", GARBAGE)
def test_unlabelled_logits_change_neither_nll_nor_gradient(garbage):
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(4, 6, 9, generator=generator).requires_grad_()
    dirty = clean.detach().masked_fill(~MASK.unsqueeze(-1), garbage).requires_grad_()
    labels = torch.randint(9, (4, 6), generator=generator).masked_fill(~MASK, -100)
    for logits in (clean, dirty):
        completion_nll(logits, labels).total.backward()
    assert torch.equal(completion_nll(clean, labels).total, completion_nll(dirty, labels).total)
    assert torch.equal(clean.grad, dirty.grad)
    assert (dirty.grad[~MASK] == 0).all()


def test_nll_without_a_label_is_zero_with_a_zero_gradient():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    total, tokens = completion_nll(logits, torch.full((2, 3), -100))
    total.backward()
    assert (total.item(), tokens.item()) == (0.0, 0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_nll_of_half_precision_logits_is_computed_in_float32():
    generator = torch.Generator().manual_seed(2)
    logits = (5 * torch.randn(4, 6, 50, generator=generator)).bfloat16()
    labels = torch.randint(50, (4, 6), generator=generator)
    single, double = (completion_nll(x, labels).total for x in (logits, logits.double()))
    assert single.dtype == torch.float32
    assert_close(single.double(), double, rtol=1e-5, atol=0)


# --- reward model ---


@pytest.mark.parametrize("d", [-3.0, 0.0, 0.5, 4.0])
def test_bradley_terry_is_the_softplus_of_the_lost_difference(d):
    loss = bradley_terry(torch.tensor([1.0 + d]), torch.tensor([1.0]))
    assert_close(loss, torch.tensor(math.log(1 + math.exp(-d))))


def test_bradley_terry_by_hand():
    # σ(log 3) = 3/4 and σ(-log 3) = 1/4
    chosen, rejected = torch.tensor([math.log(3), 0.0]), torch.zeros(2)
    right, even, wrong = math.log(4 / 3), math.log(2), math.log(4)
    assert_close(bradley_terry(chosen, rejected), torch.tensor((right + even) / 2))
    assert_close(bradley_terry(rejected, chosen), torch.tensor((wrong + even) / 2))
    assert_close(
        bradley_terry(chosen, rejected, label_smoothing=0.1),
        torch.tensor((0.9 * right + 0.1 * wrong + even) / 2),
    )
    # The second pair's margin turns its difference of 0 into -log 3.
    assert_close(
        bradley_terry(chosen, rejected, margin=torch.tensor([0.0, math.log(3)])),
        torch.tensor((right + wrong) / 2),
    )
    # Sums of 3 and 1: c·(9 + 1) / 2 on top.
    chosen, rejected = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0])
    centred = bradley_terry(chosen, rejected, center_coef=0.01)
    assert_close(centred - bradley_terry(chosen, rejected), torch.tensor(0.05))


def test_bradley_terry_agrees_with_binary_cross_entropy():
    chosen, rejected, smoothing = (x.flatten() for x in draw(3, 3))
    smoothing = smoothing.sigmoid()
    reference = functional.binary_cross_entropy_with_logits(chosen - rejected, 1 - smoothing)
    assert_close(bradley_terry(chosen, rejected, label_smoothing=smoothing), reference)


def test_the_gradient_pushes_a_pair_apart_by_how_surprising_it_was():
    # d loss / d chosen = -σ(-d) = -1/4 at d = log 3, and the opposite for rejected
    chosen = torch.tensor([math.log(3)], requires_grad=True)
    rejected = torch.zeros(1, requires_grad=True)
    bradley_terry(chosen, rejected).backward()
    assert_close(chosen.grad, torch.tensor([-0.25]))
    assert_close(rejected.grad, torch.tensor([0.25]))


def test_a_tie_is_symmetric_and_least_where_the_rewards_agree():
    a, b = torch.tensor([0.3, 2.0, -1.0]), torch.tensor([1.3, -1.0, -1.0])
    tie = torch.full((3,), 0.5)
    assert_close(bradley_terry(a, b, label_smoothing=tie), bradley_terry(b, a, label_smoothing=0.5))
    reward = torch.tensor([0.7], requires_grad=True)
    loss = bradley_terry(reward, torch.tensor([0.7]), label_smoothing=0.5)
    loss.backward()
    assert_close(loss.detach(), torch.tensor(math.log(2)))
    assert reward.grad.item() == 0.0


def test_bradley_terry_reproduces_the_published_worked_example():
    # https://en.wikipedia.org/wiki/Bradley-Terry_model#Worked_example: wins of A, B, C, D, and the
    # strengths 0.640, 1.043, 0.660, 2.270 with geometric mean 1.
    wins = {"AB": 2, "AD": 1, "BA": 3, "BC": 5, "CB": 3, "CD": 1, "DA": 4, "DC": 3}
    games = [pair for pair, count in wins.items() for _ in range(count)]
    winners, losers = (torch.tensor(["ABCD".index(g[i]) for g in games]) for i in (0, 1))
    rewards = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([rewards], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = bradley_terry(rewards[winners], rewards[losers])
        loss.backward()
        return loss

    optimizer.step(closure)
    strengths = (rewards.detach() - rewards.detach().mean()).exp()
    expected = torch.tensor([0.640, 1.043, 0.660, 2.270], dtype=torch.float64)
    assert_close(strengths, expected, atol=5e-4, rtol=0)


def test_bradley_terry_stays_finite_and_exact_far_out():
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = bradley_terry(chosen, torch.zeros(2))
    loss.backward()
    assert loss.item() == 5e3  # (1e4 + 0) / 2
    assert chosen.grad.tolist() == [-0.5, 0.0]


def test_bradley_terry_refuses_no_pairs_and_impossible_smoothing():
    with pytest.raises(ValueError, match="one pair"):
        bradley_terry(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="label_smoothing"):
        bradley_terry(torch.zeros(1), torch.zeros(1), label_smoothing=1.5)


def test_pointwise_mse_by_hand():
    # (1² + 2²) / 2
    loss = pointwise_mse(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 3.0]))
    assert loss.item() == 2.5
    with pytest.raises(ValueError, match="one score"):
        pointwise_mse(torch.zeros(0), torch.zeros(0))


# --- PPO ---


def test_policy_loss_and_gradient_by_hand():
    # ε = 0.2       ρ·Â          clip(ρ)·Â      min     d loss / d logπ = -ρ·Â / 5, or 0 if clipped
    # 1.5,  1       1.5          1.2           1.2      0
    # 0.5,  1       0.5          0.8           0.5     -0.1
    # 1.1,  2       2.2          2.2           2.2     -0.44
    # 1.5, -1      -1.5         -1.2          -1.5      0.3
    # 0.5, -1      -0.5         -0.8          -0.8      0
    ratios = torch.tensor([[1.5, 0.5, 1.1, 1.5, 0.5]])
    advantages = torch.tensor([[1.0, 1.0, 2.0, -1.0, -1.0]])
    old = torch.full((1, 5), -2.0)
    logprobs = (old + ratios.log()).requires_grad_()
    loss, clip_fraction = clipped_policy(logprobs, old, advantages, torch.ones(1, 5))
    loss.backward()
    assert_close(loss.detach(), torch.tensor(-0.32))  # -1.6 / 5
    assert_close(clip_fraction, torch.tensor(0.4))
    assert_close(logprobs.grad, torch.tensor([[0.0, -0.1, -0.44, 0.3, 0.0]]))
    assert logprobs.grad[0, 0] == 0  # exactly
    assert logprobs.grad[0, 4] == 0


def test_importance_weights_by_hand():
    # π:         0.5   0.2   0.6   0.1
    # π_engine:  0.25  0.4   0.1   0.1    w = min(π / π_engine, 3)
    ours, theirs = torch.tensor([[0.5, 0.2, 0.6, 0.1]]), torch.tensor([[0.25, 0.4, 0.1, 0.1]])
    logprobs = ours.log().requires_grad_()
    found = importance_weights(logprobs, theirs.log(), torch.ones(1, 4), cap=3.0)
    assert_close(found, torch.tensor([[2.0, 0.5, 3.0, 1.0]]))
    assert not found.requires_grad
    masked = importance_weights(logprobs, theirs.log(), torch.tensor([[1, 0, 1, 1]]), cap=1.0)
    assert_close(masked, torch.tensor([[1.0, 1.0, 1.0, 1.0]]))
    far = importance_weights(torch.zeros(1, 1), torch.full((1, 1), -1e4), torch.ones(1, 1), cap=8)
    assert far.item() == 8
    with pytest.raises(ValueError, match=r"cap must be at least 1, got 0\.5"):
        importance_weights(logprobs, logprobs, torch.ones(1, 4), cap=0.5)


def test_importance_weights_multiply_the_objective_behind_its_clip():
    # The losses by hand of the test above: min = 1.2, 0.5, 2.2, -1.5, -0.8; w = 2, 1, 0.5, 2, 1.
    ratios = torch.tensor([[1.5, 0.5, 1.1, 1.5, 0.5]])
    advantages = torch.tensor([[1.0, 1.0, 2.0, -1.0, -1.0]])
    weights = torch.tensor([[2.0, 1.0, 0.5, 2.0, 1.0]]).requires_grad_()
    logprobs, old = ratios.log().requires_grad_(), torch.zeros(1, 5)
    loss, clip_fraction = clipped_policy(
        logprobs, old, advantages, torch.ones(1, 5), importance=weights
    )
    loss.backward()
    assert_close(loss.detach(), torch.tensor(-(2.4 + 0.5 + 1.1 - 3.0 - 0.8) / 5))
    assert_close(clip_fraction, torch.tensor(0.4))  # a weight changes no clip
    assert_close(logprobs.grad, torch.tensor([[0.0, -0.1, -0.22, 0.6, 0.0]]))
    assert weights.grad is None
    plain = clipped_policy(logprobs, old, advantages, torch.ones(1, 5)).loss
    ones = torch.ones(1, 5)
    assert clipped_policy(logprobs, old, advantages, ones, importance=ones).loss.equal(plain)


def test_weights_make_of_an_engines_draws_the_gradient_of_the_policy():
    # Three tokens, drawn by another distribution: over all of them, with the probability of the
    # engine, the weighted gradient is Σ π·Â·∇log π.
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    engine = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    logprobs = logits.log_softmax(-1).unsqueeze(0)
    mask = torch.ones(1, 3)
    weights = importance_weights(logprobs, engine.log().unsqueeze(0), mask, cap=100)
    # The normalizer and the engine's probabilities make an expectation of the sum.
    loss = clipped_policy(
        logprobs, logprobs.detach(), advantages * engine, mask, normalizer=1, importance=weights
    ).loss
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    expected = torch.autograd.grad(-(logprobs.exp() * advantages).sum(), logits)[0]
    assert_close(found, expected)


def test_dual_clip_by_hand():
    # c = 3: only a negative advantage with a ratio above 3 is held, at c·Â.
    # 5, -1 -> max(-5, -3) = -3, clipped;  2.9, -1 -> -2.9;  5, 1 -> 1.2, clipped;  0.5, -1 -> -0.8
    ratios = torch.tensor([[5.0, 2.9, 5.0, 0.5]])
    advantages = torch.tensor([[-1.0, -1.0, 1.0, -1.0]])
    logprobs = ratios.log().requires_grad_()
    old, mask = torch.zeros(1, 4), torch.ones(1, 4)
    loss, clip_fraction = clipped_policy(logprobs, old, advantages, mask, dual_clip=3.0)
    loss.backward()
    assert_close(loss.detach(), torch.tensor((3.0 + 2.9 - 1.2 + 0.8) / 4))
    assert clip_fraction.item() == 0.75
    assert_close(logprobs.grad, torch.tensor([[0.0, 2.9 / 4, 0.0, 0.0]]))
    single = clipped_policy(logprobs.detach(), old, advantages, mask)
    assert_close(single.loss, torch.tensor((5.0 + 2.9 - 1.2 + 0.8) / 4))
    assert single.clip_fraction.item() == 0.5


def test_at_ratio_one_the_gradient_is_that_of_the_plain_policy_gradient():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(5, (4, 6), generator=generator)
    (advantages,) = draw(4, 1)
    logprobs = token_logprobs(logits, tokens)
    ppo = clipped_policy(logprobs, logprobs.detach(), advantages, MASK, dual_clip=3.0)
    reinforce = -(advantages * logprobs)[MASK].sum() / MASK.sum()
    assert ppo.clip_fraction == 0
    assert_close(
        torch.autograd.grad(ppo.loss, logits, retain_graph=True),
        torch.autograd.grad(reinforce, logits),
    )


def test_the_policy_gradient_is_zero_exactly_where_a_step_further_is_not_wanted():
    old, logprobs, advantages = draw(5, 3)
    logprobs = logprobs.requires_grad_()
    result = clipped_policy(logprobs, old, advantages, MASK)
    result.loss.backward()
    ratio = (logprobs - old).detach().exp()
    stopped = ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    assert torch.equal(logprobs.grad == 0, stopped | ~MASK)
    assert 0 < (stopped & MASK).sum() < MASK.sum()
    assert_close(result.clip_fraction.double(), (stopped & MASK).sum() / MASK.sum().double())
    expected = -(ratio * advantages / MASK.sum())
    assert_close(logprobs.grad, expected.masked_fill(stopped | ~MASK, 0))


def test_value_loss_and_gradient_by_hand():
    # ε = 0.2, V_old = 2, R = 3
    #  V      (V - 3)²   V̂      (V̂ - 3)²   max     d loss / d V = (V - 3) / 3, or 0 if clipped
    #  2.5    0.25       2.2    0.64       0.64    0
    #  2.1    0.81       2.1    0.81       0.81   -0.3
    #  1.5    2.25       1.8    1.44       2.25   -0.5
    values = torch.tensor([[2.5, 2.1, 1.5]], requires_grad=True)
    old, returns, mask = torch.full((1, 3), 2.0), torch.full((1, 3), 3.0), torch.ones(1, 3)
    loss, clip_fraction = clipped_value(values, old, returns, mask)
    loss.backward()
    assert_close(loss.detach(), torch.tensor(0.5 * 3.7 / 3))
    assert_close(clip_fraction, torch.tensor(1 / 3))
    assert_close(values.grad, torch.tensor([[0.0, -0.3, -0.5]]))
    assert values.grad[0, 0] == 0  # exactly


def test_a_wide_value_clip_leaves_half_the_squared_error():
    values, old, returns = draw(6, 3)
    loss, clip_fraction = clipped_value(values, old, returns, MASK, clip_range=1e6)
    assert_close(loss, functional.mse_loss(values[MASK], returns[MASK]) / 2)
    assert clip_fraction == 0


@CLIPPED
@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_lies_under_the_mask_changes_neither_loss_nor_gradient(loss, garbage):
    clean = [x.masked_fill(~MASK, 0) for x in draw(7, 3)]
    dirty = [x.masked_fill(~MASK, garbage) for x in clean]
    results = []
    for inputs in (clean, dirty):
        trained = inputs[0].requires_grad_()
        result = loss(*inputs, MASK)
        result.loss.backward()
        results.append((result.loss.item(), result.clip_fraction.item(), trained.grad.tolist()))
    assert results[0] == results[1]
    assert results[0][1] > 0


@CLIPPED
def test_padding_changes_nothing_on_either_side_and_bool_masks_equal_numbers(loss):
    inputs = draw(8, 3)
    plain = loss(*inputs, MASK)
    pad, off = torch.full((4, 2), 3.0, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.bool)
    right = loss(*(torch.cat([x, pad], 1) for x in inputs), torch.cat([MASK, off], 1))
    left = loss(*(torch.cat([pad, x], 1) for x in inputs), torch.cat([off, MASK], 1))
    for other in (right, left, loss(*inputs, MASK.long()), loss(*inputs, MASK.double())):
        assert_close(tuple(other), tuple(plain))


@CLIPPED
def test_micro_batches_add_up_to_the_minibatch(loss):
    # The rows have 1, 4, 6 and 0 tokens: the mean of their means would be something else.
    inputs = draw(9, 3)
    whole = loss(*inputs, MASK)
    for normalizer in (MASK.sum(), float(MASK.sum())):
        rows = [
            loss(*(x[i : i + 1] for x in inputs), MASK[i : i + 1], normalizer=normalizer)
            for i in range(4)
        ]
        assert_close(sum(r.loss for r in rows), whole.loss)
        assert_close(sum(r.clip_fraction for r in rows), whole.clip_fraction)
    means = [loss(*(x[i : i + 1] for x in inputs), MASK[i : i + 1]).loss for i in range(4)]
    assert abs(sum(means) / 4 - whole.loss) > 1e-3


@CLIPPED
@pytest.mark.parametrize("normalizer", [None, 0.0, torch.tensor(0)])
def test_a_fully_masked_minibatch_has_loss_zero_and_gradient_zero(loss, normalizer):
    x, y, z = draw(10, 3)
    x.requires_grad_()
    result = loss(x, y, z, torch.zeros(4, 6), normalizer=normalizer)
    result.loss.backward()
    assert (result.loss.item(), result.clip_fraction.item()) == (0.0, 0.0)
    assert torch.equal(x.grad, torch.zeros_like(x))


@CLIPPED
def test_float32_agrees_with_float64(loss):
    inputs = draw(11, 3, torch.float32)
    results = []
    for cast in (inputs, [x.double() for x in inputs]):
        trained = cast[0].clone().requires_grad_()
        value = loss(trained, *cast[1:], MASK).loss
        value.backward()
        results.append((value.detach().double(), trained.grad.double()))
    assert_close(*results, atol=1e-5, rtol=1e-5)


def test_a_ratio_beyond_float_range_stays_finite():
    logprobs = torch.tensor([[-1.0, -1.0, -500.0, -math.inf]], requires_grad=True)
    old = torch.tensor([[-500.0, -500.0, -1.0, -1.0]])
    advantages = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    result = clipped_policy(logprobs, old, advantages, torch.ones(1, 4), dual_clip=3.0)
    result.loss.backward()
    assert_close(result.loss.detach(), torch.tensor((-1.2 + 3.0) / 4))
    assert logprobs.grad.tolist() == [[0.0] * 4]


def test_clips_out_of_range_are_refused():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="clip_range"):
        clipped_policy(x, x, x, x, clip_range=0.0)
    with pytest.raises(ValueError, match="clip_range"):
        clipped_value(x, x, x, x, clip_range=-1.0)
    with pytest.raises(ValueError, match="dual_clip"):
        clipped_policy(x, x, x, x, dual_clip=1.0)


# --- DPO ---


def test_dpo_by_hand():
    # β = 1/2. Pair 1: rewards (log 9)/2 = log 3 and 0: σ(log 3) = 3/4. Pair 2: rewards 0 and log 3.
    policy_chosen = torch.tensor([-1 + math.log(9), -4.0], requires_grad=True)
    policy_rejected = torch.tensor([-2.0, -5 + math.log(9)], requires_grad=True)
    references = torch.tensor([-1.0, -4.0]), torch.tensor([-2.0, -5.0])
    result = dpo(policy_chosen, policy_rejected, *references, beta=0.5)
    result.loss.backward()
    assert_close(result.loss.detach(), torch.tensor((math.log(4 / 3) + math.log(4)) / 2))
    assert_close(result.chosen_rewards, torch.tensor([math.log(3), 0.0]))
    assert_close(result.rejected_rewards, torch.tensor([0.0, math.log(3)]))
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad
    # d loss / d log π = -β·σ(-d) / B: surprise 1/4 and 3/4
    assert_close(policy_chosen.grad, torch.tensor([-1 / 16, -3 / 16]))
    assert_close(policy_rejected.grad, torch.tensor([1 / 16, 3 / 16]))


def test_dpo_starts_at_log_two_and_smoothing_flips_a_share_of_the_votes():
    chosen, rejected, ref_chosen, ref_rejected = (x.flatten() for x in draw(12, 4))
    start = dpo(chosen, rejected, chosen, rejected, beta=0.1)
    assert_close(start.loss, torch.tensor(math.log(2), dtype=torch.float64))
    right = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=2.0).loss
    wrong = dpo(rejected, chosen, ref_rejected, ref_chosen, beta=2.0).loss
    for smoothing in (0.1, torch.full((24,), 0.1)):
        mixed = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=2.0, label_smoothing=smoothing)
        assert_close(mixed.loss, 0.9 * right + 0.1 * wrong)


def test_the_best_policy_of_dpo_is_that_of_rl_with_a_kl_penalty():
    # Theorem behind the paper (equation 4): with preferences drawn from Bradley-Terry on r, the
    # loss is least at π*(y) ∝ π_ref(y)·exp(r(y) / β). Expected loss over the 3 · 2 ordered pairs.
    reward = torch.tensor([0.0, 1.0, -0.5], dtype=torch.float64)
    reference = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    first, second = torch.tensor([[0, 1], [0, 2], [1, 2]]).T
    flipped = (reward[second] - reward[first]).sigmoid()
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        policy = logits.log_softmax(0)
        pairs = (policy[first], policy[second], reference[first], reference[second])
        loss = dpo(*pairs, beta=0.5, label_smoothing=flipped).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    best = (reference + reward / 0.5).softmax(0)
    assert_close(logits.detach().softmax(0), best, atol=1e-4, rtol=0)


def test_dpo_refuses_what_has_no_meaning():
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="beta"):
        dpo(x, x, x, x, beta=0.0)
    with pytest.raises(ValueError, match="label_smoothing"):
        dpo(x, x, x, x, beta=0.1, label_smoothing=-0.1)
    with pytest.raises(ValueError, match="one pair"):
        dpo(*[torch.zeros(0)] * 4, beta=0.1)

"""Log-probabilities, entropy and the three KL estimators."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from rlhf_core.functional.logprobs import entropy, kl_estimate, token_logprobs

# Weights 1 : 2 : 1, so that π = (1/4, 1/2, 1/4) at temperature 1.
LOGITS = torch.tensor([[[0.0, math.log(2), 0.0]]])


def random_logits(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, 6, 11, generator=generator, dtype=torch.float64)
    return logits, torch.randint(11, (4, 6), generator=generator)


@pytest.mark.parametrize(
    ("token", "temperature", "probability"),
    # τ = 1/2 squares the weights: 1 : 4 : 1. τ = 2 takes their roots: 1 : √2 : 1.
    [(1, 1.0, 1 / 2), (2, 1.0, 1 / 4), (1, 0.5, 4 / 6), (0, 2.0, 1 / (2 + 2**0.5))],
)
def test_token_logprobs_by_hand(token, temperature, probability):
    result = token_logprobs(LOGITS, torch.tensor([[token]]), temperature=temperature)
    assert_close(result, torch.tensor([[math.log(probability)]]))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.9])
def test_token_logprobs_and_entropy_agree_with_torch_distributions(temperature):
    logits, tokens = random_logits(0)
    reference = Categorical(logits=logits / temperature)
    result = token_logprobs(logits, tokens, temperature=temperature)
    assert_close(result, reference.log_prob(tokens))
    assert_close(entropy(logits, temperature=temperature), reference.entropy())


def test_the_gradient_of_a_logprob_is_one_hot_minus_softmax():
    logits = LOGITS.clone().requires_grad_()
    token_logprobs(logits, torch.tensor([[1]])).sum().backward()
    assert_close(logits.grad, torch.tensor([[[-0.25, 0.5, -0.25]]]))


def test_a_common_shift_of_the_logits_changes_nothing():
    logits = torch.tensor([[[0.5, -1.25, 2.0]]])  # these and + 1024 are exact in float32
    tokens = torch.tensor([[0]])
    assert torch.equal(token_logprobs(logits + 1024, tokens), token_logprobs(logits, tokens))


def test_entropy_by_hand():
    # -(1/2·log 1/2 + 2·1/4·log 1/4) = 3/2·log 2
    assert_close(entropy(LOGITS), torch.tensor([[1.5 * math.log(2)]]))
    assert_close(entropy(torch.zeros(1, 1, 7)), torch.tensor([[math.log(7)]]))


def test_impossible_tokens_leave_entropy_and_gradients_finite():
    logits = torch.tensor([[[0.0, -math.inf, 0.0], [0.0, -math.inf, -math.inf]]])
    logits.requires_grad_()
    result = entropy(logits)
    assert_close(result, torch.tensor([[math.log(2), 0.0]]))
    (result.sum() + token_logprobs(logits, torch.tensor([[2, 0]])).sum()).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_half_precision_logits_are_raised_before_the_arithmetic():
    logits, tokens = random_logits(1)
    half = logits.bfloat16()
    result = token_logprobs(half, tokens)
    assert result.dtype == torch.float32
    assert_close(result, token_logprobs(half.double(), tokens).float(), atol=1e-5, rtol=0)
    assert_close(entropy(half), entropy(half.double()).float(), atol=1e-5, rtol=0)


def test_float32_agrees_with_float64():
    logits, tokens = random_logits(2)
    single = logits.float()
    reference = token_logprobs(single.double(), tokens)
    assert_close(token_logprobs(single, tokens).double(), reference, atol=1e-5, rtol=0)
    assert_close(entropy(single).double(), entropy(single.double()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "d", "expected"),
    [
        ("k1", 0.5, 0.5),
        ("k1", -0.5, -0.5),
        ("k2", 0.5, 0.125),
        ("k2", -0.5, 0.125),
        ("k3", 0.5, 0.10653066),  # exp(-0.5) - 1 + 0.5 = 0.60653066 - 0.5
        ("k3", -0.5, 0.14872127),  # exp(0.5) - 1 - 0.5 = 1.64872127 - 1.5
    ],
)
def test_kl_estimates_by_hand(kind, d, expected):
    logprobs = torch.tensor([[-1.0]])
    assert_close(kl_estimate(logprobs, logprobs - d, kind=kind), torch.tensor([[expected]]))


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    # The expectation over tokens of π, computed exactly: Σᵥ π(v)·k(v).
    policy = Categorical(probs=torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64))
    reference = Categorical(probs=torch.tensor([0.2, 0.2, 0.3, 0.3], dtype=torch.float64))
    logprobs, ref_logprobs = policy.logits[None], reference.logits[None]
    truth = kl_divergence(policy, reference)
    for kind in ("k1", "k3"):
        mean = (policy.probs * kl_estimate(logprobs, ref_logprobs, kind=kind)).sum()
        assert_close(mean, truth)
    biased = (policy.probs * kl_estimate(logprobs, ref_logprobs, kind="k2")).sum()
    assert abs(biased - truth) > 0.01


def test_k2_and_k3_are_never_negative_and_vanish_together_with_d():
    d = torch.linspace(-3, 3, 101).unsqueeze(0)
    for kind in ("k2", "k3"):
        assert (kl_estimate(d, torch.zeros_like(d), kind=kind) >= 0).all()
        assert kl_estimate(d, d, kind=kind).abs().max() == 0


def test_k3_keeps_its_digits_where_the_policies_almost_agree():
    # exp(-d) - 1 + d = d²/2 - d³/6 + …; computed as written, float32 gives ± 6e-8 here.
    d = torch.tensor([[1e-4]])
    result = kl_estimate(d, torch.zeros(1, 1), kind="k3").item()
    assert result == pytest.approx(1e-8 / 2 - 1e-12 / 6, abs=1e-10)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="temperature"):
        entropy(LOGITS, temperature=0.0)
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(LOGITS, torch.tensor([[0]]), temperature=float("nan"))
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), kind="k4")  # type: ignore[arg-type]

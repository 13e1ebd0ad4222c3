"""The head in chunks of tokens, against plain autograd over all logits."""

import math

import pytest
import torch
from torch.nn.functional import linear
from torch.testing import assert_close

from rlhf_core.functional import chunked_head
from rlhf_core.functional.logprobs import (
    chunked_token_logprobs,
    chunked_token_loss,
    entropy,
    token_logprobs,
)

N, D, V = 7, 4, 11
WEIGHTS = torch.linspace(-1, 2, N, dtype=torch.float64)
BIAS = pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])


def head(seed: int, *, with_bias: bool = True, dtype: torch.dtype = torch.float64):
    """Hidden states, weight, bias (all leaves) and tokens, two of them the same."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=dtype).requires_grad_() if with_bias else None
    return hidden, weight, bias, torch.tensor([3, 3, 0, 10, 5, 3, 1])


def curved(logprobs, span):
    """A loss whose derivative depends on the log-probability and on the token's place."""
    return (WEIGHTS[span].to(logprobs.dtype) * logprobs.exp()).sum()


def plain(hidden, weight, bias, tokens, temperature=1.0):
    logits = linear(hidden, weight, bias)[None]
    return token_logprobs(logits, tokens[None], temperature=temperature)[0]


def gradients(value, *leaves):
    return torch.autograd.grad(value, [leaf for leaf in leaves if leaf is not None])


def test_two_words_by_hand():
    # z = (0, log 3), so π = (1/4, 3/4). Loss -log π(0) = log 4, and its gradient in z is
    # π - (1, 0) = (-3/4, 3/4): dh = Wᵀ dz = 3/4·log 3, dW = dz·h = (-3/4, 3/4).
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    out = chunked_token_loss(
        hidden, weight, torch.tensor([0]), lambda x, _: -x.sum(), with_entropy=True
    )
    out.loss.backward()
    assert_close(out.loss.detach(), torch.tensor(math.log(4)))
    assert_close(out.logprobs, torch.tensor([-math.log(4)]))
    assert_close(out.entropy, torch.tensor([math.log(4) - 0.75 * math.log(3)]))
    assert_close(hidden.grad, torch.tensor([[0.75 * math.log(3)]]))
    assert_close(weight.grad, torch.tensor([[-0.75], [0.75]]))


@BIAS
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_values_and_gradients_are_those_of_all_logits_at_once(with_bias, chunk_size, temperature):
    hidden, weight, bias, tokens = head(0, with_bias=with_bias)
    options = {"bias": bias, "temperature": temperature, "chunk_size": chunk_size}
    expected = plain(hidden, weight, bias, tokens, temperature)
    wanted = gradients(curved(expected, slice(None)), hidden, weight, bias)

    found = chunked_token_logprobs(hidden, weight, tokens, **options)
    assert_close(found, expected)
    assert_close(gradients(curved(found, slice(None)), hidden, weight, bias), wanted)

    out = chunked_token_loss(hidden, weight, tokens, curved, with_entropy=True, **options)
    logits = linear(hidden, weight, bias)[None]
    assert_close(out.loss, curved(expected, slice(None)))
    assert_close(out.logprobs, expected.detach())
    assert_close(out.entropy, entropy(logits, temperature=temperature)[0].detach())
    assert_close(gradients(out.loss, hidden, weight, bias), wanted)


@BIAS
def test_gradcheck(with_bias):
    hidden, weight, bias, tokens = head(1, with_bias=with_bias)
    options = {"temperature": 0.7, "chunk_size": 3}

    def logprobs(hidden, weight, bias):
        return chunked_token_logprobs(hidden, weight, tokens, bias=bias, **options)

    def loss(hidden, weight, bias):
        return chunked_token_loss(hidden, weight, tokens, curved, bias=bias, **options).loss

    assert torch.autograd.gradcheck(logprobs, (hidden, weight, bias))
    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_a_weight_tied_to_the_embedding_gets_both_gradients():
    _, weight, bias, tokens = head(2)
    expected = gradients(curved(plain(weight[tokens], weight, bias, tokens), slice(None)), weight)
    out = chunked_token_loss(weight[tokens], weight, tokens, curved, bias=bias, chunk_size=2)
    assert_close(gradients(out.loss, weight), expected)
    found = chunked_token_logprobs(weight[tokens], weight, tokens, bias=bias, chunk_size=2)
    assert_close(gradients(curved(found, slice(None)), weight), expected)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_only_what_learns_gets_a_gradient(trained):
    leaves = head(3)
    tokens = leaves[3]
    wanted = gradients(curved(plain(*leaves), slice(None)), *leaves[:3])
    for i, leaf in enumerate(leaves[:3]):
        leaf.requires_grad_(i == trained)
    hidden, weight, bias, _ = leaves
    losses = (
        chunked_token_loss(hidden, weight, tokens, curved, bias=bias, chunk_size=2).loss,
        curved(chunked_token_logprobs(hidden, weight, tokens, bias=bias), slice(None)),
    )
    for loss in losses:
        loss.backward()
        assert_close(leaves[trained].grad, wanted[trained])
        assert [leaf.grad is None for leaf in leaves[:3]].count(True) == 2
        leaves[trained].grad = None


def test_the_incoming_gradient_scales_and_the_graph_can_be_walked_twice():
    hidden, weight, bias, tokens = head(4)
    loss = chunked_token_loss(hidden, weight, tokens, curved, bias=bias).loss
    once = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (hidden, weight, bias), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight, bias))
    assert_close(thrice, tuple(3 * g for g in once))
    assert_close(again, once, rtol=0, atol=0)


def test_what_is_not_the_loss_is_a_constant_and_without_grad_there_are_only_values():
    hidden, weight, bias, tokens = head(5)
    options = {"bias": bias, "chunk_size": 3, "with_entropy": True}
    out = chunked_token_loss(hidden, weight, tokens, curved, **options)
    assert [part.requires_grad for part in out] == [True, False, False]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            quiet = chunked_token_loss(hidden, weight, tokens, curved, **options)
            logprobs = chunked_token_logprobs(hidden, weight, tokens, bias=bias, chunk_size=3)
        assert not any(part.requires_grad for part in quiet)
        for found, expected in zip(quiet, out, strict=True):
            assert_close(found.clone(), expected.detach(), rtol=0, atol=0)
        assert torch.equal(logprobs, out.logprobs)
    assert chunked_token_loss(hidden, weight, tokens, curved).entropy is None


def test_every_token_is_shown_once_as_a_leaf_with_its_place():
    hidden, weight, bias, tokens = head(6)
    seen = []

    def watch(logprobs, span):
        assert logprobs.is_leaf
        assert logprobs.requires_grad
        assert len(logprobs) == span.stop - span.start <= 3
        seen.extend(range(N)[span])
        return logprobs.sum()

    chunked_token_loss(hidden, weight, tokens, watch, bias=bias, chunk_size=3)
    assert seen == list(range(N))


@pytest.mark.parametrize("count", [0, 1])
def test_no_token_and_one_token(count):
    hidden, weight, bias, tokens = head(7)
    few, picked = hidden[:count], tokens[:count]
    out = chunked_token_loss(few, weight, picked, curved, bias=bias, with_entropy=True)
    logprobs = chunked_token_logprobs(few, weight, picked, bias=bias)
    expected = plain(few, weight, bias, picked)
    assert_close(logprobs, expected)
    assert out.logprobs.shape == out.entropy.shape == (count,)
    if count == 0:
        assert out.loss.item() == 0
    wanted = gradients(curved(expected, slice(0, count)), hidden, weight, bias)
    for loss in (out.loss, curved(logprobs, slice(0, count))):
        assert_close(gradients(loss, hidden, weight, bias), wanted)


def test_any_leading_dimensions():
    hidden, weight, bias, tokens = head(8)
    flat = chunked_token_logprobs(hidden[:6], weight, tokens[:6], bias=bias)
    deep = chunked_token_logprobs(
        hidden[:6].view(3, 1, 2, D), weight, tokens[:6].view(3, 1, 2), bias=bias, chunk_size=4
    )
    assert_close(deep, flat.view(3, 1, 2))
    lone = chunked_token_logprobs(hidden[0], weight, tokens[0], bias=bias)
    assert_close(lone, flat[0])


def test_an_impossible_word_leaves_everything_finite():
    hidden, weight, bias, tokens = head(9)
    bias = bias.detach().index_fill(0, torch.tensor([7]), -math.inf).requires_grad_()
    out = chunked_token_loss(hidden, weight, tokens, curved, bias=bias, with_entropy=True)
    found = (*out, *gradients(out.loss, hidden, weight, bias))
    assert all(part.isfinite().all() for part in found)
    assert found[-1][7] == 0
    assert_close(out.entropy, entropy(linear(hidden, weight, bias)[None])[0].detach())


def test_huge_logits_do_not_overflow():
    hidden, weight, bias, tokens = head(10, dtype=torch.float32)
    big = (1e4 * hidden.detach()).requires_grad_()
    out = chunked_token_loss(big, weight, tokens, curved, bias=bias, with_entropy=True)
    assert_close(out.logprobs, plain(big, weight, bias, tokens).detach())
    assert all(g.isfinite().all() for g in gradients(out.loss, big, weight, bias))


def test_float32_agrees_with_float64():
    single = head(11, dtype=torch.float32)
    double = [x.detach().double().requires_grad_() for x in single[:3]]
    outs = []
    for hidden, weight, bias in (single[:3], double):
        out = chunked_token_loss(
            hidden, weight, single[3], curved, bias=bias, chunk_size=3, with_entropy=True
        )
        outs.append((*out, *gradients(out.loss, hidden, weight, bias)))
    for found, expected in zip(*outs, strict=True):
        assert found.dtype == torch.float32
        assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_multiplies_in_bfloat16_and_does_the_rest_in_float32(autocast):
    hidden, weight, bias, tokens = head(12, dtype=torch.float32)
    half = hidden.detach().bfloat16().requires_grad_()
    logits = linear(half, weight.bfloat16(), bias.bfloat16())[None]
    expected = token_logprobs(logits, tokens[None])[0]
    wanted = gradients(curved(expected, slice(None)), half, weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = chunked_token_loss(
            half, weight, tokens, curved, bias=bias, chunk_size=3, with_entropy=True
        )
        logprobs = chunked_token_logprobs(half, weight, tokens, bias=bias, chunk_size=3)
    assert out.loss.dtype == out.logprobs.dtype == out.entropy.dtype == torch.float32
    # As logits in bfloat16 the two may round apart by one unit in the last of 8 places.
    assert_close(out.logprobs, expected.detach(), atol=0.04, rtol=0)
    assert_close(out.entropy, entropy(logits)[0].detach(), atol=0.04, rtol=0)
    assert torch.equal(logprobs, out.logprobs)
    for loss in (out.loss, curved(logprobs, slice(None))):
        found = gradients(loss, half, weight, bias)
        assert [g.dtype for g in found] == [torch.bfloat16, torch.float32, torch.float32]
        assert_close(found, wanted, atol=0.05, rtol=0.03)


@pytest.mark.parametrize("part", [5, 1000])
@pytest.mark.parametrize("chunk_size", [64, 300])
def test_bfloat16_in_parts_and_chunks_is_close_to_plain_float32(monkeypatch, part, chunk_size):
    monkeypatch.setattr(chunked_head, "NARROW_PART", part * chunk_size)
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(700, (300,), generator=generator)
    weights = torch.rand(300, generator=generator)
    narrow = [
        0.3 * torch.randn(shape, generator=generator) for shape in ((300, 48), (700, 48), (700,))
    ]
    hidden, weight, bias = (x.bfloat16().float().requires_grad_() for x in narrow)
    logits = linear(hidden, weight, bias)[None]
    expected = token_logprobs(logits, tokens[None])[0]
    wanted = gradients((weights * expected).sum(), hidden, weight, bias)
    half = hidden.detach().bfloat16().requires_grad_()
    out = chunked_token_loss(
        half,
        weight,
        tokens,
        lambda x, span: (weights[span] * x).sum(),
        bias=bias,
        chunk_size=chunk_size,
        with_entropy=True,
    )
    # A logit here is below 16, where numbers of bfloat16 are 1/16 apart.
    assert float(logits.detach().abs().max()) < 16
    assert_close(out.logprobs, expected.detach(), atol=1 / 16, rtol=0)
    assert_close(out.entropy, entropy(logits)[0].detach(), atol=0.01, rtol=0)
    for found, exact in zip(gradients(out.loss, half, weight, bias), wanted, strict=True):
        assert float((found - exact).norm() / exact.norm()) < 0.01


def test_the_sum_of_the_weight_gradient_keeps_what_bfloat16_would_lose():
    # 512 tokens add a half each: in bfloat16 the sum would stop growing at 128.
    hidden, weight = torch.ones(512, 1).bfloat16(), torch.zeros(2, 1, requires_grad=True)
    tokens = torch.zeros(512, dtype=torch.long)
    chunked_token_loss(hidden, weight, tokens, lambda x, _: x.sum(), chunk_size=1).loss.backward()
    assert weight.grad.tolist() == [[256.0], [-256.0]]


def test_settings_out_of_range_are_refused():
    hidden, weight, bias, tokens = head(13)
    for function in (chunked_token_logprobs, lambda *x, **k: chunked_token_loss(*x, curved, **k)):
        with pytest.raises(ValueError, match="temperature"):
            function(hidden, weight, tokens, bias=bias, temperature=0.0)
        with pytest.raises(ValueError, match="chunk_size"):
            function(hidden, weight, tokens, bias=bias, chunk_size=0)
        with pytest.raises(RuntimeError, match="index -100"):  # no label to ignore here
            function(hidden, weight, torch.full_like(tokens, -100), bias=bias)

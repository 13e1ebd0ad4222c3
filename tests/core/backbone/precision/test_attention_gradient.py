"""Attention in bfloat16 on a CPU: torch's forward pass to the bit, and gradients nearly as exact,
against attention written out in float64."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rlhf_core.backbone.precision import attention


def drawn(length, heads=(4, 4), seed=0):
    draws = torch.Generator().manual_seed(seed)
    shapes = [(3, heads[0], length, 16), *[(3, heads[1], length, 16)] * 2]
    return [torch.randn(shape, generator=draws).bfloat16().float() for shape in shapes]


def exact(inputs, scale, upstream):
    """The gradients of causal attention, by its formula in float64."""
    query, key, value = (x.double().requires_grad_() for x in inputs)
    groups = query.shape[1] // key.shape[1]
    wide_key, wide_value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = scale * query @ wide_key.transpose(-1, -2)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    ((weights @ wide_value).transpose(1, 2) * upstream).sum().backward()
    return [x.grad for x in (query, key, value)]


def apart(found, expected):
    gaps = [(a.double() - b).square().sum() for a, b in zip(found, expected, strict=True)]
    return float((sum(gaps) / sum(b.square().sum() for b in expected)).sqrt())


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_forward_is_that_of_torch_and_gradients_are_nearly_as_exact(length, heads, scale):
    inputs = drawn(length, heads)
    upstream = torch.randn(3, length, heads[0], 16, generator=torch.Generator().manual_seed(1))
    upstream = upstream.bfloat16()

    def run(function):
        leaves = [x.bfloat16().requires_grad_() for x in inputs]
        out = function(*leaves)
        (out * upstream).sum().backward()
        return out, [x.grad for x in leaves]

    def torchs(query, key, value):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        return mixed.transpose(1, 2)

    ours, gradients = run(lambda *leaves: attention.attend(*leaves, scale))
    theirs, their_gradients = run(torchs)
    assert torch.equal(ours, theirs)
    expected = exact(inputs, 16**-0.5 if scale is None else scale, upstream.double())
    assert apart(gradients, expected) < 0.01
    assert apart(gradients, expected) < 2.5 * apart(their_gradients, expected) + 1e-6


@pytest.mark.parametrize(
    ("length", "autocast", "grad", "taken"),
    [
        (256, torch.bfloat16, True, True),
        (257, torch.bfloat16, True, False),
        (8, None, True, False),
        (8, torch.float16, True, False),
        (8, torch.bfloat16, False, False),
    ],
)
def test_it_is_for_training_in_bfloat16_on_texts_that_are_not_long(length, autocast, grad, taken):
    query = torch.zeros(1, 1, length, 4)
    enabled = autocast is not None
    with (
        torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=enabled),
        torch.set_grad_enabled(grad),
    ):
        assert attention.takes(query) is taken
    assert not attention.takes(query)
    assert not attention.takes(torch.zeros(1, 1, 8, 4, device="meta"))

"""Packed, shared or alone: the same hidden states, and the same gradient of every weight."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import Gemma2Config, Gemma2Model, MistralConfig, MistralModel

from rlhf_core.backbone.packing import ATTENTION, hidden_states, pack
from rlhf_core.data.encoding import left_pad, right_pad
from rlhf_core.errors import ModelError

A, B, C = [20, 30, 40, 50, 60, 70, 80, 90], [21, 31, 41], [22, 32, 42, 52, 62, 72]
CASES = {
    "one text": [A],
    "unequal lengths": [A, B, C, list(range(100, 120))],
    "one token": [[7]],
    "one-token texts among others": [[7], A, [8], [9]],
    "equal texts": [A, A, A],
    "a text and its beginning": [A, A[:3]],
    "a beginning and its text": [A[:1], A[:3], A],
    "answers to one prompt": [[*A, 1, 2], [*A, 3], [*A, 1, 5, 6, 7, 8, 9, 10]],
    "alike but for the first token": [[5, *A], [6, *A]],
    "alike, but not neighbours": [A, B, A],
    "a pair and a pair": [[*A, 1], [*A, 2, 3], [*C, 1], [*C, 4, 5]],
    "all of one length": [A, A[::-1], [*B, *B, 1, 2]],
}


@pytest.fixture(params=["gpt2", "llama", "mistral"])
def body(request):
    """Absolute positions; rotary positions and grouped queries; a window shorter than the texts."""
    return request.getfixturevalue(request.param)[0].base_model


def packed_states(body, texts):
    """Hidden states of each text, out of a packed row."""
    packed = pack(texts, "cpu")
    states = hidden_states(body, packed)
    return [
        states[rows[: len(text)]] for rows, text in zip(packed.unpack_index, texts, strict=True)
    ]


def states_alone(body, texts):
    return [body(torch.tensor([text])).last_hidden_state[0] for text in texts]


def gradient(body, states):
    """Of a loss that weighs every number differently."""
    draws = torch.Generator().manual_seed(3)
    weights = [torch.randn(s.shape, generator=draws) for s in states]
    body.zero_grad()
    sum((s * w).sum() for s, w in zip(states, weights, strict=True)).backward()
    return {name: p.grad for name, p in body.named_parameters()}


@pytest.mark.parametrize("texts", CASES.values(), ids=CASES)
def test_states_and_gradients_are_those_of_each_text_alone(body, plain, texts):
    eager = plain(body)
    ours, theirs = packed_states(body, texts), states_alone(eager, texts)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)
    found, expected = gradient(body, ours), gradient(eager, theirs)
    scale = max(g.abs().max() for g in expected.values())  # rounding grows with the largest
    for name, grad in expected.items():
        assert_close(found[name] / scale, grad / scale, rtol=0, atol=2e-6, msg=name)


@functools.cache
def small():
    """A body for the property test: it looks back three tokens, so that windows count too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MistralModel(
            MistralConfig(
                vocab_size=4,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                sliding_window=3,
                initializer_range=0.5,
                bos_token_id=None,
                eos_token_id=None,
                attn_implementation=ATTENTION,
            )
        ).eval()


# Four tokens: beginnings in common are frequent, of any length.
SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=6)


@given(SEQUENCES)
@settings(max_examples=60, deadline=None)
def test_any_texts_come_back_whole_and_read_as_if_alone(plain, texts):
    packed = pack(texts, "cpu")
    at = [rows[: len(text)] for rows, text in zip(packed.unpack_index, texts, strict=True)]
    assert [packed.input_ids[0, rows].tolist() for rows in at] == texts
    assert [packed.position_ids[0, rows].tolist() for rows in at] == [
        list(range(len(text))) for text in texts
    ]
    assert packed.last().tolist() == [rows[-1].item() for rows in at]
    with torch.no_grad():
        alone = states_alone(plain(small()), texts)
        for one, other in zip(packed_states(small(), texts), alone, strict=True):
            assert_close(one, other, rtol=1e-4, atol=1e-5)


@given(SEQUENCES)
def test_row_holds_what_neighbours_do_not_share(texts):
    def common(one, other):
        return next((i for i in range(len(other)) if one[: i + 1] != other[: i + 1]), len(other))

    shared = sum(common(one, other) for one, other in itertools.pairwise(texts))
    packed = pack(texts, "cpu")
    assert packed.input_ids.shape == (1, sum(map(len, texts)) - shared)
    assert packed.dense == (len({len(text) for text in texts}) == 1 and not shared)


# --- where a token is predicted ---


def test_layout_by_hand():
    packed = pack([[5, 6, 7], [5, 6, 8, 9], [4]], "cpu")
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 4]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2, 3, 0]]
    assert packed.unpack_index.tolist() == [[0, 1, 2, 0], [0, 1, 3, 4], [5, 0, 0, 0]]
    assert packed.pack_index.tolist() == [0, 1, 2, 6, 7, 8]
    assert packed.lengths.tolist() == [3, 4, 1]
    assert packed.last().tolist() == [2, 4, 5]


def test_predictions_by_hand():
    # 7 is predicted by the 6 at place 1, as are 8 and, from 8 at place 3, 9; 4 stands alone.
    packed = pack([[5, 6, 7], [5, 6, 8, 9], [4]], "cpu")
    positions, tokens = packed.predictions(torch.tensor([2, 2, 1]))
    assert (positions.tolist(), tokens.tolist()) == ([1, 1, 3], [7, 8, 9])
    positions, tokens = packed.predictions(torch.tensor([1, 3, 1]))
    assert (positions.tolist(), tokens.tolist()) == ([0, 1, 3], [6, 7, 9])


def test_nothing_is_predicted_in_a_text_of_one_token():
    positions, tokens = pack([[5], [6]], "cpu").predictions(torch.tensor([1, 1]))
    assert positions.numel() == tokens.numel() == 0


# --- what is refused, and what stays as it was ---


def test_attention_with_another_option_is_refused():
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 100}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    body = Gemma2Model(Gemma2Config(**size, **heads, attn_implementation=ATTENTION))
    with pytest.raises(
        ModelError, match="has the option 'softcap', which packed attention does not follow"
    ):
        hidden_states(body, pack([A, B], "cpu"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_model_used_the_ordinary_way_is_an_ordinary_model(body, plain, side):
    texts = [A, B, [7], list(range(100, 112))]
    if side == "left":
        batch = left_pad(texts, 1, 99)
        ids, mask = batch.input_ids, batch.mask
    else:
        ids, mask = right_pad(texts, 1)
    with torch.no_grad():
        ours, theirs = (
            model(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask]
            for model in (body, plain(body))
        )
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

"""Packed, padded or one by one: the same sum over the same tokens, with the same gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_core.batching import Example, packed_rows, padded_rows, text_batches, text_nll

PAD = 1


def example(length, untrained, seed):
    draws = torch.Generator().manual_seed(seed)
    return Example(torch.randint(2, 250, (length,), generator=draws).tolist(), untrained)


LENGTHS = [(10, 3), (7, 0), (5, 2), (12, 6), (3, 1), (20, 5), (4, 3)]
EXAMPLES = [example(length, untrained, i) for i, (length, untrained) in enumerate(LENGTHS)]


def total_and_gradient(model, rows, size):
    """Summed loss over the rows, `size` of them in a forward pass, its tokens and its gradient."""
    model.zero_grad()
    total = tokens = 0
    for batch in text_batches(rows, size, PAD, "cpu"):
        part = text_nll(model, batch)
        part.total.backward()
        total, tokens = total + part.total.detach(), tokens + part.tokens.item()
    return total, tokens, torch.cat([p.grad.flatten() for p in model.parameters()])


def one_by_one(model, examples):
    """The definition, in plain words: each text alone, each token given all tokens before it."""
    model.zero_grad()
    total = 0
    for ids, untrained in examples:
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(max(untrained, 1), len(ids)):
            total = total - logprobs[place - 1, ids[place]]
    total.backward()
    return total.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("rows", [packed_rows(EXAMPLES, 24), padded_rows(EXAMPLES)])
@pytest.mark.parametrize("size", [1, 3, 99])
def test_loss_and_gradient_are_those_of_the_texts_one_by_one(causal, rows, size):
    total, tokens, gradient = total_and_gradient(causal[0], rows, size)
    expected, expected_gradient = one_by_one(causal[0], EXAMPLES)
    assert tokens == 7 + 6 + 3 + 6 + 2 + 15 + 1
    assert_close(total, expected, rtol=1e-5, atol=1e-5)
    # Rounding grows with the largest of the gradients that are added up, not with each of them.
    scale = expected_gradient.abs().max()
    assert_close(gradient / scale, expected_gradient / scale, rtol=0, atol=1e-6)


def test_a_packed_text_sees_nothing_of_its_neighbours(causal):
    model = causal[0]
    first, second = example(9, 0, 1), example(8, 0, 2)
    (row,) = packed_rows([first, second], 17)
    (batch,) = text_batches([row], 1, PAD, "cpu")
    inputs = {"position_ids": batch.position_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        packed = model(input_ids=batch.input_ids, **inputs).logits[0]
        for ids, place in ((first.ids, slice(0, 9)), (second.ids, slice(9, 17))):
            assert_close(packed[place], model(torch.tensor([ids])).logits[0], rtol=1e-5, atol=1e-5)


def test_what_stands_in_the_padding_does_not_matter(causal):
    rows = padded_rows(EXAMPLES)
    (batch,) = text_batches(rows, 99, PAD, "cpu")
    (other,) = text_batches(rows, 99, 77, "cpu")
    assert not torch.equal(batch.input_ids, other.input_ids)
    with torch.no_grad():
        assert_close(text_nll(causal[0], batch).total, text_nll(causal[0], other).total)


def test_labels_are_the_completion_alone():
    (batch,) = text_batches(padded_rows([Example([5, 6, 7, 8], 2)]), 1, PAD, "cpu")
    assert batch.labels.tolist() == [[-100, -100, 7, 8]]


def test_with_the_prompt_all_tokens_but_the_first_are_targets():
    (batch,) = text_batches(padded_rows([Example([5, 6, 7, 8], 0)]), 1, PAD, "cpu")
    assert batch.labels.tolist() == [[-100, 6, 7, 8]]


def test_first_token_of_a_packed_text_is_no_target_and_positions_start_again():
    rows = packed_rows([Example([5, 6, 7], 0), Example([8, 9], 0)], 6)
    (batch,) = text_batches(rows, 1, PAD, "cpu")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]


def test_pad_token_within_a_text_is_trained_on_like_any_other():
    (batch,) = text_batches(padded_rows([Example([5, PAD, 7], 1), Example([8], 0)]), 2, PAD, "cpu")
    assert batch.labels.tolist() == [[-100, PAD, 7], [-100, -100, -100]]


@pytest.mark.parametrize("untrained", [0, 1, 3])
def test_targets_are_the_labels_that_count(untrained):
    text = Example([5, 6, 7, 8], untrained)
    (batch,) = text_batches([[text]], 1, PAD, "cpu")
    assert text.targets == (batch.labels != -100).sum() == 4 - max(untrained, 1)


def test_rows_are_filled_with_the_longest_first():
    # 10: [5, 4], [3, 3, 3]; in the order given it would take three rows.
    texts = [example(n, 0, n) for n in (3, 5, 3, 4, 3)]
    rows = packed_rows(texts, 10)
    assert [[len(text.ids) for text in row] for row in rows] == [[5, 4], [3, 3, 3]]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(12, 40))
@settings(max_examples=50)
def test_packing_keeps_every_text_once_within_the_length(sizes, length):
    texts = [example(size, 0, i) for i, size in enumerate(sizes)]
    rows = packed_rows(texts, length)
    assert sorted(text for row in rows for text in row) == sorted(texts)
    assert all(0 < sum(len(text.ids) for text in row) <= length for row in rows)
    # First fit leaves no two rows that would go into one.
    halves = sum(sum(len(text.ids) for text in row) <= length / 2 for row in rows)
    assert halves <= 1

"""Encoded examples to tensors: padded rows, or packed rows with several examples in each.

Packing changes the speed and not the result: an example sees no other example, its positions start
at 0, and its first token is predicted from nothing, so it is no target.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.functional.losses import IGNORE_INDEX, TokenNLL, completion_nll


class Example(NamedTuple):
    """One training text: its tokens, and how many at the start are not trained on."""

    ids: list[int]
    untrained: int

    @property
    def targets(self) -> int:
        """Tokens that the loss counts."""
        return len(self.ids) - max(self.untrained, 1)


class TextBatch(NamedTuple):
    """Rows of tokens as a causal model takes them."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64, -100 where a token is not trained on
    position_ids: Tensor  # (B, T) int64, from 0 in every example
    attention_mask: Tensor  # (B, 1, T, T) float, 0 where a query may look and -inf elsewhere


def padded_rows(examples: Sequence[Example]) -> list[list[Example]]:
    """One example a row."""
    return [[example] for example in examples]


def packed_rows(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Rows of at most `length` tokens, filled first-fit with the longest examples first."""
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        size = len(example.ids)
        place = next((i for i, free in enumerate(room) if free >= size), None)
        if place is None:
            rows.append([])
            room.append(max(length, size))
            place = -1
        rows[place].append(example)
        room[place] -= size
    return rows


def text_batches(
    rows: Sequence[list[Example]], size: int, pad_token_id: int, device: str
) -> Iterator[TextBatch]:
    """Rows, `size` at a time, as tensors on the device."""
    for start in range(0, len(rows), size):
        batch = _collate(rows[start : start + size], pad_token_id)
        yield TextBatch(*(tensor.to(device) for tensor in batch))


def text_nll(model: PreTrainedModel, batch: TextBatch) -> TokenNLL:
    """Summed negative log-likelihood (nats) of the labelled tokens of a batch, and their count.

    The head runs only on columns in which some row has a target.
    """
    targets = batch.labels[:, 1:]
    columns = (targets != IGNORE_INDEX).any(0).nonzero().squeeze(-1)
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=columns,
    ).logits
    return completion_nll(logits, targets[:, columns])


def _collate(rows: Sequence[list[Example]], pad_token_id: int) -> TextBatch:
    width = max(sum(len(example.ids) for example in row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id)
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    positions = torch.zeros((len(rows), width), dtype=torch.long)
    owner = torch.full((len(rows), width), -1)  # which example of its row a token belongs to
    for r, row in enumerate(rows):
        start = 0
        for number, (tokens, untrained) in enumerate(row):
            end, first = start + len(tokens), start + max(untrained, 1)
            ids[r, start:end] = torch.tensor(tokens)
            labels[r, first:end] = ids[r, first:end]
            positions[r, start:end] = torch.arange(len(tokens))
            owner[r, start:end] = number
            start = end
    return TextBatch(ids, labels, positions, _attention(owner))


def _attention(owner: Tensor) -> Tensor:
    """(B, T) owners -> (B, 1, T, T): a token looks back within its own example.

    Padding looks at padding: a query that may look at nothing would give NaN.
    """
    same = owner.unsqueeze(-1) == owner.unsqueeze(-2)
    visible = (same & torch.ones_like(same).tril()).unsqueeze(1)
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)

"""Pack several texts into one row of tokens: no padding, and a shared prefix is computed once.

Every linear layer of a transformer works on tokens one by one, so texts can be concatenated in a
single row; only attention has to know which tokens belong together. `packed_attention` unpacks the
row into sequences, padded on the right under a causal mask, and packs the results again. Sequences
with a shared prefix (chosen and rejected of a pair, the samples of one prompt) share its tokens,
since a causal model computes the same for them.

This module knows nothing about what is predicted, or why. The result equals that of each text
computed separately, to rounding.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf_core.data.pairs import Pair
from rlhf_core.errors import ModelError

ATTENTION = "rlhf_packed"


@dataclass(frozen=True)
class SharedStates:
    """The hidden states that enter the first block with an adapter, computed once.

    Networks that share a body whose lower blocks have no adapters share these states, which do not
    change while the adapters train.
    """

    body: PreTrainedModel
    depth: int  # index of the block that the states enter
    states: Tensor  # (N, d)


@dataclass(frozen=True)
class Packed:
    """S sequences in one row of N tokens.

    `unpack_index` maps each token of a sequence to its position in the row; `pack_index` maps each
    token of the row to its position in the padded (S, L) block.
    """

    input_ids: Tensor  # (1, N) int64
    position_ids: Tensor  # (1, N) int64, from 0 in every sequence
    unpack_index: Tensor  # (S, L) int64 positions in the row; 0 after the end of a sequence
    pack_index: Tensor  # (N,) int64 positions in the flattened (S, L) block
    lengths: Tensor  # (S,) int64, tokens
    dense: bool  # equal lengths and no shared prefix: the row is the flattened block
    shared: SharedStates | None = None

    def last(self) -> Tensor:
        """(S,) position of the last token of each sequence."""
        return self.unpack_index.gather(1, self.lengths.unsqueeze(1) - 1).squeeze(1)

    def predictions(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens from `starts` on and the positions that predict them, text by text.

        A token is predicted at the position before it, so the first token of a text never is.

        Args:
            starts: (S,) index of the first predicted token of each sequence, at least 1.

        Returns: (M,) positions in the row and (M,) token ids.
        """
        columns = torch.arange(self.unpack_index.shape[1], device=self.unpack_index.device)
        wanted = (columns >= starts.unsqueeze(1)) & (columns < self.lengths.unsqueeze(1))
        tokens = self.input_ids[0, self.unpack_index[wanted]]
        return self.unpack_index[:, :-1][wanted[:, 1:]], tokens

    def unpack(self, states: Tensor) -> Tensor:
        """(N, d) states of the row -> (S, L, d) of each sequence; 0 after its end."""
        columns = torch.arange(self.unpack_index.shape[1], device=self.unpack_index.device)
        inside = columns < self.lengths.unsqueeze(1)
        return torch.where(inside.unsqueeze(-1), states[self.unpack_index], 0)

    def repack(self, states: Tensor) -> Tensor:
        """(S, ≥ L, d) states of each sequence -> (N, d) of the row."""
        length = self.unpack_index.shape[1]
        return states[:, :length].flatten(0, 1)[self.pack_index]


def pack(sequences: Sequence[Sequence[int] | np.ndarray], device: torch.device | str) -> Packed:
    """Concatenate sequences of token ids; adjacent sequences share their common prefix."""
    lengths = [len(ids) for ids in sequences]
    unpack_index = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    tokens, positions, pack_index = [], [], []
    filled, before = 0, np.zeros(0, dtype=np.int64)
    for s, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        ids = np.asarray(sequence, dtype=np.int64)
        common = _common_prefix(before, ids)
        unpack_index[s, :common] = unpack_index[s - 1, :common]
        unpack_index[s, common:length] = np.arange(filled, filled + length - common)
        columns = np.arange(common, length)
        tokens.append(ids[common:])
        positions.append(columns)
        pack_index.append(s * unpack_index.shape[1] + columns)
        filled, before = filled + length - common, ids
    moved = (
        torch.from_numpy(array).to(device)
        for array in (*map(np.concatenate, (tokens, positions, pack_index)), unpack_index)
    )
    input_ids, position_ids, to_row, to_block = moved
    return Packed(
        input_ids.unsqueeze(0),
        position_ids.unsqueeze(0),
        to_block,
        to_row,
        torch.tensor(lengths, device=device),
        dense=filled == unpack_index.size,
    )


def hidden_states(body: PreTrainedModel, packed: Packed) -> Tensor:
    """(N, d) last hidden states of a transformer body over a packed row."""
    shared = packed.shared
    if shared is None or shared.body is not body:
        return _run(body, packed)
    name, stack = blocks(body)
    states = shared.states.unsqueeze(0)
    entry = stack[shared.depth].register_forward_pre_hook(
        lambda _, inputs, options: ((states, *inputs[1:]), options), with_kwargs=True
    )
    with _with_blocks(body, name, stack[shared.depth :]), entry:
        return _run(body, packed)


@torch.no_grad()
def shared_states(body: PreTrainedModel, packed: Packed, depth: int) -> SharedStates:
    """The states that enter block `depth`, computed by the blocks before it."""
    name, stack = blocks(body)
    found: list[Tensor] = []
    leave = stack[depth - 1].register_forward_hook(
        lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with _with_blocks(body, name, stack[:depth]), leave:
        _run(body, packed)
    return SharedStates(body, depth, found[0][0])


def blocks(body: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The stack of blocks of a transformer body, and its name there.

    Raises: ModelError when it has none.
    """
    for name, child in body.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == body.config.num_hidden_layers:
            return name, child
    raise ModelError(f"{type(body).__name__} has no stack of blocks; use another family")


@contextmanager
def _with_blocks(body: PreTrainedModel, name: str, some: nn.ModuleList) -> Iterator[None]:
    """Run the body with only some of its blocks."""
    whole = getattr(body, name)
    setattr(body, name, some)
    try:
        yield
    finally:
        setattr(body, name, whole)


def _run(body: Any, packed: Packed) -> Tensor:
    states = body(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        # transformers takes a 4-d mask as it is, and builds none over the whole row.
        attention_mask=packed.input_ids.new_zeros(1, 1, 1, 1),
        use_cache=False,
        packed=packed,
    ).last_hidden_state
    return cast(Tensor, states)[0]


class Memory(Protocol):
    """Keys and values of earlier tokens, while a text is being sampled."""

    def extend(
        self, layer: int, key: Tensor, value: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append (B, H, n, D) keys and values; return all of them and the attention mask.

        `window` is how far back the layer attends, None for all the way.
        """


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed | None = None,
    memory: Memory | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention within each sequence of a packed row, or over a memory; plain SDPA otherwise.

    Shapes: query (1, H, N, D), key and value (1, H_kv, N, D) -> (1, N, H, D).

    Raises: ModelError for models with capped attention scores, which SDPA does not support.
    """
    if options.get("softcap") is not None:
        raise ModelError(
            "this model caps its attention scores, which is not supported; use another family"
        )
    window: int | None = options.get("sliding_window")
    if memory is not None:
        layer = cast(int, module.layer_idx)
        key, value, attention_mask = memory.extend(layer, key, value, window)
    if packed is None:
        mixed, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return mixed, None
    unpacked = (_unpack_heads(x, packed) for x in (query, key, value))
    mask = _window(packed.unpack_index.shape[1], window, query.device)
    mixed, _ = sdpa_attention_forward(module, *unpacked, mask, **options)
    if packed.dense:
        return mixed.reshape(1, -1, *mixed.shape[2:]), None
    repacked = embedding(packed.pack_index, mixed.flatten(2).flatten(0, 1))
    return repacked.view(1, -1, *mixed.shape[2:]), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _common_prefix(ours: np.ndarray, theirs: np.ndarray) -> int:
    """The length of the common prefix of two sequences, in tokens."""
    shortest = min(len(ours), len(theirs))
    differ = ours[:shortest] != theirs[:shortest]
    return int(differ.argmax()) if differ.any() else shortest


def _unpack_heads(x: Tensor, packed: Packed) -> Tensor:
    """(1, H, N, D) -> (S, H, L, D): one row for each sequence, padded on the right.

    `embedding` gathers rows, and sums their gradient fast and in a fixed order.
    """
    flat = x[0].transpose(0, 1).flatten(1)
    unpacked: Tensor = flat if packed.dense else embedding(packed.unpack_index, flat)
    return unpacked.view(*packed.unpack_index.shape, x.shape[1], x.shape[3]).transpose(1, 2)


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """(L, L) mask of a sliding window; None when the causal mask is enough."""
    if window is None or length <= window:
        return None
    positions = torch.arange(length, device=device)
    back = positions.unsqueeze(1) - positions
    return ((back >= 0) & (back < window)).view(1, 1, length, length)


def pack_pairs(pairs: Sequence[Pair], device: torch.device) -> Packed:
    """Chosen and rejected texts alternate, so that the prompt of a pair is computed once."""
    return pack([ids for pair in pairs for ids in (pair.chosen, pair.rejected)], device)


def position_ids(mask: Tensor) -> Tensor:
    """(B, T) mask -> (B, T) position of each token among the unmasked ones."""
    return mask.long().cumsum(-1).sub(1).clamp(min=0)

"""Pack several texts into one row of tokens: no padding, and a shared prefix is computed once.

Every linear layer of a transformer works on tokens one by one, so texts can be concatenated in a
single row; only attention has to know which tokens belong together. `packed_attention` unpacks the
row into sequences, padded on the right under a causal mask, and packs the results again. Sequences
with a shared prefix (chosen and rejected of a pair, the samples of one prompt) share its tokens,
since a causal model computes the same for them.

Models for which this would be wrong (their layers carry a state from token to token, say, or their
attention does more than SDPA) compute the same sequences as a padded block, with their own
attention: slower, and nothing is shared. `load_check` finds out which way a model goes.

This module knows nothing about what is predicted, or why. The result equals that of each text
computed separately, to rounding.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
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

from rlhf_core.backbone.context import require_rope
from rlhf_core.backbone.precision import attention as narrow
from rlhf_core.data.pairs import Pair
from rlhf_core.errors import ModelError

ATTENTION = "rlhf_packed"
UNMASKED = (
    1,
    1,
    1,
    1,
)  # transformers takes a 4-d mask as it is, and builds none over the whole row


@dataclass(frozen=True)
class SharedStates:
    """The hidden states that enter the first block with an adapter, computed once.

    Networks that share a body whose lower blocks have no adapters share these states, which do not
    change while the adapters train.
    """

    body: PreTrainedModel
    depth: int  # index of the block that the states enter
    states: Tensor  # (N, d)
    in_tuple: bool = False  # blocks of this body return their states in a tuple


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


def is_packed(body: PreTrainedModel) -> bool:
    """Whether a body computes packed rows; otherwise it computes padded blocks."""
    return bool(body.config._attn_implementation == ATTENTION)


def hidden_states(body: PreTrainedModel, packed: Packed) -> Tensor:
    """(N, d) last hidden states of a transformer body over a packed row.

    Raises: ConfigError when a text is longer than the body's rope allows: see `require_rope`.
    """
    require_rope(body.config, packed.unpack_index.shape[1])
    if not is_packed(body):
        return _run_padded(body, packed)
    shared = packed.shared
    if shared is None or shared.body is not body:
        return _run(body, packed)
    owner, name, stack = _stack(body)
    states = shared.states.unsqueeze(0)
    below = [_Computed(block, states, shared.in_tuple) for block in stack[: shared.depth]]
    with _with_blocks(owner, name, nn.ModuleList([*below, *stack[shared.depth :]])):
        return _run(body, packed)


@torch.no_grad()
def shared_states(body: PreTrainedModel, packed: Packed, depth: int) -> SharedStates:
    """The states that enter block `depth`, computed by the blocks before it."""
    owner, name, stack = _stack(body)
    found: list[Any] = []
    leave = stack[depth - 1].register_forward_hook(lambda _, __, out: found.append(out))
    with _with_blocks(owner, name, stack[:depth]), leave:
        _run(body, packed)
    in_tuple = isinstance(found[0], tuple)
    return SharedStates(body, depth, (found[0][0] if in_tuple else found[0])[0], in_tuple)


def blocks(body: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The stack of blocks of a transformer body, and its name there.

    Raises: ModelError when it has none.
    """
    owner, name, stack = _stack(body)
    path = next(path for path, module in body.named_modules() if module is owner)
    return f"{path}.{name}" if path else name, stack


def _stack(body: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """The stack of blocks, the module that holds it, and its name there.

    It is found where the text decoder is: in a multimodal model an encoder of images may have as
    many blocks.
    """
    text = body.config.get_text_config(decoder=True)
    for module in (body.get_decoder() or body).modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == text.num_hidden_layers:
                return module, name, child
    raise ModelError(f"{type(body).__name__} has no stack of blocks; use another family")


class _Computed(nn.Module):
    """Stands in for a block below the adapters: returns the states that were computed before.

    Bodies ask a block for its attributes and count its place in the stack, so it has both.
    """

    def __init__(self, block: nn.Module, states: Tensor, in_tuple: bool) -> None:
        super().__init__()
        self._of = [block]  # in a list, so that it is no child
        self._out = (states,) if in_tuple else states

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_of"][0], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        """The states that enter the first block with an adapter."""
        return self._out


@contextmanager
def _with_blocks(owner: nn.Module, name: str, some: nn.ModuleList) -> Iterator[None]:
    """Run the body with other blocks."""
    whole = getattr(owner, name)
    setattr(owner, name, some)
    try:
        yield
    finally:
        setattr(owner, name, whole)


def _run(body: Any, packed: Packed) -> Tensor:
    states = body(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        attention_mask=packed.input_ids.new_zeros(UNMASKED),
        use_cache=False,
        packed=packed,
    ).last_hidden_state
    return cast(Tensor, states)[0]


def _run_padded(body: Any, packed: Packed) -> Tensor:
    """The same states from a block of sequences padded on the right, with the body's attention."""
    columns = torch.arange(packed.unpack_index.shape[1], device=packed.unpack_index.device)
    inside = columns < packed.lengths.unsqueeze(1)
    states = body(
        input_ids=packed.input_ids[0][packed.unpack_index],
        attention_mask=inside.long(),
        use_cache=False,
        **with_positions(body, columns.expand_as(inside)),
    ).last_hidden_state
    return packed.repack(cast(Tensor, states))


def with_positions(body: Any, positions: Tensor) -> dict[str, Tensor]:
    """The argument for positions, if the body has one; others count unmasked tokens themselves."""
    known = inspect.signature(body.forward).parameters
    return {"position_ids": positions} if "position_ids" in known else {}


class Memory(Protocol):
    """Keys and values of earlier tokens, while a text is being sampled."""

    def extend(
        self, layer: int, key: Tensor, value: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append (B, H, n, D) keys and values; return all of them and the attention mask.

        `window` is how far back the layer attends, None for all the way.
        """


# Options of an attention function that packed attention follows, or that change no number without
# training dropout, a cache or an output of weights.
_FOLLOWED = {"scaling", "sliding_window", "dropout", "is_causal"}
_WITHOUT_EFFECT = {"position_ids", "cache_position", "use_cache", "past_key_values", "layer_idx"}
_OFF = (None, False)  # values of any other option that ask for nothing


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

    Raises: ModelError for a model that asks for more than a causal mask and a window: capped
    scores, attention sinks, a mask of its own.
    """
    _require_known(module, options)
    window: int | None = options.get("sliding_window")
    if memory is not None:
        layer = cast(int, module.layer_idx)
        key, value, attention_mask = memory.extend(layer, key, value, window)
    if packed is None:
        mixed, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return mixed, None
    if attention_mask is not None and attention_mask.shape != UNMASKED:
        raise ModelError(f"{type(module).__name__} makes a mask of its own")
    q, k, v = (_unpack_heads(x, packed) for x in (query, key, value))
    mixed = _causal(module, q, k, v, window, options)
    if packed.dense:
        return mixed.reshape(1, -1, *mixed.shape[2:]), None
    repacked = embedding(packed.pack_index, mixed.flatten(2).flatten(0, 1))
    return repacked.view(1, -1, *mixed.shape[2:]), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _require_known(module: nn.Module, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        known = name in _FOLLOWED or name in _WITHOUT_EFFECT
        if not (known or any(value is off for off in _OFF)):
            raise ModelError(
                f"{type(module).__name__} has the option '{name}', which packed attention does not "
                "follow"
            )
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ModelError(f"{type(module).__name__} also attends to later tokens")


def _causal(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    options: Mapping[str, Any],
) -> Tensor:
    """(S, H, L, D) queries -> (S, L, H, D): causal attention that looks back `window` tokens.

    A window is computed in bands of as many queries, each with the keys it can see, so that memory
    grows with L and not with its square.
    """
    length = query.shape[2]
    if window is None or length <= window:
        if narrow.takes(query):
            return narrow.attend(query, key, value, options.get("scaling"))
        return cast(Tensor, sdpa_attention_forward(module, query, key, value, None, **options)[0])
    bands = []
    for start in range(0, length, window):
        end, first = min(start + window, length), max(start - window + 1, 0)
        at = torch.arange(first, end, device=query.device)
        back = at[start - first :].unsqueeze(1) - at
        mask = ((back >= 0) & (back < window)).view(1, 1, end - start, end - first)
        seen = (x[:, :, first:end] for x in (key, value))
        band, _ = sdpa_attention_forward(module, query[:, :, start:end], *seen, mask, **options)
        bands.append(band)
    return torch.cat(bands, dim=1)


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


def pack_pairs(pairs: Sequence[Pair], device: torch.device) -> Packed:
    """Chosen and rejected texts alternate, so that the prompt of a pair is computed once."""
    return pack([ids for pair in pairs for ids in (pair.chosen, pair.rejected)], device)


def position_ids(mask: Tensor) -> Tensor:
    """(B, T) mask -> (B, T) position of each token among the unmasked ones."""
    return mask.long().cumsum(-1).sub(1).clamp(min=0)

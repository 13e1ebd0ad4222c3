"""Several texts as one row of tokens: no padding, and a common beginning is computed once.

Every linear layer of a transformer works on tokens one by one, so texts can lie behind one another
in a single row; only attention has to know which tokens belong together. `packed_attention` tells
it: it takes the tokens of each sequence apart, padded on the right under a causal mask, and puts
the results back. Sequences that begin alike (chosen and rejected of a pair, the samples of one
prompt) share those tokens, as a causal model says the same of them.

Knows nothing about what is predicted, or why. The result is that of each text alone, to rounding.
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
class Below:
    """What has been computed already: the states that go into one of the blocks of a body.

    Where several networks share a body whose lower blocks have no adapters, this is the same for
    all of them, and it does not change while the adapters learn.
    """

    body: PreTrainedModel
    depth: int  # the block that the states go into
    states: Tensor  # (N, d)


@dataclass(frozen=True)
class Packed:
    """S sequences in one row of N tokens.

    `rows` says where in the row each token of a sequence lies, `home` from which place of the
    padded (S, L) block a token of the row takes its result.
    """

    input_ids: Tensor  # (1, N) int64
    position_ids: Tensor  # (1, N) int64, from 0 in every sequence
    rows: Tensor  # (S, L) int64; 0 behind the end of a sequence
    home: Tensor  # (N,) int64
    lengths: Tensor  # (S,) int64, tokens
    dense: bool  # all of one length and nothing shared: the row is the block
    below: Below | None = None

    def last(self) -> Tensor:
        """(S,) place of the last token of each sequence."""
        return self.rows.gather(1, self.lengths.unsqueeze(1) - 1).squeeze(1)

    def predictions(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Where the tokens from `starts` on are predicted and which they are, text by text.

        A token is predicted one place before it, so the first token of a text never is.

        Args:
            starts: (S,) index of the first predicted token of each sequence, at least 1.

        Returns: (M,) places in the row and (M,) token ids.
        """
        columns = torch.arange(self.rows.shape[1], device=self.rows.device)
        wanted = (columns >= starts.unsqueeze(1)) & (columns < self.lengths.unsqueeze(1))
        return self.rows[:, :-1][wanted[:, 1:]], self.input_ids[0, self.rows[wanted]]

    def spread(self, states: Tensor) -> Tensor:
        """(N, d) states of the row -> (S, L, d) of each sequence; 0 behind its end."""
        columns = torch.arange(self.rows.shape[1], device=self.rows.device)
        inside = columns < self.lengths.unsqueeze(1)
        return torch.where(inside.unsqueeze(-1), states[self.rows], 0)

    def collect(self, states: Tensor) -> Tensor:
        """(S, ≥ L, d) states of each sequence -> (N, d) of the row."""
        length = self.rows.shape[1]
        return states[:, :length].flatten(0, 1)[self.home]


def pack(sequences: Sequence[Sequence[int] | np.ndarray], device: torch.device | str) -> Packed:
    """Lay sequences of token ids behind one another; neighbours share the beginning they have in
    common."""
    lengths = [len(ids) for ids in sequences]
    rows = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    tokens, positions, home = [], [], []
    filled, before = 0, np.zeros(0, dtype=np.int64)
    for s, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        ids = np.asarray(sequence, dtype=np.int64)
        common = _common(before, ids)
        rows[s, :common] = rows[s - 1, :common]
        rows[s, common:length] = np.arange(filled, filled + length - common)
        columns = np.arange(common, length)
        tokens.append(ids[common:])
        positions.append(columns)
        home.append(s * rows.shape[1] + columns)
        filled, before = filled + length - common, ids
    moved = (
        torch.from_numpy(array).to(device)
        for array in (*(np.concatenate(part) for part in (tokens, positions, home)), rows)
    )
    input_ids, position_ids, homes, places = moved
    return Packed(
        input_ids.unsqueeze(0),
        position_ids.unsqueeze(0),
        places,
        homes,
        torch.tensor(lengths, device=device),
        dense=filled == rows.size,
    )


def hidden_states(body: PreTrainedModel, packed: Packed) -> Tensor:
    """(N, d) last hidden states of a transformer body over a packed row."""
    below = packed.below
    if below is None or below.body is not body:
        return _run(body, packed)
    name, rows = blocks(body)
    states = below.states.unsqueeze(0)
    entry = rows[below.depth].register_forward_pre_hook(
        lambda _, inputs, options: ((states, *inputs[1:]), options), with_kwargs=True
    )
    with _with_blocks(body, name, rows[below.depth :]), entry:
        return _run(body, packed)


@torch.no_grad()
def states_below(body: PreTrainedModel, packed: Packed, depth: int) -> Below:
    """What goes into block `depth`: the work of the blocks before it."""
    name, rows = blocks(body)
    found: list[Tensor] = []
    leave = rows[depth - 1].register_forward_hook(
        lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with _with_blocks(body, name, rows[:depth]), leave:
        _run(body, packed)
    return Below(body, depth, found[0][0])


def blocks(body: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The stack of blocks of a transformer body, and its name there.

    Raises: ModelError when it has none.
    """
    for name, child in body.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == body.config.num_hidden_layers:
            return name, child
    raise ModelError(f"{type(body).__name__} has no stack of blocks; take another family")


@contextmanager
def _with_blocks(body: PreTrainedModel, name: str, rows: nn.ModuleList) -> Iterator[None]:
    """The body with some of its blocks alone."""
    whole = getattr(body, name)
    setattr(body, name, rows)
    try:
        yield
    finally:
        setattr(body, name, whole)


def _run(body: Any, packed: Packed) -> Tensor:
    states = body(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        # Four dimensions are taken as they are: no mask over the whole row is built.
        attention_mask=packed.input_ids.new_zeros(1, 1, 1, 1),
        use_cache=False,
        packed=packed,
    ).last_hidden_state
    return cast(Tensor, states)[0]


class Memory(Protocol):
    """Keys and values of earlier tokens, while a text is being written."""

    def extend(
        self, layer: int, key: Tensor, value: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take in new (B, H, n, D) keys and values; give back all, and who may look at whom.

        `window` is how far back the layer looks, None for all the way.
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

    Raises: ModelError for models whose attention softens its scores, which SDPA does not.
    """
    if options.get("softcap") is not None:
        raise ModelError(
            "this model caps its attention scores, which is not supported here; take another family"
        )
    window: int | None = options.get("sliding_window")
    if memory is not None:
        layer = cast(int, module.layer_idx)
        key, value, attention_mask = memory.extend(layer, key, value, window)
    if packed is None:
        mixed, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return mixed, None
    apart = (_apart(x, packed) for x in (query, key, value))
    mask = _window(packed.rows.shape[1], window, query.device)
    mixed, _ = sdpa_attention_forward(module, *apart, mask, **options)
    if packed.dense:
        return mixed.reshape(1, -1, *mixed.shape[2:]), None
    together = embedding(packed.home, mixed.flatten(2).flatten(0, 1))
    return together.view(1, -1, *mixed.shape[2:]), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _common(ours: np.ndarray, theirs: np.ndarray) -> int:
    """How many tokens two sequences have in common at their beginning."""
    shortest = min(len(ours), len(theirs))
    differ = ours[:shortest] != theirs[:shortest]
    return int(differ.argmax()) if differ.any() else shortest


def _apart(x: Tensor, packed: Packed) -> Tensor:
    """(1, H, N, D) -> (S, H, L, D): each sequence for itself, padded on the right.

    An embedding is a gather of rows whose gradient is summed fast and in a fixed order.
    """
    flat = x[0].transpose(0, 1).flatten(1)
    apart: Tensor = flat if packed.dense else embedding(packed.rows, flat)
    return apart.view(*packed.rows.shape, x.shape[1], x.shape[3]).transpose(1, 2)


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """(L, L) mask of a model that looks back only so far; None where the causal rule says all."""
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=device)
    back = places.unsqueeze(1) - places
    return ((back >= 0) & (back < window)).view(1, 1, length, length)


def pack_pairs(pairs: Sequence[Pair], device: torch.device) -> Packed:
    """Chosen and rejected texts in turn, so that the prompt of a pair is read once."""
    return pack([ids for pair in pairs for ids in (pair.chosen, pair.rejected)], device)


def position_ids(mask: Tensor) -> Tensor:
    """(B, T) mask -> (B, T) position of each token among those that count, wherever padding is."""
    return mask.long().cumsum(-1).sub(1).clamp(min=0)

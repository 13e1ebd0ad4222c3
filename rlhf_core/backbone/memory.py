"""What each layer remembers of earlier tokens while texts are sampled, one token at a time.

A body with packed attention keeps keys and values in buffers of ours, sized for the whole text. Any
other body keeps the cache that transformers makes for its layers, which may hold states of other
kinds.
"""

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf_core.backbone.context import require_rope
from rlhf_core.backbone.packing import UNMASKED, Memory, is_packed, with_positions


class Continuation(Protocol):
    """Texts that are read a few tokens at a time."""

    @property
    def layers(self) -> int:
        """How many layers remember something."""

    def read(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """(B, n) new tokens and their positions -> (B, d) hidden state of the last one."""

    def keep(self, rows: Tensor) -> None:
        """Go on with the texts that (n,) indices select; a text may be selected several times."""


def continuation(body: PreTrainedModel, mask: Tensor, steps: int) -> Continuation:
    """Texts that begin with prompts padded on the left and grow by at most `steps` tokens.

    Args:
        mask: (B, P) bool, False where a prompt is padded.

    Raises: ConfigError when the texts may become longer than the body's rope allows.
    """
    require_rope(body.config, mask.shape[1] + steps)
    return _KeyValues(body, mask, steps) if is_packed(body) else _ModelCache(body, mask)


class _KeyValues(Memory):
    """Keys and values of all layers, in buffers sized for the whole text."""

    def __init__(self, body: Any, mask: Tensor, steps: int) -> None:
        self._body = body
        self._seen = torch.cat([mask, mask.new_ones(len(mask), steps)], dim=1)
        self._padded = not bool(mask.all())
        self._filled: dict[int, int] = {}
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int | None, Tensor] = {}  # of this step, by window; layers share them

    @property
    def layers(self) -> int:
        """The layers that have called `extend`."""
        return len(self._buffers)

    def read(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Run the body on the new tokens."""
        self._masks.clear()
        states = self._body(
            input_ids=input_ids,
            position_ids=positions,
            attention_mask=input_ids.new_zeros(UNMASKED),  # `extend` makes the mask
            use_cache=False,
            memory=self,
        ).last_hidden_state
        return cast(Tensor, states)[:, -1]

    def extend(
        self, layer: int, key: Tensor, value: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append to the buffers."""
        start = self._filled.get(layer, 0)
        end = self._filled[layer] = start + key.shape[2]
        if layer not in self._buffers:
            self._buffers[layer] = (self._room(key, len(key)), self._room(value, len(value)))
        keys, values = self._buffers[layer]
        keys[:, :, start:end], values[:, :, start:end] = key, value
        narrow = window is not None and window < end
        mask = self._mask(start, end, window) if self._padded or narrow else None
        return keys[:, :, :end], values[:, :, :end], mask

    def keep(self, rows: Tensor) -> None:
        """Select rows.

        Those that stay where they are are not copied. More rows than before get buffers of their
        own, layer by layer, so that only one layer has both.
        """
        if len(rows) > len(self._seen):
            self._seen = self._seen[rows]
            for layer, (keys, values) in self._buffers.items():
                end = self._filled[layer]
                self._buffers[layer] = (
                    self._spread(keys, rows, end),
                    self._spread(values, rows, end),
                )
            return
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        come_from = rows[moved]
        self._seen = self._seen[rows]
        for layer, (keys, values) in self._buffers.items():
            end = self._filled[layer]
            for x in (keys, values):
                x[moved, :, :end] = x[come_from, :, :end]
            self._buffers[layer] = keys[: len(rows)], values[: len(rows)]

    def _room(self, states: Tensor, rows: int) -> Tensor:
        """(rows, H, T, D) for the states of whole texts, like (B, H, n, D) of some tokens."""
        return states.new_empty(rows, states.shape[1], self._seen.shape[1], states.shape[3])

    def _spread(self, states: Tensor, rows: Tensor, end: int) -> Tensor:
        """The first `end` tokens of selected rows, in a new buffer."""
        buffer = self._room(states, len(rows))
        buffer[:, :, :end] = states[:, :, :end].index_select(0, rows)
        return buffer

    def _mask(self, start: int, end: int, window: int | None) -> Tensor:
        """(B, 1, end - start, end): attend back to the first unmasked token; padding to itself."""
        if window not in self._masks:
            positions = torch.arange(end, device=self._seen.device)
            queries = positions[start:].unsqueeze(1)
            near = (positions <= queries) & (positions > queries - (window or end))
            seen = self._seen[:, :end].unsqueeze(1) & near
            self._masks[window] = (seen | (positions == queries)).unsqueeze(1)
        return self._masks[window]


class _ModelCache:
    """The cache of transformers, whose layers are those that the model's config lists."""

    def __init__(self, body: Any, mask: Tensor) -> None:
        self._body = body
        self._mask = mask
        self._cache: Any = DynamicCache(config=body.config)
        self._read = 0

    @property
    def layers(self) -> int:
        """The layers of the cache."""
        return len(self._cache)

    def read(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Run the body on the new tokens."""
        self._read += input_ids.shape[1]
        more = self._read - self._mask.shape[1]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(input_ids), more)], dim=1)
        out = self._body(
            input_ids=input_ids,
            attention_mask=self._mask.long(),
            past_key_values=self._cache,
            use_cache=True,
            **with_positions(self._body, positions),
        )
        self._cache = out.past_key_values
        return cast(Tensor, out.last_hidden_state)[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Select rows."""
        self._mask = self._mask[rows]
        self._cache.reorder_cache(rows)

"""The records that travel between functions: the shape and meaning of every field, once.

Letters: B batch, P prompt tokens, R response tokens, T = P + R, V vocabulary.
Every `mask` is True where a token counts; it is carried from sampling on and never inferred from
token ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor


@dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the left, so that every response starts in the same column."""

    input_ids: Tensor  # (B, P) int64
    mask: Tensor  # (B, P) bool

    def to(self, device: torch.device) -> "PromptBatch":
        """The same batch on another device."""
        return PromptBatch(self.input_ids.to(device), self.mask.to(device))

    def rows(self, index: Tensor) -> "PromptBatch":
        """Some rows of the batch."""
        return PromptBatch(self.input_ids[index], self.mask[index])


@dataclass(frozen=True)
class Responses:
    """What a policy said to a `PromptBatch`."""

    tokens: Tensor  # (B, R) int64, pad after the end
    mask: Tensor  # (B, R) bool, True up to and including the end-of-sequence token
    finished: Tensor  # (B,) bool, the end-of-sequence token was reached

    def rows(self, index: Tensor) -> "Responses":
        """Some rows of the batch."""
        return Responses(self.tokens[index], self.mask[index], self.finished[index])


@dataclass(frozen=True)
class Rollout:
    """One batch of experience: everything that the update needs, nothing that it recomputes."""

    # trajectory
    prompts: PromptBatch
    responses: Responses
    # policy
    logprobs: Tensor  # (B, R) log π_old(a|s), masked places 0
    ref_logprobs: Tensor  # (B, R) log π_ref(a|s), masked places 0
    # value
    values: Tensor  # (B, R) V_old(s), masked places 0
    # outcome
    scores: Tensor  # (B,) normalised reward-model score of the whole text

    def rows(self, index: Tensor) -> "Rollout":
        """Some rows of the batch."""
        return Rollout(
            self.prompts.rows(index),
            self.responses.rows(index),
            self.logprobs[index],
            self.ref_logprobs[index],
            self.values[index],
            self.scores[index],
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a stage found out. Each subclass adds its numbers as fields of type int or float."""

    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """The numbers of this report by field name: what is logged once, when the stage ends."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: float(v) for name, v in values.items() if isinstance(v, (int, float))}

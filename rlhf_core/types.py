"""The records passed between functions, with the shape and meaning of every field.

Letters: B batch, P prompt tokens, R response tokens, T = P + R, V vocabulary.
Every `mask` is True where a token counts; it is passed on from sampling and never inferred from
token ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import pandas as pd
import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    """The responses of a policy to a `PromptBatch`."""

    tokens: Tensor  # (B, R) int64, pad after the end
    mask: Tensor  # (B, R) bool, True up to and including the end-of-sequence token
    finished: Tensor  # (B,) bool, whether the end-of-sequence token was reached

    def rows(self, index: Tensor) -> "Responses":
        """Some rows of the batch."""
        return Responses(self.tokens[index], self.mask[index], self.finished[index])


@dataclass(frozen=True)
class Rollout:
    """One batch of experience: everything that the update needs and does not recompute."""

    # trajectory
    prompts: PromptBatch
    responses: Responses
    # policy
    logprobs: Tensor  # (B, R) log π_old(a|s), 0 where masked
    ref_logprobs: Tensor  # (B, R) log π_ref(a|s), 0 where masked
    # value
    values: Tensor  # (B, R) V_old(s), 0 where masked; all 0 without a critic
    # outcome
    scores: Tensor  # (B,) reward of the whole text
    parts: Mapping[str, Tensor]  # (B,) each: the parts of the score, by name
    # states that enter the first block with an adapter, which networks on one transformer share;
    # the name is part of the checkpoint format
    below: Tensor | None = None  # (B, T, d), padded at the end
    spread: Tensor | None = None  # (B,) of the members of a reward model; None without members
    shaped: Tensor | None = None  # (B,) what shaping made of the scores; None without it
    # of another engine that sampled; None if this process did
    sampled: Tensor | None = None  # (B, R) log π_engine(a|s), 0 where masked
    importance: Tensor | None = None  # (B, R) min(π_old / π_engine, cap), 1 where masked

    @property
    def outcomes(self) -> Tensor:
        """(B,) what credit is assigned by: the shaped scores, or the scores."""
        return self.scores if self.shaped is None else self.shaped

    @classmethod
    def unmeasured(
        cls, prompts: PromptBatch, responses: Responses, sampled: Tensor | None = None
    ) -> "Rollout":
        """Responses that have not been scored yet."""
        nothing = torch.zeros(responses.tokens.shape, device=responses.tokens.device)
        scores = nothing.sum(-1)
        return cls(prompts, responses, nothing, nothing, nothing, scores, {}, sampled=sampled)

    @classmethod
    def join(cls, parts: Sequence["Rollout"]) -> "Rollout":
        """Concatenate the rows of several roll-outs."""
        prompts = [part.prompts for part in parts]
        responses = [part.responses for part in parts]
        below = [part.below for part in parts if part.below is not None]
        spread = [part.spread for part in parts if part.spread is not None]
        sampled = [part.sampled for part in parts if part.sampled is not None]
        return cls(
            PromptBatch(
                _stack([p.input_ids for p in prompts], left=True),
                _stack([p.mask for p in prompts], left=True),
            ),
            Responses(
                _stack([r.tokens for r in responses]),
                _stack([r.mask for r in responses]),
                torch.cat([r.finished for r in responses]),
            ),
            _stack([part.logprobs for part in parts]),
            _stack([part.ref_logprobs for part in parts]),
            _stack([part.values for part in parts]),
            torch.cat([part.scores for part in parts]),
            {name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts},
            _stack(below) if below else None,
            torch.cat(spread) if spread else None,
            sampled=_stack(sampled) if sampled else None,
        )

    def to(self, device: str) -> "Rollout":
        """The same roll-out on another device."""
        return Rollout(
            self.prompts.to(torch.device(device)),
            Responses(*(t.to(device) for t in vars(self.responses).values())),
            self.logprobs.to(device),
            self.ref_logprobs.to(device),
            self.values.to(device),
            self.scores.to(device),
            {name: part.to(device) for name, part in self.parts.items()},
            None if self.below is None else self.below.to(device),
            None if self.spread is None else self.spread.to(device),
            None if self.shaped is None else self.shaped.to(device),
            None if self.sampled is None else self.sampled.to(device),
            None if self.importance is None else self.importance.to(device),
        )

    def rows(self, index: Tensor) -> "Rollout":
        """Some rows of the batch."""
        return Rollout(
            self.prompts.rows(index),
            self.responses.rows(index),
            self.logprobs[index],
            self.ref_logprobs[index],
            self.values[index],
            self.scores[index],
            {name: part[index] for name, part in self.parts.items()},
            None if self.below is None else self.below[index],
            None if self.spread is None else self.spread[index],
            None if self.shaped is None else self.shaped[index],
            None if self.sampled is None else self.sampled[index],
            None if self.importance is None else self.importance[index],
        )


def _stack(rows: Sequence[Tensor], *, left: bool = False) -> Tensor:
    """Concatenate (b, w, ...) tensors of unequal width, padded with 0 (False in a mask)."""
    width = max(part.shape[1] for part in rows)
    gaps = [(width - part.shape[1], 0) if left else (0, width - part.shape[1]) for part in rows]
    deeper = (0, 0) * (rows[0].ndim - 2)
    return torch.cat([pad(r, (*deeper, *gap)) for r, gap in zip(rows, gaps, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Report:
    """The results of a stage. Each subclass adds its numbers as fields of type int or float."""

    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, "Figure"] = field(default_factory=dict)

    @property
    def result(self) -> BaseModel | None:
        """The part that later stages read; None when they read only the numbers."""
        return None

    @property
    def page(self) -> str:
        """Markdown for people; empty when the numbers, tables and figures say it all."""
        return ""

    @property
    def copies(self) -> Mapping[str, str]:
        """The outputs, by kind, that are a copy of an input, by its role, and nothing new."""
        return {}

    def summary(self) -> dict[str, float]:
        """The numbers of this report by field name, logged once when the stage ends."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: float(v) for name, v in values.items() if isinstance(v, (int, float))}

"""Answers as long as those that fine-tuning will have taught, from a model that was not taught yet.

How long a stage samples depends on where answers end. After SFT they end about where the
demonstrations do; the model of a trial has seen a few of these only.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_core.backbone import sampling
from rlhf_core.types import PromptBatch, Responses

_ENDS = 2.0  # in place of a number in [0, 1): this token ends the answer


@dataclass
class AnswerLengths:
    """Where sampled answers end.

    Args:
        lengths: of the demonstrations in tokens, with the one that ends them; empty = the model
            decides.
    """

    lengths: Sequence[int]
    longest: bool = False  # no answer ends: what takes the most memory
    free: bool = False  # the model decides: it is not the one that will be taught
    _draws: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def heard(self, phase: str) -> None:
        """The base model answers as it does; nobody teaches it."""
        self.free = phase == "loading the base model" or (
            self.free and not phase.startswith("loading")
        )

    def ending(self, draws: Tensor) -> Tensor:
        """(B, R) draws in which the last token of each answer is marked."""
        rows, steps = draws.shape
        if self.free or not self.lengths:
            return draws
        if self.longest:
            return draws
        known = torch.tensor(self.lengths)
        picked = known[torch.randint(len(known), (rows,), generator=self._draws)]
        at = torch.arange(steps)
        ends = at.unsqueeze(0) >= (picked - 1).unsqueeze(1)
        return draws.masked_fill(ends.to(draws.device), _ENDS)


@contextmanager
def answers_end(lengths: AnswerLengths) -> Iterator[None]:
    """Let answers that are sampled in the block end where `lengths` says.

    Only for a process that measures: it replaces two functions of the sampling module.
    """
    sample, draw = sampling.sample_with_logprobs, sampling.draw
    ids: list[int] = [0]

    def ended_sample(
        policy: Any, prompts: PromptBatch, draws: Tensor, **more: Any
    ) -> tuple[Responses, Tensor]:
        found = more["eos_token_id"]
        ids[0] = found if isinstance(found, int) else found[0]
        return sample(policy, prompts, lengths.ending(draws), **more)

    def ended_draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        token, logprob = draw(logits, uniform.clamp(max=1 - 2**-20), temperature)
        if not lengths.lengths or lengths.free:
            return token, logprob
        # Until then it does not end, whatever the model would say: any other token costs the same.
        other = (token + 1) % logits.shape[-1]
        token = torch.where(token == ids[0], other, token)
        return torch.where(uniform >= 1, torch.full_like(token, ids[0]), token), logprob

    sampling.sample_with_logprobs, sampling.draw = ended_sample, ended_draw
    try:
        yield
    finally:
        sampling.sample_with_logprobs, sampling.draw = sample, draw

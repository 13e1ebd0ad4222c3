"""Shaping: what is made of the score of a response before a policy learns from it.

A score that rises without bound pays for every step into the region where the reward model errs.
The score is compared with reference answers, or whitened, then clipped, and a price for excess
length is subtracted:

    score → σ(score - reference) or (score - μ) / σ → clip to ± limit → - coef·excess tokens

The formulas and papers are in `functional.rewards`. The score itself is logged and monitored as it
was; only credit is assigned by the shaped one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_core.functional.rewards import Moments, against_reference, excess_length, whiten
from rlhf_core.settings.rewards import LengthPenaltySection, ShapingSection


def excess(config: LengthPenaltySection, lengths: Tensor) -> Tensor:
    """(B,) penalties of responses with these (B,) numbers of tokens."""
    return excess_length(lengths, limit=config.length_limit, coef=config.length_penalty)


class Shaping:
    """Shapes the scores of one roll-out after another. Its state is part of a checkpoint.

    Args:
        config: the settings.
        prompts: the number of prompts to train on.
        draws: the random numbers of the reference answers.
    """

    def __init__(self, config: ShapingSection, prompts: int, draws: torch.Generator) -> None:
        self.config = config
        self.draws = draws
        self._moments = Moments()
        # (prompts, M) scores of reference answers, NaN where a prompt has not been used yet
        rows = prompts if config.compares else 0
        self._reference = torch.full((rows, config.reference_answers), torch.nan)

    def unknown(self, prompts: Sequence[int]) -> list[int]:
        """The prompts whose reference answers have no scores yet, each once."""
        if not self.config.compares:
            return []
        known = ~self._reference[:, 0].isnan()
        return [prompt for prompt in dict.fromkeys(prompts) if not known[prompt]]

    def keep_reference(self, prompts: list[int], scores: Tensor) -> None:
        """Keep the (B, M) scores of reference answers to B prompts."""
        self._reference[prompts] = scores.cpu().float()

    def __call__(self, scores: Tensor, lengths: Tensor, prompts: list[int]) -> Tensor:
        """(B,) shaped scores of responses with these (B,) numbers of tokens, to these prompts."""
        config = self.config
        if config.transform == "whiten":
            self._moments = self._moments.with_values(scores)
            scores = whiten(scores, self._moments)
        elif config.compares:
            scores = against_reference(scores, self._reference[prompts].to(scores))
        if config.clip:
            scores = scores.clamp(-config.clip, config.clip)
        return scores - excess(config, lengths)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {
            "moments": tuple(self._moments),
            "reference": self._reference,
            "draws": self.draws.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._moments = Moments(*state["moments"])
        self._reference = state["reference"].clone()
        self.draws.set_state(state["draws"])

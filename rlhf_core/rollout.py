"""What the networks say about sampled responses. Knows nothing about optimisation.

Prompts and responses come as padded tensors and are laid out without padding, `micro_batch_size`
rows at a time: the same rows in the same micro-batches as in the first epoch of the update, so that
its first ratio is 1 to the bit.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_core.networks import Policy, ScalarModel
from rlhf_core.packing import Packed, pack
from rlhf_core.types import PromptBatch, Responses


@dataclass(frozen=True)
class Written:
    """Prompts with their responses, without padding."""

    packed: Packed
    places: Tensor  # (M,) where each response token is predicted: the state in which it was chosen
    tokens: Tensor  # (M,) the response tokens, row by row
    mask: Tensor  # (B, R) bool

    def spread(self, values: Tensor) -> Tensor:
        """(M,) a value for each response token -> (B, R); masked places are 0."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


def lay_out(prompts: PromptBatch, responses: Responses) -> Written:
    """Pack prompts and responses; rows with the same prompt beside each other share it."""
    device = responses.tokens.device
    packed = pack(texts(prompts, responses), device)
    places, tokens = packed.predictions(prompts.mask.sum(-1))
    return Written(packed, places, tokens, responses.mask)


def texts(prompts: PromptBatch, responses: Responses) -> list[np.ndarray]:
    """The token ids of each prompt with its response."""
    ids = torch.cat([prompts.input_ids, responses.tokens], dim=-1).cpu().numpy()
    mask = torch.cat([prompts.mask, responses.mask], dim=-1).cpu().numpy()
    return [row[keep] for row, keep in zip(ids, mask, strict=True)]


def response_logprobs(policy: Policy, written: Written, *, temperature: float) -> Tensor:
    """(B, R) log π(a|s) of each response token in nats; masked places are 0."""
    out = policy(written.packed, written.places, written.tokens, temperature=temperature)
    return written.spread(out.logprobs)


def response_values(critic: ScalarModel, written: Written) -> Tensor:
    """(B, R) V(s) of the state in which each response token was chosen; masked places are 0."""
    return written.spread(critic(written.packed, written.places))


def response_scores(reward_model: ScalarModel, written: Written) -> Tensor:
    """(B,) normalised reward of each whole text, read at its last token."""
    return reward_model.scores(written.packed)

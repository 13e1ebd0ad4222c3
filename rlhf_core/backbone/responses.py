"""What the networks say about sampled responses. Knows nothing about optimisation.

Prompts and responses come as padded tensors and are laid out without padding, `micro_batch_size`
rows at a time: the same rows in the same micro-batches as in the first epoch of the update, so that
its first ratio is 1 to the bit.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rlhf_core.backbone.adapters import adapted_from
from rlhf_core.backbone.networks import Network, Policy, Precision, ScalarModel
from rlhf_core.backbone.packing import Below, Packed, pack, states_below
from rlhf_core.types import PromptBatch, Responses, Rollout


@dataclass(frozen=True)
class Written:
    """Prompts with their responses, without padding."""

    packed: Packed
    places: Tensor  # (M,) where each response token is predicted: the state in which it was chosen
    tokens: Tensor  # (M,) the response tokens, row by row
    mask: Tensor  # (B, R) bool

    def spread(self, values: Tensor, span: slice = slice(None)) -> Tensor:
        """(n,) a value for each response token, or for each of some -> (B, R); 0 elsewhere."""
        row = values.new_zeros(self.mask.numel()).index_copy(0, self._at[span], values)
        return row.view(self.mask.shape)

    def part(self, span: slice) -> Tensor:
        """(B, R) bool, True for some of the M response tokens."""
        row = self.mask.new_zeros(self.mask.numel()).index_fill(0, self._at[span], True)
        return row.view(self.mask.shape)

    @cached_property
    def _at(self) -> Tensor:
        """(M,) where the response tokens lie in the rows behind one another."""
        return self.mask.flatten().nonzero().squeeze(-1)

    def below(self) -> Tensor | None:
        """(B, T, d) what all networks of a transformer have in common; None if nothing."""
        known = self.packed.below
        return None if known is None else self.packed.spread(known.states)


def lay_out(prompts: PromptBatch, responses: Responses) -> Written:
    """Pack prompts and responses; rows with the same prompt beside each other share it."""
    device = responses.tokens.device
    packed = pack(texts(prompts, responses), device)
    places, tokens = packed.predictions(prompts.mask.sum(-1))
    return Written(packed, places, tokens, responses.mask)


def share_below(written: Written, network: Network) -> Written:
    """Compute what all networks on this one's transformer have in common, once.

    That is the work of the blocks below the first adapter; without adapters there is none.
    """
    depth = adapted_from(network.model)
    if depth is None:
        return written
    with network.autocast():
        below = states_below(network.model.base_model, written.packed, depth)
    return replace(written, packed=replace(written.packed, below=below))


def read_again(rollout: Rollout, network: Network) -> Written:
    """The texts of a roll-out, with what was computed of them then."""
    written = lay_out(rollout.prompts, rollout.responses)
    depth = adapted_from(network.model)
    if depth is None or rollout.below is None:
        return written
    states = written.packed.collect(rollout.below)
    below = Below(network.model.base_model, depth, states)
    return replace(written, packed=replace(written.packed, below=below))


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


def rounding(logprobs: Tensor, precision: Precision) -> float:
    """How far log-probabilities of the same work may lie apart, in nats.

    Not at all on the CPU, where the same work gives the same bits in either precision. Elsewhere it
    may not: bfloat16 logits between 16 and 32 are 1/8 apart, and two of them make a quarter.
    """
    if logprobs.device.type == "cpu":
        return 0.0
    return 0.05 if precision == "float32" else 0.25

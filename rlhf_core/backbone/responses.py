"""Log-probabilities, values and scores of sampled responses. Knows nothing about optimisation.

Prompts and responses are padded tensors and are packed without padding, `micro_batch_size` rows at
a time: the same rows in the same micro-batches as in the first epoch of the update, so that its
first ratio is exactly 1.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rlhf_core.backbone.adapters import adapted_from
from rlhf_core.backbone.networks import Network, Policy, ScalarModel
from rlhf_core.backbone.packing import Packed, SharedStates, pack, shared_states
from rlhf_core.settings.model import Precision
from rlhf_core.types import PromptBatch, Responses, Rollout


@dataclass(frozen=True)
class ResponseRows:
    """Prompts with their responses, packed without padding."""

    packed: Packed
    positions: Tensor  # (M,) in the packed row, of the state that predicts each response token
    tokens: Tensor  # (M,) the response tokens, row by row
    mask: Tensor  # (B, R) bool

    def to_rows(self, values: Tensor, span: slice = slice(None)) -> Tensor:
        """(n,) one value for each response token in `span` -> (B, R); 0 elsewhere."""
        row = values.new_zeros(self.mask.numel()).index_copy(0, self._at[span], values)
        return row.view(self.mask.shape)

    def span_mask(self, span: slice) -> Tensor:
        """(B, R) bool, True for the response tokens in `span`."""
        row = self.mask.new_zeros(self.mask.numel()).index_fill(0, self._at[span], True)
        return row.view(self.mask.shape)

    @cached_property
    def _at(self) -> Tensor:
        """(M,) index of each response token in the flattened (B, R) rows."""
        return self.mask.flatten().nonzero().squeeze(-1)

    def shared_states(self) -> Tensor | None:
        """(B, T, d) the states that all networks of a transformer share; None if there are none."""
        shared = self.packed.shared
        return None if shared is None else self.packed.unpack(shared.states)


def lay_out(prompts: PromptBatch, responses: Responses) -> ResponseRows:
    """Pack prompts and responses; adjacent rows with the same prompt share it."""
    device = responses.tokens.device
    packed = pack(texts(prompts, responses), device)
    positions, tokens = packed.predictions(prompts.mask.sum(-1))
    return ResponseRows(packed, positions, tokens, responses.mask)


def with_shared_states(rows: ResponseRows, network: Network) -> ResponseRows:
    """Compute the states that all networks on this transformer share, once.

    They are the output of the blocks before the first adapter; without adapters there are none.
    """
    return replace(rows, packed=share(rows.packed, network))


def share(packed: Packed, network: Network) -> Packed:
    """Texts with the states that all networks on a transformer share, computed if they are not
    there."""
    depth, body = adapted_from(network.model), network.model.base_model
    if depth is None or (packed.shared is not None and packed.shared.body is body):
        return packed
    with network.autocast():
        return replace(packed, shared=shared_states(body, packed, depth))


def restore_rows(rollout: Rollout, network: Network) -> ResponseRows:
    """The texts of a roll-out, with the shared states that were computed when it was sampled."""
    rows = lay_out(rollout.prompts, rollout.responses)
    depth = adapted_from(network.model)
    if depth is None or rollout.below is None:
        return rows
    states = rows.packed.repack(rollout.below)
    shared = SharedStates(network.model.base_model, depth, states)
    return replace(rows, packed=replace(rows.packed, shared=shared))


def texts(prompts: PromptBatch, responses: Responses) -> list[np.ndarray]:
    """The token ids of each prompt with its response."""
    ids = torch.cat([prompts.input_ids, responses.tokens], dim=-1).cpu().numpy()
    mask = torch.cat([prompts.mask, responses.mask], dim=-1).cpu().numpy()
    return [row[keep] for row, keep in zip(ids, mask, strict=True)]


def response_logprobs(policy: Policy, rows: ResponseRows, *, temperature: float) -> Tensor:
    """(B, R) log π(a|s) of each response token in nats; 0 where masked."""
    out = policy(rows.packed, rows.positions, rows.tokens, temperature=temperature)
    return rows.to_rows(out.logprobs)


def response_values(critic: ScalarModel, rows: ResponseRows) -> Tensor:
    """(B, R) V(s) of the state in which each response token was sampled; 0 where masked."""
    return rows.to_rows(critic(rows.packed, rows.positions))


def response_scores(reward_model: ScalarModel, rows: ResponseRows) -> Tensor:
    """(B,) normalised reward of each text, read at its last token."""
    return reward_model.scores(rows.packed)


def rounding(logprobs: Tensor, precision: Precision) -> float:
    """How much log-probabilities of the same computation may differ, in nats.

    On the CPU, not at all: the same computation gives the same bits in either precision. Elsewhere
    they may: bfloat16 logits between 16 and 32 are 1/8 apart, and two of them add up to 1/4.
    """
    if logprobs.device.type == "cpu":
        return 0.0
    return 0.05 if precision == "float32" else 0.25

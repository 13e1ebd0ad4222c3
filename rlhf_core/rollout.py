"""What the models say about sampled responses. Knows nothing about optimisation.

Every function takes prompts padded on the left and responses padded on the right, so the response
occupies the same R columns in each row, and works through them `micro_batch_size` rows at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.functional.logprobs import token_logprobs
from rlhf_core.models import ScalarModel, response_logits
from rlhf_core.types import PromptBatch, Responses, Rollout


def sequences(prompts: PromptBatch, responses: Responses) -> tuple[Tensor, Tensor]:
    """Prompts and responses side by side: (B, P + R) tokens and mask."""
    tokens = torch.cat([prompts.input_ids, responses.tokens], dim=-1)
    return tokens, torch.cat([prompts.mask, responses.mask], dim=-1)


def response_logprobs(
    model: PreTrainedModel, prompts: PromptBatch, responses: Responses, *, temperature: float
) -> Tensor:
    """(B, R) log π(a|s) of each response token in nats; masked places are 0."""
    tokens, mask = sequences(prompts, responses)
    logits = response_logits(model, tokens, mask, responses.tokens.shape[-1])
    logprobs = token_logprobs(logits, responses.tokens, temperature=temperature)
    return logprobs.masked_fill(~responses.mask, 0.0)


def response_values(critic: ScalarModel, prompts: PromptBatch, responses: Responses) -> Tensor:
    """(B, R) V(s) of the state in which each response token was chosen; masked places are 0.

    The state of the first response token is the prompt, so the columns are P - 1 .. P + R - 2.
    """
    tokens, mask = sequences(prompts, responses)
    start = prompts.input_ids.shape[-1] - 1
    values = critic.values(tokens, mask)[:, start : start + responses.tokens.shape[-1]]
    return values.masked_fill(~responses.mask, 0.0)


def response_scores(
    reward_model: ScalarModel, prompts: PromptBatch, responses: Responses
) -> Tensor:
    """(B,) normalised reward of each whole text, read at its last token."""
    return reward_model.scores(*sequences(prompts, responses))


@torch.no_grad()
def in_pieces(
    measure: Callable[[PromptBatch, Responses], Tensor],
    prompts: PromptBatch,
    responses: Responses,
    micro_batch_size: int,
) -> Tensor:
    """`measure` without gradient, a few rows at a time, as one tensor."""
    pieces = torch.arange(len(responses.tokens), device=responses.tokens.device).split(
        micro_batch_size
    )
    return torch.cat([measure(prompts.rows(piece), responses.rows(piece)) for piece in pieces])


def collect(
    prompts: PromptBatch,
    responses: Responses,
    *,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    critic: ScalarModel,
    reward_model: ScalarModel,
    temperature: float,
    micro_batch_size: int,
) -> Rollout:
    """Everything that a PPO update needs to know about a batch of responses.

    Log-probabilities are those of a forward pass like that of the update, not those of sampling,
    so that the first ratio is 1.
    """

    def measured(measure: Callable[[PromptBatch, Responses], Tensor]) -> Tensor:
        return in_pieces(measure, prompts, responses, micro_batch_size)

    return Rollout(
        prompts=prompts,
        responses=responses,
        logprobs=measured(lambda p, r: response_logprobs(policy, p, r, temperature=temperature)),
        ref_logprobs=measured(
            lambda p, r: response_logprobs(reference, p, r, temperature=temperature)
        ),
        values=measured(lambda p, r: response_values(critic, p, r)),
        scores=measured(lambda p, r: response_scores(reward_model, p, r)),
    )

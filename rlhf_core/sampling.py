"""Sampling responses from a policy. Knows token ids; knows nothing about rewards or training.

The model's own key-value cache, one forward pass a token, no top-k, no top-p: what is sampled is
the distribution that the update differentiates.
"""

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf_core.config import Section
from rlhf_core.encoding import left_pad
from rlhf_core.models import position_ids
from rlhf_core.types import PromptBatch, Responses

SAMPLING_LENGTH = "sampling.max_prompt_length + max_new_tokens"  # the settings of `max_length`


class SamplingConfig(Section):
    """How responses are drawn, alike in the reward model's normalisation, PPO and evaluation."""

    max_prompt_length: int = Field(
        256, ge=1, description="Longest prompt (tokens); a longer one loses its beginning"
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest response (tokens)")
    temperature: float = Field(
        1.0, gt=0, description="Divides the logits, in sampling and in every log-probability"
    )
    batch_size: int = Field(128, ge=1, description="Prompts that are continued side by side")

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt with the longest response."""
        return self.max_prompt_length + self.max_new_tokens


def respond(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    config: SamplingConfig,
    *,
    generator: torch.Generator,
) -> Iterator[tuple[PromptBatch, Responses]]:
    """Continue encoded prompts, `config.batch_size` at a time, in their order."""
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    for start in range(0, len(prompts), config.batch_size):
        rows = prompts[start : start + config.batch_size]
        batch = left_pad(rows, pad, config.max_prompt_length).to(model.device)
        yield (
            batch,
            sample(
                model,
                batch,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                eos_token_id=eos,
                pad_token_id=pad,
                generator=generator,
            ),
        )


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: PromptBatch,
    *,
    max_new_tokens: int,
    temperature: float,
    eos_token_id: int,
    pad_token_id: int,
    generator: torch.Generator,
) -> Responses:
    """Continue each prompt until its end-of-sequence token or `max_new_tokens`.

    a_t ~ softmax(logits_t / temperature); temperature 0 takes the likeliest token.
    Rows that have ended are padded; the batch ends when every row has.

    Shapes: prompts (B, P) -> tokens, mask (B, R), R <= max_new_tokens; finished (B,).
    """
    mask, step_ids = prompts.mask, prompts.input_ids
    positions = position_ids(mask)
    alive = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
    cache = DynamicCache(config=model.config)
    tokens: list[Tensor] = []
    counts: list[Tensor] = []
    while len(tokens) < max_new_tokens and bool(alive.any()):
        logits = model(
            input_ids=step_ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        token = torch.where(alive, _draw(logits.float(), temperature, generator), pad_token_id)
        tokens.append(token)
        counts.append(alive)
        alive = alive & (token != eos_token_id)
        step_ids = token.unsqueeze(-1)
        # An ended row goes on attending to its pads; nobody looks at what it says.
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)
        positions = positions[:, -1:] + 1
    return Responses(torch.stack(tokens, -1), torch.stack(counts, -1), finished=~alive)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """(B, V) logits -> (B,) token ids."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

"""Sampling responses from a policy. Knows token ids; knows nothing about rewards or training.

Each token takes one forward pass over what the layers remember of the earlier ones. There is no
top-k or top-p: the sampled distribution is the one that the update differentiates. Finished rows
leave the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_core.backbone.memory import continuation
from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.packing import position_ids
from rlhf_core.backbone.tokens import ending_ids
from rlhf_core.data.encoding import left_pad
from rlhf_core.metrics import Between, batch_name, uncounted
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.types import PromptBatch, Responses

BLOCK = 256  # tokens of the vocabulary in one partial sum of probabilities
# Tokens of prompts from which on equal ones are read once. A product with fewer than 4 rows is
# rounded in another way than one with more, and this is far above.
SHARED = 64


class Sampler(Protocol):
    """Samples responses: the loop below, or another engine with the same signature."""

    def __call__(
        self, prompts: PromptBatch, draws: Tensor, *, between: Callable[[], None] = ...
    ) -> Responses:
        """Sample (B, R) responses from the policy's current weights, R <= steps.

        Args:
            prompts: (B, P).
            draws: (B, steps) in [0, 1), the randomness of each token; an engine with its own
                random numbers uses only the number of steps and a seed from it.
            between: called before each token; it may raise.
        """


@dataclass(frozen=True)
class PolicySampler:
    """Samples in this process, with the weights that are trained."""

    policy: Policy
    temperature: float

    def __call__(
        self, prompts: PromptBatch, draws: Tensor, *, between: Callable[[], None] = lambda: None
    ) -> Responses:
        """See `sample`."""
        return self.with_logprobs(prompts, draws, between=between)[0]

    def with_logprobs(
        self, prompts: PromptBatch, draws: Tensor, *, between: Callable[[], None] = lambda: None
    ) -> tuple[Responses, Tensor]:
        """See `sample_with_logprobs`."""
        model = self.policy.model
        return sample_with_logprobs(
            self.policy,
            prompts,
            draws,
            temperature=self.temperature,
            eos_token_id=ending_ids(model),
            pad_token_id=model.config.pad_token_id,
            between=between,
        )


def respond(
    policy: Policy,
    prompts: Sequence[list[int]],
    config: SamplingConfig,
    *,
    generator: torch.Generator,
    between: Between = uncounted,
    what: str = "sampling",
) -> Iterator[tuple[PromptBatch, Responses]]:
    """Continue encoded prompts, `config.batch_size` at a time, in their order.

    Each batch is a phase named `what`, whose parts are tokens.
    """
    found = respond_with_logprobs(
        policy, prompts, config, generator=generator, between=between, what=what
    )
    for batch, responses, _ in found:
        yield batch, responses


def respond_with_logprobs(
    policy: Policy,
    prompts: Sequence[list[int]],
    config: SamplingConfig,
    *,
    generator: torch.Generator,
    between: Between = uncounted,
    what: str = "sampling",
) -> Iterator[tuple[PromptBatch, Responses, Tensor]]:
    """Like `respond`, with the (B, R) log-probabilities of `sample_with_logprobs`."""
    sampler = PolicySampler(policy, config.temperature)
    starts = range(0, len(prompts), config.batch_size)
    for number, start in enumerate(starts):
        batch = prompt_batch(
            policy, prompts[start : start + config.batch_size], config.max_prompt_length
        )
        draws = uniforms(len(batch.mask), config.max_new_tokens, generator)
        name = batch_name(what, number, len(starts))
        counted = between(name, config.max_new_tokens)
        yield batch, *sampler.with_logprobs(batch, draws, between=counted)


def prompt_batch(policy: Policy, prompts: Sequence[list[int]], max_length: int) -> PromptBatch:
    """Encoded prompts, of at most `max_length` tokens, as a batch on the policy's device."""
    model = policy.model
    return left_pad(prompts, model.config.pad_token_id, max_length).to(model.device)


def uniforms(rows: int, steps: int, generator: torch.Generator) -> Tensor:
    """(rows, steps) numbers in [0, 1), one for each token that may be drawn.

    They are drawn in advance, so that a row's text depends neither on the length of its neighbours
    nor on the device or process that samples it.
    """
    return torch.rand(rows, steps, generator=generator, device=generator.device)


def sample(
    policy: Policy,
    prompts: PromptBatch,
    draws: Tensor,
    *,
    temperature: float,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    between: Callable[[], None] = lambda: None,
) -> Responses:
    """Continue each prompt until a token that ends it, or for as many tokens as draws.

    a_t = F⁻¹(u_t), F the distribution function of softmax(logits_t / temperature); temperature 0
    takes the likeliest token.

    Adjacent rows with the same prompt read it once.

    Shapes: prompts (B, P); draws (B, steps) in [0, 1) -> tokens, mask (B, R), R <= steps;
    finished (B,). `between` is called before each token and may raise.
    """
    return sample_with_logprobs(
        policy,
        prompts,
        draws,
        temperature=temperature,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        between=between,
    )[0]


@torch.no_grad()
def sample_with_logprobs(
    policy: Policy,
    prompts: PromptBatch,
    draws: Tensor,
    *,
    temperature: float,
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    between: Callable[[], None] = lambda: None,
) -> tuple[Responses, Tensor]:
    """`sample`, with the (B, R) log-probability in nats of each token under the distribution that
    it was drawn from; 0 where masked.

    A forward pass over the whole text has other products, and so other rounding: in float32 some
    1e-5 nats a token, in bfloat16 much more (docs/architecture.md, Numbers). What is compared with
    another policy's has to be computed as that is.
    """
    policy.switch()
    model = policy.model
    rows, steps = draws.shape
    ends = torch.tensor(eos_token_id, device=prompts.mask.device)
    draws = draws.to(prompts.mask.device)
    tokens = torch.full((rows, steps), pad_token_id, device=draws.device)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    logprobs = torch.zeros_like(tokens, dtype=torch.float32)
    finished = mask.new_zeros(rows)
    alive = torch.arange(rows, device=draws.device)  # the unfinished rows, in any order
    read, said_by = _distinct(prompts)
    memory = continuation(model.base_model, read.mask, steps)
    step_ids, positions = read.input_ids, position_ids(read.mask)
    with policy.autocast_once():
        for t in range(steps):
            between()
            hidden = memory.read(step_ids, positions)
            if t == 0 and len(hidden) < rows:
                hidden, positions = hidden[said_by], positions[said_by]
                memory.keep(said_by)
            token, logprob = draw(policy.logits(hidden), draws[alive, t], temperature)
            tokens[alive, t], mask[alive, t], logprobs[alive, t] = token, True, logprob
            ended = torch.isin(token, ends)
            finished[alive] = ended
            step_ids, positions = token.unsqueeze(-1), positions[:, -1:] + 1
            if bool(ended.any()):
                going = _closed_up(ended)
                if not len(going):
                    break
                alive, step_ids, positions = alive[going], step_ids[going], positions[going]
                memory.keep(going)
    length = int(mask.any(0).sum())
    responses = Responses(tokens[:, :length], mask[:, :length], finished)
    return responses, logprobs[:, :length]


def _closed_up(ended: Tensor) -> Tensor:
    """(n,) the rows that go on. The last of them take the places of those that ended, and the
    others stay where they are, so that little of what the layers remember moves."""
    going = (~ended).nonzero().squeeze(1)
    left = len(going)
    rows = torch.arange(left, device=ended.device)
    rows[ended[:left]] = going[going >= left]
    return rows


def _distinct(prompts: PromptBatch) -> tuple[PromptBatch, Tensor]:
    """The prompts without those that equal the one before, and (B,) the index there of each row.

    All of them, if so few tokens are left that their states would be rounded in another way.
    """
    ids, mask = prompts.input_ids, prompts.mask
    new = (mask[1:] != mask[:-1]) | (mask[1:] & (ids[1:] != ids[:-1]))
    first = torch.cat([new.new_ones(1), new.any(-1)])[: len(ids)]
    if int(mask[first].sum()) < SHARED:
        return prompts, torch.arange(len(ids), device=ids.device)
    return PromptBatch(ids[first], mask[first]), first.cumsum(0) - 1


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The token at which the distribution function exceeds u, and its log-probability.

    It sums over blocks of the vocabulary and then within one block, which is faster than one sum
    over all of it, and more exact in float32. A token of probability 0 is never drawn.

    Args:
        logits: (B, V).
        uniform: (B,) in [0, 1).
        temperature: divides the logits; 0 takes the likeliest token, whose probability is then 1.

    Returns: (B,) token ids, and (B,) float32 nats.
    """
    if temperature == 0:
        token = logits.argmax(-1)
        return token, torch.zeros_like(token, dtype=torch.float32)
    weights = logits.float().sub(logits.amax(-1, keepdim=True)).div_(temperature).exp_()
    blocks = pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    of_block = blocks.sum(-1)
    total = of_block.sum(-1, keepdim=True)
    block, rest = _pass(of_block, uniform.unsqueeze(-1) * total)
    chosen = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
    within, _ = _pass(chosen, rest)
    logprob = chosen.gather(1, within).log() - total.log()
    return (block * BLOCK + within).squeeze(-1), logprob.squeeze(-1)


def _pass(weights: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n) weights and (B, 1) levels -> (B, 1) first index whose running sum exceeds the level,
    and by how much the level exceeds the sum before it."""
    sums = weights.cumsum(-1)
    # Rounding may put a level at the very end: step back below it, to an index with weight.
    level = torch.minimum(level, torch.nextafter(sums[:, -1:], sums.new_zeros(())))
    index = torch.searchsorted(sums, level, right=True)
    return index, level - (sums.gather(1, index) - weights.gather(1, index))

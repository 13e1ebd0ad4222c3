"""Sample a policy's answers to the held-out prompts, and measure them."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core.backbone.context import SAMPLING_LENGTH, context_of, require_context
from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.responses import ResponseRows, lay_out, response_logprobs
from rlhf_core.backbone.sampling import respond_with_logprobs
from rlhf_core.data.encoding import (
    Prompt,
    decode_responses,
    encode_prompt,
    encode_response,
    left_pad,
    render_prompt,
    right_pad,
    same_tokens,
)
from rlhf_core.metrics import StageLogger, counted
from rlhf_core.rewards.functions import RewardFunction, call_function
from rlhf_core.rewards.models import RewardModel
from rlhf_core.rewards.scoring import Reward
from rlhf_core.seeding import generator
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.rewards import PIPELINE_REWARD, RewardTerm
from rlhf_core.types import PromptBatch, Responses


@dataclass(frozen=True)
class Answers:
    """The answers of an arm: several to each prompt, prompt by prompt."""

    texts: list[str]
    prompt: Tensor  # (N,) index of the prompt
    tokens: Tensor  # (N,) length
    proxy: Tensor  # (N,) normalised reward-model score
    true: Tensor | None  # (N,)
    kl: Tensor | None  # (N,) log π - log π_sft, summed over the response
    sft_logprob: Tensor  # (N,) log π_sft, summed over the response, at temperature 1
    finished: Tensor | None = None  # (N,) bool, whether the policy ended it; None = unknown

    def pick(self, index: Tensor) -> "Answers":
        """Some of the answers."""
        return Answers(
            texts=[self.texts[i] for i in index.tolist()],
            prompt=self.prompt[index],
            tokens=self.tokens[index],
            proxy=self.proxy[index],
            true=None if self.true is None else self.true[index],
            kl=None if self.kl is None else self.kl[index],
            sft_logprob=self.sft_logprob[index],
            finished=None if self.finished is None else self.finished[index],
        )


@dataclass(frozen=True)
class Bench:
    """The prompts, models and settings with which every arm is measured."""

    prompts: list[Prompt]
    sft: Policy
    tokenizer: PreTrainedTokenizerBase
    reward_model: RewardModel
    reward_tokenizer: PreTrainedTokenizerBase
    truth: RewardFunction | None
    sampling: SamplingConfig
    seed: int
    logger: StageLogger


@torch.no_grad()
def answer(
    bench: Bench,
    name: str,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    k: int,
) -> Answers:
    """k answers of a policy to each prompt, measured; the name decides the random draws.

    A text is read once by the reward model, and once by the SFT policy unless that wrote it. In
    float32 its log-probability under the policy that wrote it is what sampling has found: reading
    it again would give the same but for rounding, 1e-5 nats a token. In bfloat16 the two differ by
    more, so there the KL compares two policies that have both read the text.
    """
    require_context(policy.model, bench.sampling.max_length, SAMPLING_LENGTH)
    prompts = [prompt for prompt in bench.prompts for _ in range(k)]
    longest, at = bench.sampling.max_prompt_length, bench.sampling.temperature
    encoded = [encode_prompt(prompt, tokenizer, longest) for prompt in bench.prompts]
    rows = [prompt for prompt in encoded for _ in range(k)]
    comparable = same_tokens(tokenizer, bench.tokenizer)
    texts: list[str] = []
    tokens, finished, proxy, sft_logprob, kl = [], [], [], [], []
    reward = Reward(
        [RewardTerm()],
        {PIPELINE_REWARD: bench.reward_model},
        {PIPELINE_REWARD: bench.reward_tokenizer},
        tokenizer,
        max_length=bench.sampling.max_length,
    )
    is_sft = comparable and _same_weights(policy, bench.sft)
    draws, between = generator(bench.seed, f"evaluation/{name}"), partial(counted, bench.logger)
    for batch, responses, drawn in respond_with_logprobs(
        policy, rows, bench.sampling, generator=draws, between=between, what="answers"
    ):
        bench.logger.phase("scoring", len(texts), len(rows))
        batch_texts = decode_responses(responses.tokens, responses.mask, tokenizer)
        batch_prompts = prompts[len(texts) : len(texts) + len(batch_texts)]
        response_rows = lay_out(batch, responses)
        proxy.append(reward(batch_prompts, response_rows, responses).total)
        known_sft = None
        ours = drawn.sum(-1) if policy.precision == "float32" else None
        if is_sft:
            kl.append(torch.zeros_like(drawn[:, 0]))
            known_sft = ours if at == 1 else None
        elif comparable:
            bench.logger.phase("KL to SFT", len(texts), len(rows))
            ours = _sums(policy, response_rows, at) if ours is None else ours
            theirs = _sums(bench.sft, response_rows, at)
            kl.append(ours - theirs)
            known_sft = theirs if at == 1 else None
        else:
            batch, responses = _reencode(bench, batch_prompts, batch_texts, responses)
            response_rows = lay_out(batch, responses)
        if known_sft is None:
            bench.logger.phase("perplexity under SFT", len(texts), len(rows))
            known_sft = _sums(bench.sft, response_rows, 1.0)
        texts += batch_texts
        tokens.append(responses.mask.sum(-1).float())
        finished.append(responses.finished)
        sft_logprob.append(known_sft)
    return Answers(
        texts=texts,
        prompt=torch.arange(len(bench.prompts)).repeat_interleave(k),
        tokens=torch.cat(tokens).cpu(),
        proxy=torch.cat(proxy).cpu(),
        true=_truth(bench, prompts, texts),
        kl=torch.cat(kl).cpu() if comparable else None,
        sft_logprob=torch.cat(sft_logprob).cpu(),
        finished=torch.cat(finished).cpu(),
    )


def _same_weights(ours: Policy, theirs: Policy) -> bool:
    """Whether two policies are one: of the same class, with the same weights to the bit."""
    if ours is theirs:
        return True
    if type(ours.model) is not type(theirs.model):
        return False
    mine, others = ours.model.state_dict(), theirs.model.state_dict()
    return mine.keys() == others.keys() and all(
        torch.equal(weight, others[name]) for name, weight in mine.items()
    )


def _sums(policy: Policy, response_rows: ResponseRows, temperature: float) -> Tensor:
    """(B,) log-probability of each whole response in nats."""
    return response_logprobs(policy, response_rows, temperature=temperature).sum(-1)


def _reencode(
    bench: Bench, prompts: list[Prompt], texts: list[str], responses: Responses
) -> tuple[PromptBatch, Responses]:
    """Texts of a policy with another tokenizer, in the tokens of the SFT policy."""
    tokenizer, device = bench.tokenizer, bench.sft.model.device
    longest = bench.sampling.max_prompt_length
    rows = [encode_prompt(prompt, tokenizer, longest) for prompt in prompts]
    batch = left_pad(rows, tokenizer.pad_token_id, longest).to(device)
    kept = [
        encode_response(text, tokenizer, chat=not isinstance(prompt, str), ended=ended)
        or [tokenizer.eos_token_id]
        for prompt, text, ended in zip(prompts, texts, responses.finished.tolist(), strict=True)
    ]
    context = context_of(bench.sft.model)
    if context is not None:  # the text may be longer in these tokens
        kept = [ids[: context - batch.input_ids.shape[-1]] for ids in kept]
    tokens, mask = right_pad(kept, tokenizer.pad_token_id)
    return batch, Responses(tokens.to(device), mask.to(device), responses.finished)


def _truth(bench: Bench, prompts: list[Prompt], texts: list[str]) -> Tensor | None:
    """(N,) true reward of each answer; None if no truth is known."""
    if bench.truth is None:
        return None
    bench.logger.phase("true reward")
    rendered = [render_prompt(prompt, bench.tokenizer) for prompt in prompts]
    return call_function(bench.truth, "evaluation.true_reward", rendered, texts)

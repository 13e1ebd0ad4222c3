"""Samples of a policy on the monitor's prompts, with everything that is measured of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.responses import lay_out, response_logprobs, with_shared_states
from rlhf_core.backbone.sampling import PolicySampler, prompt_batch, uniforms
from rlhf_core.metrics import Between, batch_name
from rlhf_core.onpolicy.experience import PromptTable
from rlhf_core.rewards.scoring import Reward
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.training.learner import require_finite
from rlhf_core.training.order import chunks
from rlhf_core.training.ranks import Ranks
from rlhf_core.types import PromptBatch, Responses


@dataclass(frozen=True)
class Samples:
    """N responses, one a row, on the CPU. A column that is not measured has width 0."""

    tokens: Tensor  # (N, R) int64
    mask: Tensor  # (N, R) bool
    finished: Tensor  # (N,) bool
    logprobs: Tensor  # (N, R) log π(a|s), 0 where masked
    ref_logprobs: Tensor  # (N, R) log π_ref(a|s), 0 where masked
    proxy: Tensor  # (N,) the reward that the policy is trained on
    held_out: Tensor  # (N, 1) the held-out reward model, or (N, 0)
    members: Tensor  # (N, K) the members of the reward model, or (N, 0)
    states: Tensor  # (N, d) last hidden states of the reward model, or (N, 0)

    def rows(self, index: Tensor) -> Self:
        """Some of the samples."""
        return type(self)(*(column[index] for column in vars(self).values()))

    def to(self, device: str) -> Self:
        """The same samples on another device."""
        return type(self)(*(column.to(device) for column in vars(self).values()))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All samples of several parts."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(_stack(column) for column in columns))


@dataclass(frozen=True)
class Watched:
    """Samples responses to fixed prompts and scores them."""

    prompts: PromptTable
    policy: Policy  # that is trained
    reference: Policy
    reward: Reward
    held_out: Reward | None
    sampling: SamplingConfig
    micro_batch_size: int
    ranks: Ranks
    between: Between

    @torch.no_grad()
    def respond(self, policy: Policy, draws: torch.Generator, what: str) -> Samples:
        """One response of the policy or the reference to each prompt; the same on every rank.

        Raises: NumericsError naming the tensor that is not finite.
        """
        number = len(self.prompts.tokens)
        numbers = uniforms(number, self.sampling.max_new_tokens, draws)
        rows = self.ranks.share(range(number))
        with self.ranks.whole(self.policy):  # the reference may share its transformer
            parts = self._measured(policy, numbers, rows, what) if rows else []
        samples = self.ranks.gather(parts, rows, Samples.join).to("cpu")
        require_finite("the reward of a monitor sample", samples.proxy)
        require_finite("its reward by the held-out reward model", samples.held_out)
        require_finite("the log-probability of a monitor sample", samples.logprobs)
        require_finite("its log-probability under the reference", samples.ref_logprobs)
        return samples

    def _measured(
        self, policy: Policy, numbers: Tensor, rows: list[int], what: str
    ) -> list[Samples]:
        sampler, size = PolicySampler(policy, self.sampling.temperature), self.sampling.batch_size
        batches = list(chunks(rows, size))
        parts = []
        for index, batch in enumerate(batches):
            prompts = self.prompts.pick(batch)
            padded = prompt_batch(policy, prompts.tokens, self.sampling.max_prompt_length)
            name = batch_name(what, index, len(batches))
            said = sampler(padded, numbers[batch], between=self.between(name, numbers.shape[1]))
            for micro in chunks(list(range(len(batch))), self.micro_batch_size):
                at = torch.tensor(micro, device=said.tokens.device)
                parts.append(
                    self._score(policy, prompts.pick(micro), padded.rows(at), said.rows(at))
                )
        return parts

    def _score(
        self, policy: Policy, prompts: PromptTable, padded: PromptBatch, said: Responses
    ) -> Samples:
        rows = with_shared_states(lay_out(padded, said), policy)
        temperature, nothing = self.sampling.temperature, torch.zeros(len(said.mask), 0)
        held_out = nothing
        if self.held_out is not None:
            held_out = self.held_out(prompts.prompts, rows, said).total.unsqueeze(-1)
        members, states = nothing, nothing
        readers = (reward for reward in (self.reward, self.held_out) if reward is not None)
        read = (reward.read_by_model(prompts.prompts, rows, said) for reward in readers)
        if found := next(filter(None, read), None):
            model, packed = found
            states, members = model.last_states(packed).float(), model.member_scores(packed).T
        return Samples(
            tokens=said.tokens,
            mask=said.mask,
            finished=said.finished,
            logprobs=response_logprobs(policy, rows, temperature=temperature),
            ref_logprobs=response_logprobs(self.reference, rows, temperature=temperature),
            proxy=self.reward(prompts.prompts, rows, said).total,
            held_out=held_out,
            members=members,
            states=states,
        ).to("cpu")


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate rows, padded at the end to the widest."""
    if parts[0].ndim == 1:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, width - part.shape[1])) for part in parts])

"""Experience: sampled responses, and what every network says about them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core.backbone.networks import Policy, ScalarModel
from rlhf_core.backbone.responses import (
    lay_out,
    response_logprobs,
    response_values,
    with_shared_states,
)
from rlhf_core.backbone.sampling import Sampler, SamplingConfig, prompt_batch, uniforms
from rlhf_core.data.encoding import Prompt, encode_prompt
from rlhf_core.data.prepared import read_table
from rlhf_core.errors import DataError
from rlhf_core.metrics import Between, batch_name, uncounted
from rlhf_core.onpolicy.config import OnPolicySection
from rlhf_core.rewards.scoring import Reward
from rlhf_core.training.learner import require_finite
from rlhf_core.training.order import chunks
from rlhf_core.training.ranks import Ranks
from rlhf_core.types import PromptBatch, Responses, Rollout


@dataclass(frozen=True)
class PromptTable:
    """The prompts to train on, as they were response_rows and as tokens."""

    prompts: list[Prompt]
    tokens: list[list[int]]

    @classmethod
    def read(cls, data: Path, tokenizer: PreTrainedTokenizerBase) -> Self:
        """The training prompts of prepared data.

        Raises: DataError when there is none.
        """
        table = read_table(data, "prompts", "train")
        if table.empty:
            raise DataError(
                "there are no prompts to train on; add rows to data.prompts, or lower "
                "data.eval_fraction"
            )
        prompts = list(table["prompt"])
        return cls(prompts, [encode_prompt(prompt, tokenizer) for prompt in prompts])

    def pick(self, numbers: Sequence[int]) -> "PromptTable":
        """Some of them."""
        return PromptTable([self.prompts[i] for i in numbers], [self.tokens[i] for i in numbers])


@dataclass(frozen=True)
class Collector:
    """Collects experience: has responses sampled, and measures them with every network."""

    policy: Policy
    reference: Policy
    critic: ScalarModel | None
    reward: Reward
    sampler: Sampler
    config: OnPolicySection
    sampling: SamplingConfig
    draws: torch.Generator
    ranks: Ranks
    between: Between = uncounted

    @torch.no_grad()
    def roll_out(self, prompts: PromptTable) -> Rollout:
        """A response to each prompt, with log-probabilities, values and scores.

        Log-probabilities are those of a forward pass like that of the update, over the same rows in
        the same micro-batches, and not those of sampling, which in bfloat16 are rounded otherwise.

        Raises: NumericsError naming what is not finite.
        """
        size = self.config.batch_size
        draws = uniforms(len(prompts.tokens), self.sampling.max_new_tokens, self.draws)
        minibatches = [self.ranks.share(b) for b in chunks(list(range(len(prompts.tokens))), size)]
        own = [row for minibatch in minibatches for row in minibatch]
        with self.ranks.whole(self.policy, self.critic):
            measured = self._experience(prompts, draws, minibatches, own) if own else []
        rollout = self.ranks.gather(measured, own, Rollout.join)
        require_finite("the reward-model score", rollout.scores)
        require_finite("the log-probability of a sampled token", rollout.logprobs)
        require_finite("its log-probability under the reference", rollout.ref_logprobs)
        require_finite("the critic's value", rollout.values)
        return rollout

    def _experience(
        self, prompts: PromptTable, draws: Tensor, minibatches: list[list[int]], own: list[int]
    ) -> list[Rollout]:
        """That of this rank's rows, by minibatch."""
        batches = list(chunks(own, self.sampling.batch_size))
        parts = [
            self._respond(
                prompts.pick(rows),
                draws[rows],
                self.between(batch_name("sampling", number, len(batches)), draws.shape[1]),
            )
            for number, rows in enumerate(batches)
        ]
        bare = Rollout.join([Rollout.unmeasured(*part) for part in parts])
        places = {row: place for place, row in enumerate(own)}
        micros = [m for rows in minibatches for m in chunks(rows, self.config.micro_batch_size)]
        between = self.between("scoring", len(micros))
        measured = []
        for rows in micros:
            between()
            index = torch.tensor([places[row] for row in rows])
            part = bare.rows(index.to(bare.responses.tokens.device))
            measured.append(self._measure(part, prompts.pick(rows).prompts))
        return measured

    def _respond(
        self, prompts: PromptTable, draws: Tensor, between: Callable[[], None]
    ) -> tuple[PromptBatch, Responses]:
        batch = prompt_batch(self.policy, prompts.tokens, self.sampling.max_prompt_length)
        return batch, self.sampler(batch, draws, between=between)

    def _measure(self, bare: Rollout, prompts: list[Prompt]) -> Rollout:
        response_rows = with_shared_states(lay_out(bare.prompts, bare.responses), self.policy)
        temperature = self.sampling.temperature
        scores = self.reward(prompts, response_rows, bare.responses)
        logprobs = response_logprobs(self.policy, response_rows, temperature=temperature)
        values = torch.zeros_like(logprobs)
        if self.critic is not None:
            values = response_values(self.critic, response_rows)
        return Rollout(
            prompts=bare.prompts,
            responses=bare.responses,
            logprobs=logprobs,
            ref_logprobs=response_logprobs(self.reference, response_rows, temperature=temperature),
            values=values,
            scores=scores.total,
            parts=scores.parts,
            below=response_rows.shared_states(),
        )

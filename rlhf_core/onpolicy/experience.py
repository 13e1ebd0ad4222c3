"""Experience: sampled responses, with log-probabilities, values and scores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from rlhf_core.backbone.sampling import PolicySampler, prompt_batch, uniforms
from rlhf_core.data.encoding import Prompt
from rlhf_core.data.mapped.training import Place, prompts_of
from rlhf_core.engines.engine import Engine
from rlhf_core.engines.mismatch import with_importance
from rlhf_core.errors import DataError
from rlhf_core.metrics import Between, uncounted
from rlhf_core.rewards.scoring import Reward
from rlhf_core.rewards.shaping import Shaping
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.onpolicy import OnPolicySection
from rlhf_core.training.learner import require_finite
from rlhf_core.training.order import chunks
from rlhf_core.training.ranks import Ranks
from rlhf_core.types import Rollout


@dataclass(frozen=True)
class PromptTable:
    """The prompts to train on, as text and as tokens."""

    prompts: Sequence[Prompt]
    tokens: Sequence[list[int]]
    numbers: Sequence[int]  # in the whole table

    @classmethod
    def read(
        cls,
        data: Path,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        folder: Path | None = None,
    ) -> Self:
        """The training prompts of prepared data, of at most `max_length` tokens.

        Args:
            folder: where the tokens are kept; None = until the process ends.

        Raises: DataError when there are none.
        """
        prompts, tokens = prompts_of(Place(data, tokenizer, folder), "prompts", "train", max_length)
        if not len(prompts):
            raise DataError(
                "there are no prompts to train on; add rows to data.prompts, or lower "
                "data.eval_fraction"
            )
        return cls(prompts, tokens, range(len(prompts)))

    def pick(self, numbers: Sequence[int]) -> "PromptTable":
        """Some of the prompts."""
        return PromptTable(
            [self.prompts[i] for i in numbers],
            [self.tokens[i] for i in numbers],
            [self.numbers[i] for i in numbers],
        )


@dataclass(frozen=True)
class Collector:
    """Collects experience: samples responses and scores them with every network."""

    policy: Policy
    reference: Policy
    critic: ScalarModel | None
    reward: Reward
    engine: Engine
    config: OnPolicySection
    sampling: SamplingConfig
    draws: torch.Generator
    ranks: Ranks
    shaping: Shaping | None = None
    between: Between = uncounted

    @torch.no_grad()
    def roll_out(self, prompts: PromptTable) -> Rollout:
        """Sample a response to each prompt, with log-probabilities, values and scores.

        Log-probabilities come from a forward pass like that of the update, over the same rows in
        the same micro-batches. Those of sampling would be rounded differently in bfloat16.

        Raises: NumericsError naming the tensor that is not finite, or when the engine that sampled
        is too far from the policy; EngineError when it fails.
        """
        size = self.config.batch_size
        draws = uniforms(len(prompts.tokens), self.sampling.max_new_tokens, self.draws)
        minibatches = [self.ranks.share(b) for b in chunks(list(range(len(prompts.tokens))), size)]
        rows = [row for minibatch in minibatches for row in minibatch]
        with self.ranks.whole(self.policy, self.critic):
            self.engine.refresh()
            scored = self._experience(prompts, draws, minibatches, rows) if rows else []
            if self.shaping is not None:
                self._add_references(prompts, self.shaping)
        rollout = self.ranks.gather(scored, rows, Rollout.join)
        require_finite("the reward-model score", rollout.scores)
        if rollout.spread is not None:
            require_finite("the spread of the members", rollout.spread)
        require_finite("the log-probability of a sampled token", rollout.logprobs)
        require_finite("its log-probability under the reference", rollout.ref_logprobs)
        require_finite("the critic's value", rollout.values)
        rollout = with_importance(rollout, self.sampling)
        if self.shaping is None:
            return rollout
        lengths = rollout.responses.mask.sum(-1)
        return replace(rollout, shaped=self.shaping(rollout.scores, lengths, list(prompts.numbers)))

    def _add_references(self, prompts: PromptTable, shaping: Shaping) -> None:
        """Have the reference policy answer the prompts that are new, and keep the rewards."""
        if not (new := shaping.unknown(prompts.numbers)):
            return
        places = [prompts.numbers.index(number) for number in new]
        answers = prompts.pick([p for p in places for _ in range(shaping.config.reference_answers)])
        draws = uniforms(len(answers.tokens), self.sampling.max_new_tokens, shaping.draws)
        sampler = PolicySampler(self.reference, self.sampling.temperature)

        def score(rows: list[int]) -> Tensor:
            picked = answers.pick(rows)
            batch = prompt_batch(self.reference, picked.tokens, self.sampling.max_prompt_length)
            responses = sampler(batch, draws[rows])
            return self.reward(picked.prompts, lay_out(batch, responses), responses).total

        size = self.sampling.batch_size
        between = self.between("reference answers", self.ranks.passes(len(answers.tokens), size))
        scores = self.ranks.collect(len(answers.tokens), size, score, between)
        require_finite("the reward-model score of a reference answer", scores)
        shaping.keep_reference(new, scores.view(len(new), -1))

    def _experience(
        self, prompts: PromptTable, draws: Tensor, minibatches: list[list[int]], all_rows: list[int]
    ) -> list[Rollout]:
        """The experience of this rank's rows, one roll-out for each micro-batch."""
        asked = prompts.pick(all_rows).tokens
        parts = self.engine.respond(asked, draws[all_rows], self.between)
        unscored = Rollout.join([Rollout.unmeasured(*part) for part in parts])
        index_of = {row: index for index, row in enumerate(all_rows)}
        micros = [m for rows in minibatches for m in chunks(rows, self.config.micro_batch_size)]
        between = self.between("scoring", len(micros))
        scored = []
        for rows in micros:
            between()
            index = torch.tensor([index_of[row] for row in rows])
            part = unscored.rows(index.to(unscored.responses.tokens.device))
            scored.append(self._score(part, list(prompts.pick(rows).prompts)))
        return scored

    def _score(self, unscored: Rollout, prompts: list[Prompt]) -> Rollout:
        rows = with_shared_states(lay_out(unscored.prompts, unscored.responses), self.policy)
        temperature = self.sampling.temperature
        scores = self.reward(prompts, rows, unscored.responses)
        logprobs = response_logprobs(self.policy, rows, temperature=temperature)
        values = torch.zeros_like(logprobs)
        if self.critic is not None:
            values = response_values(self.critic, rows)
        return Rollout(
            prompts=unscored.prompts,
            responses=unscored.responses,
            logprobs=logprobs,
            ref_logprobs=response_logprobs(self.reference, rows, temperature=temperature),
            values=values,
            scores=scores.total,
            parts=scores.parts,
            below=rows.shared_states(),
            spread=scores.spread,
            sampled=unscored.sampled,
        )

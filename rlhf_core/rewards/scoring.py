"""The reward of a text: one reward model, or several parts combined.

    total = combine(weight · part),   part = the normalised score of a model, or of a function

A model with the policy's tokenizer reads the sampled tokens themselves. For any other, the response
is decoded, and prompt and response are encoded as that model was trained on them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core.backbone.context import SAMPLING_LENGTH, context_of, require_context
from rlhf_core.backbone.packing import Packed, pack
from rlhf_core.backbone.responses import ResponseRows
from rlhf_core.data.encoding import (
    PLAIN_CHAT_TEMPLATE,
    Prompt,
    decode_responses,
    encode_answers,
    render_prompt,
    same_tokens,
)
from rlhf_core.errors import ConfigError
from rlhf_core.functional.kinds import Combination
from rlhf_core.functional.rewards import combine
from rlhf_core.rewards.functions import (
    RewardFunction,
    RewardPlaces,
    call_function,
    load_function,
)
from rlhf_core.rewards.models import RewardModel, load_reward_model, scores_and_spread
from rlhf_core.settings.model import Precision
from rlhf_core.settings.rewards import MEAN, MemberSection, RewardTerm, check_terms
from rlhf_core.types import Responses


class Scores(NamedTuple):
    """The rewards of some texts."""

    total: Tensor  # (B,) weighted parts combined
    parts: dict[str, Tensor]  # (B,) each, unweighted, by name
    # (B,) how far the members of reward models disagree: √Σ (weight·std of the members)² over the
    # parts that have members; None without one
    spread: Tensor | None = None


class Reward:
    """Combines several weighted parts into one reward.

    Args:
        terms: the parts.
        models: by source, for the terms that are models.
        tokenizers: of these models, by source.
        policy_tokenizer: of the texts to score.
        max_length: tokens of the longest text that the policy writes.
        combination: how the weighted parts are combined.
        variance_coef: λ of mean_minus_variance.
        places: where functions may come from; None = anywhere.

    Raises: ConfigError when a function cannot be imported, or when the context of a model with the
    policy's tokenizer is too short. For a model with another tokenizer, texts are cut.
    """

    def __init__(
        self,
        terms: Sequence[RewardTerm],
        models: Mapping[str, RewardModel],
        tokenizers: Mapping[str, PreTrainedTokenizerBase],
        policy_tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        combination: Combination = "sum",
        variance_coef: float = 1.0,
        places: RewardPlaces | None = None,
    ) -> None:
        check_terms(terms)
        self._combine = partial(combine, how=combination, variance_coef=variance_coef)
        self._tokenizer = policy_tokenizer
        self._weights = {term.name: term.weight for term in terms}
        self._models, self._tokenizers = models, tokenizers
        self._first_model = next((term.source for term in terms if term.is_model), None)
        self._scorers: dict[str, _Scorer] = {}
        for term in terms:
            if not term.is_model:
                function = load_function(term.source, setting="the reward", places=places)
                scorer: _Scorer = partial(_by_function, function, f"the reward '{term.source}'")
            elif same_tokens(policy_tokenizer, tokenizers[term.source]):
                require_context(models[term.source].model, max_length, SAMPLING_LENGTH)
                scorer = partial(_by_tokens, models[term.source])
            else:
                scorer = partial(_by_text, models[term.source], tokenizers[term.source])
            self._scorers[term.name] = scorer

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], response_rows: ResponseRows, responses: Responses
    ) -> Scores:
        """Score B texts: `response_rows` are the tokens of `responses` to `prompts`.

        Functions, and models with another tokenizer, read the whole prompt even if it was cut in
        `response_rows`.

        Raises: ConfigError when a function fails or does not return one finite number each.
        """
        answers = _Answers(prompts, response_rows, responses, self._tokenizer)
        found = {name: scorer(answers) for name, scorer in self._scorers.items()}
        parts = {name: part for name, (part, _) in found.items()}
        weighted = [self._weights[name] * part for name, part in parts.items()]
        spreads = [
            (self._weights[name] * spread).square()
            for name, (_, spread) in found.items()
            if spread is not None
        ]
        spread = torch.stack(spreads).sum(0).sqrt() if spreads else None
        return Scores(self._combine(torch.stack(weighted)), parts, spread)

    def read_by_model(
        self, prompts: Sequence[Prompt], response_rows: ResponseRows, responses: Responses
    ) -> tuple[RewardModel, Packed] | None:
        """The first reward model and the texts as it reads them; None if all parts are functions.

        For who looks into a model instead of asking for its score.
        """
        if self._first_model is None:
            return None
        model, tokenizer = self._models[self._first_model], self._tokenizers[self._first_model]
        if same_tokens(self._tokenizer, tokenizer):
            return model, response_rows.packed
        answers = _Answers(prompts, response_rows, responses, self._tokenizer)
        return model, _read_text(model, tokenizer, answers)


def reward_directories(terms: Sequence[RewardTerm], inputs: Mapping[str, Path]) -> dict[str, Path]:
    """The directories of the terms' reward models by source, from a stage's inputs by role."""
    return {term.source: inputs[term.role] for term in terms if term.role in inputs}


def load_reward(
    terms: Sequence[RewardTerm],
    directories: Mapping[str, Path],
    policy_tokenizer: PreTrainedTokenizerBase,
    device: str,
    precision: Precision = "float32",
    *,
    max_length: int,
    loaded: Mapping[str, RewardModel] | None = None,
    combination: Combination = "sum",
    variance_coef: float = 1.0,
    members: MemberSection = MEAN,
    places: RewardPlaces | None = None,
) -> Reward:
    """Load a reward whose models are in these directories, by source.

    Models in `loaded` share the policy's trunk, and so its tokenizer; they need no directory.
    `members` says how the members of an ensemble become one reward.

    Raises: ConfigError when a term has no directory, or as `Reward` does; ModelError when a
    directory has no reward model.
    """
    models = dict(loaded or {})
    tokenizers = dict.fromkeys(models, policy_tokenizer)
    for source in (term.source for term in terms if term.is_model and term.source not in models):
        if source not in directories:
            known = ", ".join(directories) or "none"
            raise ConfigError(
                f"the reward '{source}' has no model directory (got: {known}); pass its "
                "directory, or remove this part"
            )
        models[source], tokenizers[source] = load_reward_model(
            directories[source], device, precision, members=members
        )
    return Reward(
        terms,
        models,
        tokenizers,
        policy_tokenizer,
        max_length=max_length,
        combination=combination,
        variance_coef=variance_coef,
        places=places,
    )


@dataclass(frozen=True)
class _Answers:
    """The answers of a policy, as tokens and as text."""

    prompts: Sequence[Prompt]
    response_rows: ResponseRows
    responses: Responses
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def texts(self) -> list[str]:
        """Each response, without special tokens."""
        return decode_responses(self.responses.tokens, self.responses.mask, self.tokenizer)


_Scored: TypeAlias = tuple[Tensor, Tensor | None]  # (B,) each: the score, the members' spread
_Scorer: TypeAlias = Callable[[_Answers], _Scored]


def _by_tokens(model: RewardModel, answers: _Answers) -> _Scored:
    return scores_and_spread(model, answers.response_rows.packed)


def _by_text(model: RewardModel, tokenizer: PreTrainedTokenizerBase, answers: _Answers) -> _Scored:
    return scores_and_spread(model, _read_text(model, tokenizer, answers))


def _read_text(model: RewardModel, tokenizer: PreTrainedTokenizerBase, answers: _Answers) -> Packed:
    room = context_of(model.model) or sys.maxsize
    spaced = answers.tokenizer.chat_template in (None, PLAIN_CHAT_TEMPLATE)
    rows = []
    finished = answers.responses.finished.tolist()
    for prompt, text, ended in zip(answers.prompts, answers.texts, finished, strict=True):
        if spaced and not isinstance(prompt, str):
            text = text.removeprefix(" ")  # from the policy's template, not part of the answer
        found = encode_answers(prompt, [text], tokenizer, room, ended=ended)
        rows.append(found.prompt + found.responses[0] or [tokenizer.eos_token_id])
    return pack(rows, model.model.device)


def _by_function(function: RewardFunction, name: str, answers: _Answers) -> _Scored:
    prompts = [render_prompt(prompt, answers.tokenizer) for prompt in answers.prompts]
    values = call_function(function, name, prompts, answers.texts)
    return values.to(answers.responses.tokens.device), None

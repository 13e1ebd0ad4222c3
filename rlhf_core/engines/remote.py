"""Responses that servers sample with the weights of the policy, and the checks of what they say.

Before each roll-out the policy is saved to a folder that the servers see too, an adapter merged,
and they take it over under a new version. A server that was restarted, or that somebody else uses,
has another one, and its answers are refused. Nothing else is believed either: ids outside the
vocabulary, text after an end, and log-probabilities that are none, would train it on noise.
"""

import math
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.sampling import prompt_batch
from rlhf_core.backbone.tokens import ending_ids
from rlhf_core.engines.client import Answer, EnginePlace, Question, Rules
from rlhf_core.engines.engine import Sampled
from rlhf_core.errors import EngineError
from rlhf_core.metrics import Between
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.training.ranks import Ranks
from rlhf_core.types import Responses

HIGHEST, LOWEST = 1e-3, -1e3  # nats: of the log-probability of a token that was drawn
_BITS = 24  # of a draw in float32


class Remote:
    """An engine whose servers are at a place.

    Args:
        tokenizer: is saved beside the weights.
    """

    def __init__(
        self,
        place: EnginePlace,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        config: SamplingConfig,
        ranks: Ranks,
    ) -> None:
        self._client = place.client()
        self._folder = place.folder.absolute()
        self._policy = policy
        self._tokenizer = tokenizer
        self._config = config
        self._ranks = ranks
        self._version = ""
        self._seconds = {"engine/seconds": 0.0, "engine/sync_seconds": 0.0}

    def check(self) -> None:
        """Raise EngineError unless every rank reaches servers that can do what is needed."""
        self._client.check(self._config.max_length)

    def refresh(self) -> None:
        """Save the policy, and have the servers take it over under a new version.

        Raises: EngineError when one of them does not.
        """
        began = time.monotonic()
        self._version = self._ranks.from_main(secrets.token_hex(8))
        if self._ranks.main:
            self._publish(self._version)
        self._ranks.from_main(None)  # no rank asks before the servers are ready
        self._seconds["engine/sync_seconds"] = time.monotonic() - began

    def _publish(self, version: str) -> None:
        folder = self._folder / version
        part = folder.with_suffix(".part")
        self._policy.save(self._tokenizer, part, {}, untied=True)
        part.rename(folder)
        self._client.load(folder, version)
        # The servers may read theirs again, so it stays until they have the next.
        for other in self._folder.iterdir():
            if other != folder:
                shutil.rmtree(other)

    def respond(
        self, prompts: Sequence[list[int]], draws: Tensor, between: Between
    ) -> list[Sampled]:
        """Have the servers answer all prompts at once; the parts of the phase are answers.

        Raises: EngineError when an answer cannot be one of this policy.
        """
        began = time.monotonic()
        model, steps = self._policy.model, draws.shape[1]
        batch = prompt_batch(self._policy, prompts, self._config.max_prompt_length)
        rules = Rules(self._config.temperature, steps, ending_ids(model))
        questions = [
            Question(ids[mask].tolist(), seed)
            for ids, mask, seed in zip(
                batch.input_ids.cpu(), batch.mask.cpu(), seeds(draws), strict=True
            )
        ]
        tokens = torch.full(draws.shape, int(model.config.pad_token_id))
        mask = torch.zeros(draws.shape, dtype=torch.bool)
        logprobs = torch.zeros(draws.shape)
        finished = torch.zeros(len(draws), dtype=torch.bool)
        tell = between("sampling", len(questions))
        vocabulary = model.get_output_embeddings().weight.shape[0]
        with closing(self._client.answers(questions, rules)) as answers:
            for row, answer in answers:
                tell()
                self._require(answer, rules, vocabulary)
                length = len(answer.tokens)
                tokens[row, :length] = torch.tensor(answer.tokens)
                mask[row, :length] = True
                logprobs[row, :length] = torch.tensor(answer.logprobs)
                finished[row] = answer.tokens[-1] in rules.ends
        length = int(mask.any(0).sum())
        device = batch.mask.device
        self._seconds["engine/seconds"] = time.monotonic() - began
        responses = Responses(
            tokens[:, :length].to(device), mask[:, :length].to(device), finished.to(device)
        )
        return [Sampled(batch, responses, logprobs[:, :length].to(device))]

    def _require(self, answer: Answer, rules: Rules, vocabulary: int) -> None:
        """Raise EngineError unless the policy can have given this answer."""
        if answer.version != self._version:
            raise EngineError(
                f"the server at {answer.source} drew with the weights '{answer.version}', and not "
                f"with those that it was given ('{self._version}'): it was restarted, or somebody "
                "else uses it; give each run servers of its own, then repeat the command to go on"
            )
        fault = _fault(answer, rules, vocabulary)
        if fault:
            raise EngineError(
                f"the server at {answer.source} gave an answer that cannot be one of this policy: "
                f"{fault}; check that it serves a model of this architecture and its version "
                "(docs/engines.md), then repeat the command to go on"
            )

    def spent(self) -> Mapping[str, float]:
        """Seconds that the last roll-out took, and those that the weights took before it, as the
        main rank saw them."""
        return self._ranks.from_main(dict(self._seconds))


def seeds(draws: Tensor) -> list[int]:
    """A seed for each row, of up to 48 bits, from the first two of its (B, steps) draws."""
    whole = (draws[:, :2].double() * 2**_BITS).long().tolist()
    return [sum(part << (_BITS * place) for place, part in enumerate(row)) for row in whole]


def _fault(answer: Answer, rules: Rules, vocabulary: int) -> str:
    """Why the policy cannot have given an answer; empty if it can."""
    tokens, logprobs = answer.tokens, answer.logprobs
    if not 1 <= len(tokens) <= rules.max_tokens:
        return f"it has {len(tokens)} tokens, and 1 to {rules.max_tokens} were asked for"
    if len(logprobs) != len(tokens):
        return f"it has {len(tokens)} tokens and {len(logprobs)} log-probabilities"
    if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
        return f"token {wrong[0]} is not in the vocabulary of {vocabulary}"
    if any(token in rules.ends for token in tokens[:-1]):
        return "it goes on after a token that ends it"
    if tokens[-1] not in rules.ends and len(tokens) < rules.max_tokens:
        return f"it stops after {len(tokens)} tokens without one that ends it"
    if bad := [x for x in logprobs if not (math.isfinite(x) and LOWEST < x <= HIGHEST)]:
        return f"{bad[0]} is not the log-probability of a token that was drawn"
    return ""

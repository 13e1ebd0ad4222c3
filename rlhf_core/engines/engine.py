"""An engine samples the responses of a roll-out; here the one in this process.

The other one, `Remote`, has a server do it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.sampling import Sampler, prompt_batch
from rlhf_core.metrics import Between, batch_name
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.training.order import chunks
from rlhf_core.types import PromptBatch, Responses


class Sampled(NamedTuple):
    """Responses to some prompts."""

    prompts: PromptBatch
    responses: Responses
    logprobs: Tensor | None  # (B, R) nats, as the engine computed them, 0 where masked


class Engine(Protocol):
    """Samples the responses of a roll-out."""

    def refresh(self) -> None:
        """Take over the weights of the policy. All ranks call this before each roll-out, with all
        weights gathered."""

    def respond(
        self, prompts: Sequence[list[int]], draws: Tensor, between: Between
    ) -> list[Sampled]:
        """Responses to all prompts, in their order, in one part or several.

        Args:
            draws: (B, steps) in [0, 1), the randomness of each row and token.
        """

    def spent(self) -> Mapping[str, float]:
        """What the roll-out took, as metrics; the same on all ranks, and all call it."""


@dataclass(frozen=True)
class Builtin:
    """Samples in this process, with the weights that are trained."""

    sampler: Sampler
    policy: Policy
    config: SamplingConfig

    def refresh(self) -> None:
        """Do nothing: the weights are those of the policy."""

    def respond(
        self, prompts: Sequence[list[int]], draws: Tensor, between: Between
    ) -> list[Sampled]:
        """Sample `batch_size` prompts at a time; the parts of a phase are tokens."""
        batches = list(chunks(list(range(len(prompts))), self.config.batch_size))
        found = []
        for number, rows in enumerate(batches):
            name = batch_name("sampling", number, len(batches))
            counted = between(name, draws.shape[1])
            picked = [prompts[row] for row in rows]
            batch = prompt_batch(self.policy, picked, self.config.max_prompt_length)
            found.append(Sampled(batch, self.sampler(batch, draws[rows], between=counted), None))
        return found

    def spent(self) -> Mapping[str, float]:
        """Nothing: the phases of the stage tell."""
        return {}

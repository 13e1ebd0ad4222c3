"""What a client of a server that samples has to do. A client is named as `module:factory`, so that
this package need not know how servers are reached."""

import importlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from rlhf_core.config import Section


class EnginePlace(Section):
    """Where servers that sample are, and who speaks to them; every rank gets it."""

    factory: str  # module:function, called with the addresses, gives a Client
    addresses: tuple[str, ...]
    folder: Path  # for weights; the servers see it under the same path

    def client(self) -> "Client":
        """A client of the servers.

        The factory is imported from where the program is; no config names it.
        """
        module, _, name = self.factory.partition(":")
        return cast(Client, getattr(importlib.import_module(module), name)(self.addresses))


@dataclass(frozen=True)
class Question:
    """A prompt to continue."""

    prompt: list[int]
    seed: int  # of its randomness


@dataclass(frozen=True)
class Answer:
    """What a server made of a prompt, not yet checked."""

    tokens: list[int]
    logprobs: list[float]  # nats, under the distribution that the tokens were drawn from
    version: str  # of the weights that drew them
    source: str  # the server, for messages


@dataclass(frozen=True)
class Rules:
    """How every prompt of a roll-out is continued: the whole distribution, without top-k or top-p,
    until a token of `ends`."""

    temperature: float
    max_tokens: int
    ends: Sequence[int]


class Client(Protocol):
    """Speaks to servers that sample."""

    def check(self, context: int) -> None:
        """Raise EngineError unless all servers can do what is needed, with texts of `context`
        tokens."""

    def load(self, folder: Path, version: str) -> None:
        """Have all servers take over the weights in a model directory, under the name `version`.

        Raises: EngineError when one of them does not.
        """

    def answers(self, questions: Sequence[Question], rules: Rules) -> Generator[tuple[int, Answer]]:
        """The number of each question and its answer, as they come.

        Raises: EngineError when one is not answered.
        """

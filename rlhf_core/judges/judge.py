"""What a judge is: it reads two answers to a prompt and says which is better.

Pair      two answers to one prompt
Verdict   which of them won, and why, if the judge says so
Judge     gives a verdict on each pair
Panel     a judge who is people, and takes days
Cost      what verdicts from outside have cost so far
Judging   what a stage needs from outside to build a judge: an endpoint, and a memory of verdicts
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from rlhf_core.data.encoding import Prompt
from rlhf_core.settings.judge import EndpointConfig, PeopleConfig

Winner: TypeAlias = Literal["a", "b", "tie"]


class Pair(NamedTuple):
    """Two answers to one prompt, in the order in which they are shown."""

    prompt: Prompt
    a: str
    b: str


@dataclass(frozen=True)
class Verdict:
    """Which answer of a pair is better."""

    winner: Winner | None  # None: the judge gave no usable answer, which is counted and no tie
    reason: str = ""  # in the words of the judge, if it gives one
    # whether it said the same with the answers exchanged; None for a judge without an order
    consistent: bool | None = None
    agreed: bool | None = None  # whether all people said the same; None for fewer than two


class Judge(Protocol):
    """Compares answers. It reads texts only, whoever wrote them."""

    @property
    def name(self) -> str:
        """What it is called in reports and metrics."""

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each pair.

        Raises: ConfigError when the judge cannot work at all, as with a wrong key.
        """


@runtime_checkable
class Panel(Judge, Protocol):
    """A judge who needs days: it is told of all pairs at once, and does not meet canaries."""

    def ahead(self, pairs: Sequence[Pair]) -> None:
        """Ask about pairs, the first ones first.

        Raises: VerdictsPendingError until enough of them are answered.
        """


class Cost(NamedTuple):
    """What the judges that a `Judging` made have cost so far."""

    requests: int = 0  # to endpoints, repeated ones included
    remembered: int = 0  # verdicts that cost no request
    tokens: int = 0  # of the requests, prompts and replies, as the endpoint counts them
    seconds: float = 0.0  # spent waiting for replies, added up over parallel requests


class Judging(Protocol):
    """How a stage reaches judges outside this package, and remembers what they said."""

    @property
    def cost(self) -> Cost:
        """What its judges have cost so far."""

    def endpoint(self, config: EndpointConfig) -> Judge:
        """The judge behind an OpenAI-compatible endpoint, which sees each pair in one order.

        Raises: ConfigError when the environment names no endpoint.
        """

    def people(self, config: PeopleConfig) -> Panel:
        """The judge who is the annotators of a project."""

    def remembered(self, judge: Judge, identity: str) -> Judge:
        """The same judge, which is asked about a pair only once, by whatever stage.

        A pair without a verdict is asked about again.

        Args:
            identity: of everything beside the pair that its verdict depends on.
        """


def shown(prompt: Prompt) -> str:
    """A prompt as a judge reads it: a text, or the text of a single user message, as it is; of
    several messages each behind the name of its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt)

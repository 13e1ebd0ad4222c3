"""A Python function as a judge."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, get_args

from rlhf_core.errors import ConfigError
from rlhf_core.judges.judge import Pair, Verdict, Winner, shown

# (prompts, answers_a, answers_b) -> for each "a", "b" or "tie", or (that, reason)
JudgeFunction: TypeAlias = Callable[[list[str], list[str], list[str]], Sequence[object]]
CALL = 50  # pairs of one call
_WORDS = get_args(Winner)


@dataclass(frozen=True)
class FunctionJudge:
    """Asks a function about fifty pairs in each call: what it said before it failed is kept."""

    name: str  # its import path
    function: JudgeFunction

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict for each pair.

        Raises: ConfigError when the function fails, or does not return a verdict for each.
        """
        return [verdict for _, verdict in self.stream(pairs)]

    def stream(self, pairs: Sequence[Pair]) -> Generator[tuple[int, Verdict]]:
        """The number of each pair and its verdict, as they come."""
        for start in range(0, len(pairs), CALL):
            yield from enumerate(self._ask(pairs[start : start + CALL], start), start)

    def _ask(self, pairs: Sequence[Pair], start: int) -> list[Verdict]:
        """The verdicts on the pairs of one call; `start` is the number of the first."""
        prompts = [shown(pair.prompt) for pair in pairs]
        try:
            said = list(
                self.function(prompts, [pair.a for pair in pairs], [pair.b for pair in pairs])
            )
        except Exception as error:
            raise ConfigError(
                f"judge.source '{self.name}' failed on {len(pairs)} pairs "
                f"({type(error).__name__}: {error}); fix the function"
            ) from error
        wanted = f"judge.source '{self.name}' must return 'a', 'b' or 'tie', or that and a reason, "
        wanted += f"for each of the {len(pairs)} pairs"
        if len(said) != len(pairs):
            raise ConfigError(f"{wanted}; it returned {len(said)}")
        verdicts = [_verdict(value) for value in said]
        for row, verdict in enumerate(verdicts):
            if verdict is None:
                raise ConfigError(
                    f"{wanted}; it returned {said[row]!r} for number {start + row}, whose prompt "
                    f"is {prompts[row][:200]!r}"
                )
        return [verdict for verdict in verdicts if verdict is not None]


def _verdict(value: object) -> Verdict | None:
    """What a function returned for a pair; None if it is no verdict."""
    winner, reason = value, ""
    if isinstance(value, tuple | list):
        if len(value) != 2 or not isinstance(value[1], str):
            return None
        winner, reason = value
    if not isinstance(winner, str) or winner not in _WORDS:
        return None
    return Verdict(winner, reason)  # type: ignore[arg-type]

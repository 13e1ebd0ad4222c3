"""Where a stage tells how it is doing. Knows nothing about who listens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol, TypeAlias

Between: TypeAlias = Callable[[str, int], Callable[[], None]]
"""Makes, for a phase and its number of parts, what is called before each part. That may raise."""


class StageLogger(Protocol):
    """What a stage reports to while it runs."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record named values at a step."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` units of work are finished; `note` is for a person to read."""

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        """Say what goes on until the next unit is finished, and how many of its parts are done.

        `total` 0: it has no parts. To be called as often as there is news: it costs nothing.
        """


@dataclass
class MemoryLogger:
    """Keeps everything in lists: for tests, notebooks and offline use."""

    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    notes: list[tuple[int, int, str]] = field(default_factory=list)
    phases: list[tuple[str, int, int]] = field(default_factory=list)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Append `(step, values)` to `history`."""
        self.history.append((step, dict(values)))

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Append `(done, total, note)` to `notes`."""
        self.notes.append((done, total, note))

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        """Append `(what, done, total)` to `phases`."""
        self.phases.append((what, done, total))

    def series(self, name: str) -> list[float]:
        """All values of one metric, in the order in which they were logged."""
        return [values[name] for _, values in self.history if name in values]


class SilentLogger:
    """Keeps nothing: for the processes beside the one that talks to people."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Nothing."""

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        """Nothing."""


def counted(logger: StageLogger, what: str, total: int) -> Callable[[], None]:
    """To be called before each of `total` parts of a phase: tells how many are done."""
    done = count()
    return lambda: logger.phase(what, next(done), total)


def batch_name(what: str, number: int, batches: int) -> str:
    """What a phase is called that comes once a batch, counted from 0: `sampling, batch 2 of 4`."""
    return what if batches == 1 else f"{what}, batch {number + 1} of {batches}"


def uncounted(what: str, total: int) -> Callable[[], None]:
    """A `Between` for whom nobody listens."""
    return lambda: None

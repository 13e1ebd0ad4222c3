"""The interface through which a stage reports metrics and progress, independent of any receiver."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol, TypeAlias

Between: TypeAlias = Callable[[str, int], Callable[[], None]]
"""Maps a phase and its number of parts to a callback for before each part, which may raise."""


@dataclass(frozen=True)
class Alarm:
    """A measure of the monitor that went beyond its limit."""

    measure: str
    step: int  # the iteration
    value: float
    limit: float
    action: str  # what happens: warn, halve_learning_rate, roll_back or stop
    sentence: str  # what was seen, what it may mean, and what to do

    @property
    def line(self) -> str:
        """The alarm as a line for people."""
        return f"monitor, iteration {self.step}: {self.sentence}. {CONSEQUENCES[self.action]}"


CONSEQUENCES: Mapping[str, str] = {
    "warn": "The run goes on",
    "halve_learning_rate": "The learning rate is halved",
    "roll_back": "The run goes back to its last good state, at half the learning rate",
    "stop": "The run stops",
}


class StageLogger(Protocol):
    """Receives the reports of a running stage."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record named values at a step."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Report that `done` of `total` units of work are finished; `note` is for people."""

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        """Report the current phase of a unit, and how many of its parts are done.

        `total` 0: it has no parts. Call it as often as you like: it is cheap.
        """

    def alarm(self, alarm: Alarm) -> None:
        """Report that a measure of the monitor went beyond its limit."""


@dataclass
class MemoryLogger:
    """Keeps everything in lists: for tests, notebooks and offline use."""

    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    notes: list[tuple[int, int, str]] = field(default_factory=list)
    phases: list[tuple[str, int, int]] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Append `(step, values)` to `history`."""
        self.history.append((step, dict(values)))

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Append `(done, total, note)` to `notes`."""
        self.notes.append((done, total, note))

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        """Append `(what, done, total)` to `phases`."""
        self.phases.append((what, done, total))

    def alarm(self, alarm: Alarm) -> None:
        """Append to `alarms`."""
        self.alarms.append(alarm)

    def series(self, name: str) -> list[float]:
        """All values of one metric, in the order in which they were logged."""
        return [values[name] for _, values in self.history if name in values]


class SilentLogger:
    """Discards everything: for all ranks but the main one."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Do nothing."""

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        """Do nothing."""

    def alarm(self, alarm: Alarm) -> None:
        """Do nothing."""


def counted(logger: StageLogger, what: str, total: int) -> Callable[[], None]:
    """A callback to run before each of `total` parts of a phase; it reports how many are done."""
    done = count()
    return lambda: logger.phase(what, next(done), total)


def batch_name(what: str, number: int, batches: int) -> str:
    """The name of a phase that is run for each batch, counted from 0: `sampling, batch 2 of 4`."""
    return what if batches == 1 else f"{what}, batch {number + 1} of {batches}"


def uncounted(what: str, total: int) -> Callable[[], None]:
    """A `Between` that reports nothing."""
    return lambda: None

"""Where a stage tells how it is doing. Knows nothing about who listens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


class StageLogger(Protocol):
    """What a stage reports to while it runs."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record named values at a step."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` units of work are finished; `note` is for a person to read."""


@dataclass
class MemoryLogger:
    """Keeps everything in lists: for tests, notebooks and offline use."""

    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    notes: list[tuple[int, int, str]] = field(default_factory=list)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Append `(step, values)` to `history`."""
        self.history.append((step, dict(values)))

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Append `(done, total, note)` to `notes`."""
        self.notes.append((done, total, note))

    def series(self, name: str) -> list[float]:
        """All values of one metric, in the order in which they were logged."""
        return [values[name] for _, values in self.history if name in values]

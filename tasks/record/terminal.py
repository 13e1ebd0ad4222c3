"""Shows the progress of a stage: a bar on a terminal, plain lines elsewhere.

It knows the terminal and nothing of MLflow or Prefect.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rlhf_core.metrics import Alarm, StageLogger


class Display(Protocol):
    """Shows the progress of a stage."""

    def show(self, done: int, total: int, note: str) -> None:
        """Show that `done` of `total` is finished; a `total` of 0 means unknown."""

    def close(self) -> None:
        """End the display."""


def how_far(done: int, total: int, note: str) -> str:
    """Format progress as `3/8 loss 0.412`."""
    return f"{done}/{total} {note}".rstrip() if total else note


def phase_text(what: str, done: int, total: int) -> str:
    """Format a phase as `writing 40 %`, or as `writing` without a total."""
    return f"{what} {100 * done // total} %" if total else what


class TerminalDisplay:
    """A progress bar; without a terminal, plain lines, at most one per `line_seconds`.

    With `passing`, the bar is removed at the end, and work shorter than `line_seconds` prints no
    line.
    """

    def __init__(
        self,
        title: str,
        console: Console | None = None,
        *,
        line_seconds: float = 10.0,
        passing: bool = False,
    ) -> None:
        self._title = title
        self._console = console or Console(stderr=True)
        self._line_seconds = line_seconds
        self._passing = passing
        self._next_line = time.monotonic() + line_seconds if passing else 0.0
        self._finished = False
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def show(self, done: int, total: int, note: str) -> None:
        """Move the bar, or print a line if one is due or all is finished."""
        finished, self._finished = self._finished, done >= total > 0 and not self._passing
        if self._console.is_terminal:
            self._move(done, total, note)
        elif self._finished > finished or time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self._line_seconds
            line = f"{self._title}: {how_far(done, total, note)}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _move(self, done: int, total: int, note: str) -> None:
        fields: dict[str, Any] = {"note": note, "count": f"{done}/{total}" if total else ""}
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description:<14}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[note]}", markup=False),
                console=self._console,
                transient=self._passing,
            )
            self._task = self._bar.add_task(self._title, total=total or None, **fields)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total or None, **fields)

    def close(self) -> None:
        """Leave the bar as it is; remove it if it never had a total."""
        if self._bar is not None:
            self._bar.update(self._task, visible=self._bar.tasks[0].total is not None)
            self._bar.stop()
            self._bar = None


class _DisplayLogger:
    """A logger without a run: it only shows progress on a display."""

    def __init__(self, displays: Sequence[Display]) -> None:
        self._displays = displays
        self._done = (0, 0)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Ignore metrics."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        self._done = (done, total)
        self._show(note)

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        self._show(phase_text(what, done, total))

    def _show(self, note: str) -> None:
        for display in self._displays:
            display.show(*self._done, note)

    def alarm(self, alarm: Alarm) -> None:
        """Do nothing: whoever raises an alarm logs it too."""


@contextmanager
def on_terminal(title: str, *more: Display) -> Iterator[StageLogger]:
    """Show the progress of work that has no run on the terminal, and on other displays."""
    displays = (TerminalDisplay(title, passing=True), *more)
    try:
        yield _DisplayLogger(displays)
    finally:
        for display in displays:
            display.close()

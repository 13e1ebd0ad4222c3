"""The core's `StageLogger` on an MLflow run: metrics in batches, progress where people look.

Knows MLflow and the terminal; knows nothing of stages, models or Prefect.
"""

import fcntl
import logging
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, Protocol
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from sqlalchemy.exc import SQLAlchemyError

from rlhf_core.errors import UserError
from rlhf_core.metrics import StageLogger
from tasks.servers.client import NoAnswerError, ask
from tasks.settings import Settings

log = logging.getLogger(__name__)

PAUSE_SECONDS = 5.0
LOOK_SECONDS = 1.0  # how often a phase of a stage is looked at
SILENCE_SECONDS = 5.0  # after so long without news, it is said how long there has been none
METRIC_NAME = re.compile(r"[A-Za-z0-9_\-. :/]{1,250}")


def connect(settings: Settings, *, patience: float = 0.0) -> MlflowClient:
    """A client of the tracking server, which has answered once.

    Args:
        patience: seconds to wait for a server that does not answer.

    Raises: UserError when the server does not answer in time or refuses, or when the database
        cannot be opened.
    """
    uri = settings.mlflow_uri
    if urlsplit(uri).scheme in ("http", "https"):
        _wait_for(uri, time.monotonic() + patience)
    try:
        with _one_at_a_time(settings):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(
            f"MLflow at {uri} cannot be used ({_first_line(error)}); check MLFLOW_TRACKING_URI"
        ) from error
    return client


@contextmanager
def _one_at_a_time(settings: Settings) -> Iterator[None]:
    """Keep other processes from a local database while this one may be making its tables.

    MLflow does not, and two that start together on a new database break it.
    """
    if settings.artifact_root is None:
        yield
        return
    settings.artifact_root.mkdir(parents=True, exist_ok=True)
    with (settings.artifact_root.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _wait_for(uri: str, deadline: float) -> None:
    while True:
        try:
            return _probe(uri)
        except UserError as error:
            if time.monotonic() >= deadline:
                raise
            log.warning("%s; trying again", error)
            time.sleep(PAUSE_SECONDS)


def _probe(uri: str) -> None:
    way_out = "start it with `rlhf up`, or set MLFLOW_TRACKING_URI to where it runs"
    try:
        # Whom to trust is for MLflow's own client to judge, which has settings for it.
        ask(f"{uri.rstrip('/')}/health", verify=False)
    except NoAnswerError as error:
        if not error.status:
            raise UserError(
                f"the MLflow server at {uri} does not answer ({error}); {way_out}"
            ) from error
        if error.status == 403 and "host" in error.text.lower():
            raise UserError(
                f"the MLflow server refuses the address {uri} (invalid Host header); start it with "
                f"MLFLOW_SERVER_ALLOWED_HOSTS='{urlsplit(uri).netloc},localhost:*,127.0.0.1:*'"
            ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def logged_metrics(client: MlflowClient, run_id: str) -> set[tuple[str, int]]:
    """Name and step of every metric value that a run has."""
    names = client.get_run(run_id).data.metrics
    return {(name, m.step) for name in names for m in client.get_metric_history(run_id, name)}


class Display(Protocol):
    """Shows how far a stage has come."""

    def show(self, done: int, total: int, note: str) -> None:
        """Show that `done` of `total` is finished; a `total` of 0 is not known yet."""

    def close(self) -> None:
        """Nothing more will come."""


def how_far(done: int, total: int, note: str) -> str:
    """`3/8 loss 0.412`, in one line."""
    return f"{done}/{total} {note}".rstrip() if total else note


def _words(what: str, done: int, total: int) -> str:
    return f"{what} {100 * done // total} %" if total else what


class TerminalDisplay:
    """One progress bar; plain lines, one in `line_seconds` at most, where there is no terminal.

    One that is `passing` leaves no bar behind, and no line of what takes less than that.
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
        """Move the bar, or print a line when one is due, as it is when all is finished."""
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
        """Leave the bar as it stands; none of what never had steps."""
        if self._bar is not None:
            self._bar.update(self._task, visible=self._bar.tasks[0].total is not None)
            self._bar.stop()
            self._bar = None


class _Shown:
    """A logger for which there is no run: what it is told is on a display, and nowhere else."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._done = (0, 0)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        self._done = (done, total)
        self._display.show(done, total, note)

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        self._display.show(*self._done, _words(what, done, total))


@contextmanager
def on_terminal(title: str) -> Iterator[StageLogger]:
    """Shows at the terminal how far something is that has no run, while somebody waits for it."""
    display = TerminalDisplay(title, passing=True)
    try:
        yield _Shown(display)
    finally:
        display.close()


class MlflowLogger:
    """Metrics to one MLflow run and progress to displays, written by a thread of its own.

    A call costs the training thread an append, and to tell of a phase less: every second the thread
    looks which it is now. Where nothing has been told for `SILENCE_SECONDS`, the displays show for
    how long: no step is silent, whatever it is.

    The thread writes one `log_batch` when
    `flush_steps` calls have come together or `flush_seconds` have passed. A batch that MLflow does
    not take stays first in line and goes again with the next one, so the order is kept and nothing
    is lost; if it still fails at `flush` or `close`, they raise.

    A run that goes on replays its history; values that MLflow has, given in `logged` as name and
    step, are not written twice.

    NaN is kept as NaN. An infinite value is logged as NaN too, with one warning for each name:
    MLflow would store it as 1.8e308, which flattens the rest of the curve.
    """

    def __init__(
        self,
        client: MlflowClient,
        run_id: str,
        displays: Sequence[Display] = (),
        *,
        logged: Set[tuple[str, int]] = frozenset(),
        flush_steps: int = 100,
        flush_seconds: float = 5.0,
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._displays = displays
        self._logged = logged
        self._flush_steps = flush_steps
        self._flush_seconds = flush_seconds
        self._metrics: list[Metric] = []
        self._calls = 0
        self._progress = (0, 0, "")
        self._phase: tuple[str, int, int] | None = None
        self._shown: object = (self._progress, None)
        self._news = 0.0  # when what is shown was new
        self._moved = False
        self._infinite: set[str] = set()
        self._closed = False
        self._wake = threading.Condition()
        self._writing = threading.Lock()  # one writer at a time, so that the order is kept
        # Prefect keeps its settings and its run in context variables, which a thread has not.
        context = copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._work,), name=f"metrics-{run_id[:8]}", daemon=True
        )
        self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record named values at a step.

        Raises: ValueError for a name that MLflow does not take, here and not later in the thread.
        """
        now = int(time.time() * 1000)
        new = {name: value for name, value in values.items() if (name, step) not in self._logged}
        batch = [self._metric(name, float(value), now, step) for name, value in new.items()]
        with self._wake:
            if self._closed:
                raise ValueError("this logger is closed: its run has ended")
            self._metrics += batch
            self._calls += 1
            if self._calls >= self._flush_steps:
                self._wake.notify()

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` units of work are finished."""
        with self._wake:
            self._progress, self._phase, self._moved = (done, total, note), None, True
            self._wake.notify()

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        """Say what goes on until the next unit is finished, and how many of its parts are done."""
        self._phase = (what, done, total)

    def flush(self) -> None:
        """Return when all that was logged so far is in MLflow.

        Raises: UserError when MLflow does not take it.
        """
        try:
            self._write()
        except MlflowException as error:
            raise UserError(
                f"{len(self._metrics)} metric values of run {self._run_id} could not be written to "
                f"MLflow ({_first_line(error)}); see that its server runs, then start again"
            ) from error

    def close(self) -> None:
        """Stop the thread and the displays, then flush."""
        with self._wake:
            already, self._closed = self._closed, True
            self._wake.notify()
        if already:
            return
        self._thread.join()
        self._phase = None
        self._show()
        for display in self._displays:
            display.close()
        self.flush()

    def _metric(self, name: str, value: float, timestamp: int, step: int) -> Metric:
        if not METRIC_NAME.fullmatch(name):
            raise ValueError(
                f"'{name}' is no name of a metric: use letters, digits and _ - . : / or a space"
            )
        if math.isinf(value):
            if name not in self._infinite:
                log.warning("%s is infinite at step %d; logged as NaN", name, step)
            self._infinite.add(name)
            value = math.nan
        return Metric(name, value, timestamp, step)

    def _work(self) -> None:
        due = time.monotonic() + self._flush_seconds
        while not self._closed:
            with self._wake:
                if not self._moved and self._calls < self._flush_steps and not self._closed:
                    self._wake.wait(min(max(due - time.monotonic(), 0.0), LOOK_SECONDS))
                self._moved = False
            self._show()
            if self._calls >= self._flush_steps or time.monotonic() >= due:
                self._try_to_write()
                due = time.monotonic() + self._flush_seconds

    def _show(self) -> None:
        """Show what is new; and of what is not, how long it has been so, once that is long."""
        with self._wake:
            progress, phase = self._progress, self._phase
        now = time.monotonic()
        new = (progress, phase) != self._shown
        if new:
            self._shown, self._news = (progress, phase), now
        waited = now - self._news
        if not new and (self._closed or waited < SILENCE_SECONDS or not self._news):
            return
        done, total, note = progress
        said = [_words(*phase)] if phase else []
        said += [note] if note else []
        said += [] if new else [f"for {waited:.0f} s"]
        for display in self._displays:
            display.show(done, total, " · ".join(said))

    def _try_to_write(self) -> None:
        try:
            self._write()
        except Exception as error:
            log.warning("metrics of run %s wait for MLflow: %s", self._run_id, _first_line(error))

    def _write(self) -> None:
        with self._writing:
            with self._wake:
                batch, self._metrics, self._calls = self._metrics, [], 0
            try:
                self._client.log_batch(self._run_id, metrics=batch)
            except BaseException:
                with self._wake:
                    self._metrics[:0] = batch
                raise

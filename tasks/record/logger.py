"""The core's `StageLogger` for an MLflow run: metrics in batches, progress on displays.

It knows nothing of stages, models or Prefect.
"""

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextvars import copy_context

from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException

from rlhf_core.errors import UserError
from rlhf_core.metrics import Alarm
from tasks.record import tags
from tasks.record.terminal import Display, phase_text
from tasks.record.tracking import first_line

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # how often the thread looks at the phase of a stage
SILENCE_SECONDS = 5.0  # after this long without news, the displays show its duration
METRIC_NAME = re.compile(r"[A-Za-z0-9_\-. :/]{1,250}")


class MlflowLogger:
    """Writes metrics to one MLflow run and progress to displays, from a thread of its own.

    A call costs the training thread an append, and a change of phase even less: the thread looks at
    the phase once a second. After `SILENCE_SECONDS` without news the displays show for how long
    there has been none, so no step is silent.

    The thread writes one `log_batch` after `flush_steps` calls or `flush_seconds`, whichever comes
    first. If MLflow rejects a batch, it stays first in the queue and is retried with the next one,
    so the order is kept and nothing is lost; if it still fails, `flush` and `close` raise.

    A resumed run replays its history, and so do ranks that a cluster has started again, whose
    logger this still is. No value is written twice: neither those in `logged`, by name and step,
    which are in MLflow already, nor those that came before.

    An alarm of the monitor becomes a tag of the run, which waits for MLflow as metrics do, and is
    passed to `announce`.

    NaN is kept as NaN. An infinite value is logged as NaN too, with one warning per name, because
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
        announce: Callable[[Alarm], None] = lambda alarm: None,
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._displays = displays
        self._logged = logged
        self._came: dict[str, set[int]] = {}  # steps by name
        self._flush_steps = flush_steps
        self._flush_seconds = flush_seconds
        self._announce = announce
        self._metrics: list[Metric] = []
        self._tags: list[RunTag] = []
        self._calls = 0
        self._progress = (0, 0, "")
        self._phase: tuple[str, int, int] | None = None
        self._shown: object = (self._progress, None)
        self._news = 0.0  # when the shown state last changed
        self._moved = False
        self._infinite: set[str] = set()
        self._closed = False
        self._wake = threading.Condition()
        self._writing = threading.Lock()  # one writer at a time, so that the order is kept
        # Prefect keeps its settings and run in context variables, which a new thread lacks.
        context = copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._work,), name=f"metrics-{run_id[:8]}", daemon=True
        )
        self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record named values at a step.

        Raises: ValueError for an invalid metric name: here, not later in the thread.
        """
        now = int(time.time() * 1000)
        new = {name: value for name, value in values.items() if self._is_new(name, step)}
        batch = [self._metric(name, float(value), now, step) for name, value in new.items()]
        with self._wake:
            if self._closed:
                raise ValueError("this logger is closed: its run has ended")
            self._metrics += batch
            self._calls += 1
            if self._calls >= self._flush_steps:
                self._wake.notify()

    def _is_new(self, name: str, step: int) -> bool:
        came = self._came.setdefault(name, set())
        if step in came or (name, step) in self._logged:
            return False
        came.add(step)
        return True

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Report that `done` of `total` units of work are finished."""
        with self._wake:
            self._progress, self._phase, self._moved = (done, total, note), None, True
            self._wake.notify()

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        """Report the current phase of the next unit, and how many of its parts are done."""
        self._phase = (what, done, total)

    def alarm(self, alarm: Alarm) -> None:
        """Tag the run with an alarm, soon and as certainly as metrics, and announce it now."""
        tag = RunTag(tags.alarm_of(alarm.measure), alarm.line)
        with self._wake:
            if self._closed:
                raise ValueError("this logger is closed: its run has ended")
            self._tags.append(tag)
            self._calls = max(self._calls, self._flush_steps)
            self._wake.notify()
        self._announce(alarm)

    def flush(self) -> None:
        """Write everything that was logged so far to MLflow.

        Raises: UserError if MLflow rejects it.
        """
        try:
            self._write()
        except MlflowException as error:
            raise UserError(
                f"{len(self._metrics)} metric values of run {self._run_id} could not be written to "
                f"MLflow ({first_line(error)}); check that its server is running, then try again"
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
                f"'{name}' is not a metric name: use letters, digits and _ - . : / or a space"
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
        """Show changes; after a long time without one, show how long it has been."""
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
        parts = [phase_text(*phase)] if phase else []
        parts += [note] if note else []
        parts += [] if new else [f"for {waited:.0f} s"]
        for display in self._displays:
            display.show(done, total, " · ".join(parts))

    def _try_to_write(self) -> None:
        try:
            self._write()
        except Exception as error:
            log.warning(
                "metrics of run %s are waiting for MLflow: %s", self._run_id, first_line(error)
            )

    def _write(self) -> None:
        with self._writing:
            with self._wake:
                batch, self._metrics, self._calls = self._metrics, [], 0
                alarms, self._tags = self._tags, []
            try:
                # Of two tags with one name in a batch MLflow may keep either: the last is meant.
                new = list({tag.key: tag for tag in alarms}.values())
                self._client.log_batch(self._run_id, metrics=batch, tags=new)
            except BaseException:
                with self._wake:
                    self._metrics[:0] = batch
                    self._tags[:0] = alarms
                raise

"""A training run that can be stopped at any moment and resumes bit for bit.

    with Session(logger, checkpoints=..., identity=..., learners=..., positions=...) as session:
        session.resume()
        while there is work left:
            between = session.between("updating", micro_batches)
            for each micro-batch:
                between()  # reports progress, and handles a request to stop
                ...
            optimizer.step()
            session.metrics(...)
            session.safe_point()  # the run can resume from here

Learners (weights, optimizers) are large and change only in an optimizer step, so they are copied
only to be saved. Positions (data order, generators, progress) are small and change all the time, so
each safe point copies them. Together they form the last safe point, whenever a signal comes.

A save that is due copies the learners and has a thread write the copy while training goes on; with
too little memory for a copy, training waits while they are written. Nothing leaves the block before
the thread is done. This module knows when to save and how to stop, but nothing about losses or
models.
"""

import copy
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import FrameType, TracebackType
from typing import Any, NoReturn, Protocol, Self, TypeAlias

import torch

from rlhf_core.errors import CheckpointError
from rlhf_core.metrics import Alarm, StageLogger, counted
from rlhf_core.seeding import rng_state, set_rng_state
from rlhf_core.training.beside import Writer, copied
from rlhf_core.training.checkpoint import Checkpoints
from rlhf_core.training.ranks import Ranks

SAVING_SHARE = 0.05  # of the time, at most

_Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """An object whose state can be saved and restored: a module, optimizer or controller."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Restore what `state_dict` returned."""


class Interrupted(BaseException):
    """Training stopped because of a signal. Like KeyboardInterrupt, not an Exception."""


class StopRequest:
    """Defers SIGTERM and SIGINT until the caller handles them, if this is the main thread.

    Args:
        heard: called immediately when a signal comes.
    """

    def __init__(self, heard: Callable[[signal.Signals], None] = lambda number: None) -> None:
        self.number: signal.Signals | None = None  # the signal received
        self._heard = heard
        self._previous: dict[int, _Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                previous = signal.getsignal(number)
                # Keep SIG_IGN; None means a handler that was not installed from Python.
                if previous is not None and previous is not signal.SIG_IGN:
                    self._previous[number] = previous
                    signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._request:
                signal.signal(number, previous)

    def stop(self, message: str) -> NoReturn:
        """Stop the way the previous signal handler would.

        Raises: whatever the previous handler of the signal raises, else Interrupted.
        """
        self._stop(self.number or signal.SIGTERM, None, message)

    def _request(self, number: int, frame: FrameType | None) -> None:
        again = self.number is not None and number == signal.SIGINT
        self.number = signal.Signals(number)
        self._heard(self.number)
        if again:  # stop immediately
            self._stop(self.number, frame, "interrupted twice; unsaved progress is lost")

    def _stop(self, number: signal.Signals, frame: FrameType | None, message: str) -> NoReturn:
        self.__exit__()
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)
        raise Interrupted(message)


class Session:
    """A training run that can be stopped at any moment and resumes bit for bit.

    Several ranks save and stop together at safe points, when any of them got a signal. One writes.

    Args:
        logger: receives metrics and progress.
        checkpoints: where states are saved; None saves nothing.
        identity: what defines the run: settings, seed, digests of its inputs.
        learners: change only in an optimizer step; copied when they are saved.
        positions: change all the time; copied at each safe point.
        every_seconds: least time between two saves, which take at most 5 % of the time; 0 saves at
            every safe point, whatever the cost, and goes on when the checkpoint is on the disk.
        ranks: the processes of the run.
    """

    def __init__(
        self,
        logger: StageLogger,
        *,
        checkpoints: Checkpoints | None,
        identity: Mapping[str, str],
        learners: Mapping[str, Stateful],
        positions: Mapping[str, Stateful | torch.Generator],
        every_seconds: float = 60.0,
        ranks: Ranks | None = None,
    ) -> None:
        self.step = 0  # safe points passed
        self.history: list[tuple[int, dict[str, float]]] = []
        self._logger = logger
        self._checkpoints = checkpoints
        self._identity = identity
        self._learners = learners
        self._positions = positions
        self._every_seconds = every_seconds
        self._ranks = ranks or Ranks()
        self._snapshot: dict[str, Any] = {}  # of the last safe point: all but learners and history
        self._logged = 0  # entries of the history at the last safe point
        self._saved = 0  # step of the newest checkpoint, as the main rank knows it
        self._last_save = time.monotonic()
        self._save_seconds = 0.0
        self._writer = Writer()
        self._writing = 0  # step of the save that is under way, or was the last
        self._request = StopRequest()

    def __enter__(self) -> Self:
        """Defer SIGTERM and SIGINT to the next `check`, if this is the main thread."""
        self._request.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the save that is under way, and restore the signal handlers; handle a request
        that came after the last `check`.

        Raises: what the save raised, unless another error is under way.
        """
        try:
            self._finish()
        except Exception as failure:
            if error is None:
                raise
            log.warning("the last checkpoint could not be saved: %s", failure)
        finally:
            self._request.__exit__()
        if error is None and self._any(self._asked()):
            self._end()

    def resume(self) -> bool:
        """Resume from the newest checkpoint, if there is one; return whether there was.

        The history is logged again, since its end may not have reached the logger.

        Raises: CheckpointError when the checkpoint is from another run, or does not fit.
        """
        if self._checkpoints is None:
            return False
        self.phase("looking for a checkpoint")
        state = self._checkpoints.latest(self._identity)
        self._require_same(0 if state is None else state.get("step", 0))
        if state is None:
            return False
        try:
            _require_names(state, ("step", "history", "learners", "positions", "rng"))
            _put_back(state["learners"], self._learners)
            _put_back(state["positions"], self._positions)
        except ValueError as error:
            raise CheckpointError(
                f"the newest checkpoint in {self._checkpoints.directory} does not fit: {error}. "
                "Use the version that wrote it, or delete that folder to start over"
            ) from error
        self.step = self._saved = state["step"]
        self.history = state["history"]
        for step, values in self.history:
            if self._ranks.main:
                self._logger.metrics(values, step)
        set_rng_state(state["rng"])  # last, since the lines above may draw random numbers
        return True

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record named values at a step, and keep them in the history."""
        # numpy's float64 is a float too, but a checkpoint accepts only plain ones.
        plain = {name: float(value) for name, value in values.items()}
        self.history.append((step, plain))
        if self._ranks.main:
            self._logger.metrics(plain, step)

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Report that `done` of `total` units of work are finished."""
        if self._ranks.main:
            self._logger.progress(done, total, note)

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        """Report the current phase of a unit, and how many of its parts are done."""
        if self._ranks.main:
            self._logger.phase(what, done, total)

    def alarm(self, alarm: Alarm) -> None:
        """Report that a measure of the monitor went beyond its limit."""
        if self._ranks.main:
            self._logger.alarm(alarm)

    def between(self, what: str, total: int) -> Callable[[], None]:
        """A callback to run before each of `total` parts of a phase: it reports progress, and stops
        like `check`."""
        tell = counted(self, what, total)

        def call() -> None:
            self.check()
            tell()

        return call

    def safe_point(self) -> None:
        """Call after an optimizer step, when all state is consistent: saves if due, and stops if
        asked to."""
        self.step += 1
        if self._checkpoints is not None:
            if self._ranks.main:
                self._snapshot = self._take()
                self._logged = len(self.history)
                if self._writer.done:
                    self._finish()
            if self._any(self._ranks.main and self._due()):
                self._save(self._checkpoints, beside=self._every_seconds > 0)
        if self._any(self._asked()):
            self._end()

    def check(self) -> None:
        """Call within an optimizer step: stops if asked to, after saving the last safe point.

        Does nothing with several ranks: one that stopped here would leave the others waiting.

        Raises: whatever the previous handler of the signal raises, else Interrupted.
        """
        if self._ranks.world == 1 and self._asked():
            self._end()

    def _asked(self) -> bool:
        """Whether this process got a signal, or its launcher wants the ranks to stop."""
        return self._request.number is not None or self._ranks.stopping()

    def _end(self) -> NoReturn:
        if self._checkpoints is not None:
            self._finish()
            if self._on_disk() < self.step:
                self._save(self._checkpoints, beside=False)
        next_run = "resume" if self._on_disk() else "start over, since nothing was saved"
        name = (self._request.number or signal.SIGTERM).name
        self._request.stop(
            f"training was stopped by {name} at step {self.step}; run again to {next_run}"
        )

    def _on_disk(self) -> int:
        """The step of the newest checkpoint; all ranks have to call this."""
        return int(self._ranks.sum({"saved": self._saved if self._ranks.main else 0})["saved"])

    def _any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all ranks have to call this."""
        return self._ranks.sum({"flag": float(flag)})["flag"] > 0

    def _take(self) -> dict[str, Any]:
        rng = rng_state()
        if self._ranks.world > 1:  # the next run may have other devices; nothing draws on them
            rng["cuda"] = []
        positions = {name: _copy(p) for name, p in self._positions.items()}
        return {"step": self.step, "rng": rng, "positions": positions}

    def _require_same(self, step: int) -> None:
        """Raise CheckpointError unless every rank found the same checkpoint."""
        if self._ranks.sum({"step": step})["step"] != step * self._ranks.world:
            assert self._checkpoints is not None
            raise CheckpointError(
                f"the ranks found different checkpoints in {self._checkpoints.directory}; "
                "use a folder that all machines share"
            )

    def _due(self) -> bool:
        if self._writer.busy:
            return False
        waited = time.monotonic() - self._last_save
        wanted = max(self._every_seconds, self._save_seconds / SAVING_SHARE)
        return self._every_seconds == 0 or waited >= wanted

    def _save(self, checkpoints: Checkpoints, *, beside: bool) -> None:
        """Save the last safe point; `beside` training, if there is memory for a copy."""
        start = time.monotonic()
        self.phase("saving a checkpoint")
        # Called on every rank, since each may have only a shard.
        learners = {name: learner.state_dict() for name, learner in self._learners.items()}
        if not self._ranks.main:
            return
        copy_of_learners = copied(learners) if beside else None
        history = self.history[: self._logged]
        state = self._snapshot | {"history": history, "learners": copy_of_learners or learners}
        step = self._writing = self.step

        def write() -> None:
            try:
                checkpoints.save(step, state, self._identity)
                self._saved = step
            finally:
                self._last_save = time.monotonic()
                self._save_seconds = self._last_save - start

        if copy_of_learners is None:
            self._warned(write)
        else:
            self._writer.start(write)

    def _finish(self) -> None:
        """Wait for the save that is under way, if there is one.

        Raises: what it raised, if it was not the disk.
        """
        self._warned(self._writer.wait)

    def _warned(self, save: Callable[[], None]) -> None:
        try:
            save()
        except OSError as error:
            log.warning("the checkpoint of step %d could not be saved: %s", self._writing, error)


def _copy(position: Stateful | torch.Generator) -> Any:
    if isinstance(position, torch.Generator):
        return position.get_state()
    return copy.deepcopy(position.state_dict())


def _put_back(
    states: Mapping[str, Any],
    pieces: Mapping[str, Stateful] | Mapping[str, Stateful | torch.Generator],
) -> None:
    _require_names(states, pieces)
    for name, piece in pieces.items():
        try:
            if isinstance(piece, torch.Generator):
                piece.set_state(states[name])
            else:
                piece.load_state_dict(states[name])
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(f"{name}: {reason}") from error


def _require_names(found: Iterable[str], wanted: Iterable[str]) -> None:
    missing, surplus = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
    faults = [f"{name} is missing" for name in missing]
    faults += [f"{name} is unexpected" for name in surplus]
    if faults:
        raise ValueError(", ".join(faults))

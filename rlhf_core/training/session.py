"""One training run that can be stopped at any moment and continued to the bit.

    with Session(logger, checkpoints=..., identity=..., learners=..., positions=...) as session:
        session.resume()
        while there is work left:
            between = session.between("updating", micro_batches)
            for each micro-batch:
                between()  # progress is told, and a request to stop is heard here
                ...
            optimizer.step()
            session.metrics(...)
            session.safe_point()  # what can be continued from

Learners (weights, optimizers) are large and change only in an optimizer step, so they are saved as
they are. Positions (data order, generators, progress) are small and change all the time, so each
safe point copies them. Together they are the last safe point, whenever a signal comes.
Knows when to save and how to stop; nothing of losses or models.
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
from rlhf_core.metrics import StageLogger, counted
from rlhf_core.seeding import rng_state, set_rng_state
from rlhf_core.training.checkpoint import Checkpoints
from rlhf_core.training.ranks import Ranks

SAVING_SHARE = 0.05  # of the time, at most

_Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """What has a state that can be taken and put back: modules, optimizers, controllers."""

    def state_dict(self) -> Mapping[str, Any]:
        """What a checkpoint has to keep."""

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Continue where `state_dict` was taken."""


class Interrupted(BaseException):
    """A signal asked the training to stop, and it has. No Exception, like KeyboardInterrupt."""


class StopRequest:
    """Holds SIGTERM and SIGINT back until it suits, if this is the main thread.

    Args:
        heard: called at once when one comes.
    """

    def __init__(self, heard: Callable[[signal.Signals], None] = lambda number: None) -> None:
        self.number: signal.Signals | None = None  # which one has come
        self._heard = heard
        self._previous: dict[int, _Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                previous = signal.getsignal(number)
                # Ignored stays ignored; None was installed from outside of Python.
                if previous is not None and previous is not signal.SIG_IGN:
                    self._previous[number] = previous
                    signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._request:
                signal.signal(number, previous)

    def stop(self, message: str) -> NoReturn:
        """Stop as whoever asked would have it.

        Raises: what the handler of the signal before this one raises, else Interrupted.
        """
        self._stop(self.number or signal.SIGTERM, None, message)

    def _request(self, number: int, frame: FrameType | None) -> None:
        again = self.number is not None and number == signal.SIGINT
        self.number = signal.Signals(number)
        self._heard(self.number)
        if again:  # at once, whatever is under way
            self._stop(self.number, frame, "interrupted twice; what was under way is lost")

    def _stop(self, number: signal.Signals, frame: FrameType | None, message: str) -> NoReturn:
        self.__exit__()
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)
        raise Interrupted(message)


class Session:
    """One training run that can be stopped at any moment and continued to the bit.

    Several ranks save and stop together: at safe points, when any of them was asked to. One writes.

    Args:
        logger: where metrics and progress go.
        checkpoints: where states are kept; None saves nothing.
        identity: what the run is: settings, seed, digests of its inputs.
        learners: change only in an optimizer step; saved as they are.
        positions: change all the time; copied at each safe point.
        every_seconds: least time between two saves, which also take 5 % of the time at most;
            0 saves at every safe point, whatever it takes.
        ranks: who else is in the run.
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
        self._saved = 0  # step of the newest checkpoint
        self._last_save = time.monotonic()
        self._save_seconds = 0.0
        self._request = StopRequest()

    def __enter__(self) -> Self:
        """From here on SIGTERM and SIGINT wait for a `check`, if this is the main thread."""
        self._request.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the signals back; a request that came after the last `check` is not forgotten."""
        self._request.__exit__()
        if error is None and self._any(self._request.number is not None):
            self._end()

    def resume(self) -> bool:
        """Continue from the newest checkpoint, if there is one; say whether there was.

        The history goes to the logger once more, as its end may not have got there.

        Raises: CheckpointError when the checkpoint is of another run, or does not fit.
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
                "Use the version that wrote it, or delete that folder to start from the beginning"
            ) from error
        self.step = self._saved = state["step"]
        self.history = state["history"]
        for step, values in self.history:
            if self._ranks.main:
                self._logger.metrics(values, step)
        set_rng_state(state["rng"])  # last, as whatever comes before may draw
        return True

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record named values at a step, and keep them in the history."""
        # numpy's float64 is a float as well, but a checkpoint takes plain ones.
        plain = {name: float(value) for name, value in values.items()}
        self.history.append((step, plain))
        if self._ranks.main:
            self._logger.metrics(plain, step)

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` units of work are finished."""
        if self._ranks.main:
            self._logger.progress(done, total, note)

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        """Say what goes on until the next unit is finished, and how many of its parts are done."""
        if self._ranks.main:
            self._logger.phase(what, done, total)

    def between(self, what: str, total: int) -> Callable[[], None]:
        """What is called before each of `total` parts of a phase: tells, and hears a request to
        stop as `check` does."""
        tell = counted(self, what, total)

        def call() -> None:
            self.check()
            tell()

        return call

    def safe_point(self) -> None:
        """After an optimizer step, when all is consistent: save if it is time, stop if asked to."""
        self.step += 1
        if self._checkpoints is not None:
            if self._ranks.main:
                self._snapshot = self._take()
                self._logged = len(self.history)
            if self._any(self._ranks.main and self._due()):
                self._save(self._checkpoints)
        if self._any(self._request.number is not None):
            self._end()

    def check(self) -> None:
        """Within an optimizer step: stop when asked to, with the last safe point saved.

        Does nothing with several ranks: one that stopped here would leave the others waiting.

        Raises: what the handler of the signal before this session raises, else Interrupted.
        """
        if self._ranks.world == 1 and self._request.number is not None:
            self._end()

    def _end(self) -> NoReturn:
        if self._checkpoints is not None and self._saved < self.step:
            self._save(self._checkpoints)
        way_on = "continue" if self._saved else "start over, as nothing was saved"
        name = (self._request.number or signal.SIGTERM).name
        self._request.stop(
            f"training was stopped by {name} at step {self.step}; run again to {way_on}"
        )

    def _any(self, said: bool) -> bool:
        """Whether any rank says so; all ask together."""
        return self._ranks.sum({"said": float(said)})["said"] > 0

    def _take(self) -> dict[str, Any]:
        rng = rng_state()
        if self._ranks.world > 1:  # of devices that the next run may not have; nothing draws there
            rng["cuda"] = []
        positions = {name: _copy(p) for name, p in self._positions.items()}
        return {"step": self.step, "rng": rng, "positions": positions}

    def _require_same(self, step: int) -> None:
        """Raise CheckpointError unless every rank has found the same."""
        if self._ranks.sum({"step": step})["step"] != step * self._ranks.world:
            assert self._checkpoints is not None
            raise CheckpointError(
                f"the ranks do not find the same checkpoints in {self._checkpoints.directory}; "
                "it has to be a folder that all machines share"
            )

    def _due(self) -> bool:
        waited = time.monotonic() - self._last_save
        wanted = max(self._every_seconds, self._save_seconds / SAVING_SHARE)
        return self._every_seconds == 0 or waited >= wanted

    def _save(self, checkpoints: Checkpoints) -> None:
        start = time.monotonic()
        self.phase("saving a checkpoint")
        # Asked on every rank, as each may have but a part of it.
        learners = {name: learner.state_dict() for name, learner in self._learners.items()}
        saved = self._ranks.main
        if self._ranks.main:
            history = self.history[: self._logged]
            state = self._snapshot | {"history": history, "learners": learners}
            try:
                checkpoints.save(self.step, state, self._identity)
            except OSError as error:
                log.warning("the checkpoint of step %d could not be saved: %s", self.step, error)
                saved = False
        if self._any(saved):
            self._saved = self.step
        self._last_save = time.monotonic()
        self._save_seconds = self._last_save - start


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

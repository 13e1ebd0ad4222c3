"""The queue is put in order beside a training that goes on, by the reward model it has just made.

Another process does it: on one thread of the CPU, at the lowest priority, and the first to be
ended if memory is short. So the training loses next to nothing, and whatever goes wrong there is a
warning here. The queue changes all at once at the end, so a process that is ended has changed
nothing.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TypeAlias

from prefect import task
from prefect.cache_policies import NO_CACHE

from rlhf_core.settings.data import DataConfig
from tasks.feedback.asking.votes import opened
from tasks.feedback.ordering.task import warn_of_old_order
from tasks.prefect.ui import SUSPENSION
from tasks.registry.refs import ModelRef
from tasks.settings import read_settings

SECONDS = 600.0  # it is ended after so long
PROGRAM = "tasks.feedback.ordering.program"
Begin: TypeAlias = Callable[[ModelRef], None]
log = logging.getLogger(__name__)


@contextmanager
def ordered_beside(data: DataConfig) -> Iterator[Begin]:
    """For the block of a run that trains on votes of the preference store: a function to call with
    the new reward model, which returns at once. The end of the block waits for the order.

    Call this in a flow. It raises nothing of its own.
    """
    store = data.preferences.store if data.source != "simulated" else ""
    with TemporaryDirectory(prefix="rlhf-order-") as folder:
        beside = _Beside(store, Path(folder))
        try:
            yield beside.begin
        except (Exception, SUSPENSION):
            beside.end()
            raise
        else:
            beside.end()
        finally:  # also when the run is interrupted
            beside.stop()


class _Beside:
    def __init__(self, project: str, folder: Path) -> None:
        self._project = project
        self._files = folder / "said", folder / "failed"
        self._process: subprocess.Popen[bytes] | None = None
        self._until = 0.0

    def begin(self, model: ModelRef) -> None:
        """Begin to put the queue in order by a model."""
        if not self._project:
            return
        try:
            with opened(read_settings()) as store:
                if not store.project(self._project).rules.ordered:
                    return
            self.stop()
            said, failed = (path.open("wb") for path in self._files)
            with said, failed:
                self._process = _start([self._project, model.uri], said, failed)
            self._until = time.monotonic() + SECONDS
        except Exception as error:
            warn_of_old_order(self._project, str(error))

    def end(self) -> None:
        """Wait for it, and say what came of it."""
        if self._process is None:
            return
        try:
            report_order(self._project, self._outcome)
        except Exception as error:
            warn_of_old_order(self._project, str(error))

    def stop(self) -> None:
        """End it if it runs."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()
            self._process = None

    def _outcome(self) -> str:
        """What the program said."""
        assert self._process is not None
        try:
            code = self._process.wait(max(self._until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"it took more than {SECONDS / 60:.0f} minutes on one thread of the CPU"
            ) from None
        said, failed = (path.read_text(errors="replace") for path in self._files)
        if code:
            last = failed.strip().splitlines()[-1:] or [f"the process ended with status {code}"]
            raise RuntimeError(last[0])
        return str(json.loads(said.splitlines()[-1])["said"])


# Prefect cannot make a key of a function that waits for a process, and would log that as an error.
@task(name="order-queue", task_run_name="order the queue of {project}", cache_policy=NO_CACHE)
def report_order(project: str, outcome: Callable[[], str]) -> str:
    """Wait for the process that puts a queue in order, and log what it said."""
    said = outcome()
    log.info("%s: %s", project, said)
    return said


def _start(arguments: list[str], said: IO[bytes], failed: IO[bytes]) -> "subprocess.Popen[bytes]":
    alone = {"OMP_NUM_THREADS": "1", "RLHF_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", PROGRAM, *arguments, str(SECONDS)],
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=failed,
        env={**os.environ, **alone},
        start_new_session=True,  # Ctrl-C reaches the run, which ends it
    )

"""Starts a service again when it ends, beside work that cannot go on without it."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from flows.local.supervisor import Service, ServiceError, Supervisor

ATTEMPTS = 3  # in a row
SETTLED_SECONDS = 60.0  # one that has lived for that long had a start that worked
EVERY_SECONDS = 0.2
GRACE_SECONDS = 45.0


class Keeper:
    """Watches one service of a supervisor from a thread.

    Where the service does not come up again, the main thread gets a SIGTERM, as if somebody had
    stopped the run: a training saves where it is. Leaving the block then raises why.

    Args:
        say: hears that the service has ended, at once.
    """

    def __init__(self, group: Supervisor, service: Service, say: Callable[[str], None]) -> None:
        self._group = group
        self._service = service
        self._say = say
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._failure: ServiceError | None = None

    def watch(self) -> None:
        """Begin, once the service is ready."""
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._failure is not None:
            raise self._failure from None

    def _run(self) -> None:
        attempts, started = 0, time.monotonic()
        while not self._stop.wait(EVERY_SECONDS):
            try:
                self._group.check()
            except ServiceError as death:
                lived = time.monotonic() - started
                attempts = 1 if lived > SETTLED_SECONDS else attempts + 1
                if attempts > ATTEMPTS:
                    self._give_up(death)
                    return
                started = time.monotonic()
                self._start_again(death)

    def _start_again(self, death: ServiceError) -> None:
        how = str(death).partition(". ")[0]
        self._say(f"{how}, which this run has started: it is started again.")
        self._group.start(self._service, again=True)
        try:
            self._group.until_ready(self._service, stop=self._stop.is_set)
        except ServiceError:
            return  # seen again at the next look
        self._say(f"{self._service.name} runs again.")

    def _give_up(self, death: ServiceError) -> None:
        self._failure = ServiceError(
            f"{death}\nIt could not be started again, so the run has been stopped. Finished stages "
            "are kept: the same command resumes from the last checkpoint."
        )
        self._say(f"{self._service.name} does not come up again: the run is being stopped.")
        os.kill(os.getpid(), signal.SIGTERM)
        # A training that is told to stop saves within seconds. What comes then would wait for the
        # service, attempt after attempt, only to report that the run has ended.
        if not self._stop.wait(GRACE_SECONDS):
            self._say(str(self._failure))
            os._exit(1)  # the reaper ends the rest

"""Restarts a service that ends while work in this process depends on it."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from flows.local.supervisor import Service, ServiceError, Supervisor

ATTEMPTS = 3  # in a row
SETTLED_SECONDS = 60.0  # a service that ran this long did start
EVERY_SECONDS = 0.2
GRACE_SECONDS = 45.0


class Keeper:
    """Watches one service of a supervisor from a thread.

    If the service cannot be restarted, the main thread receives SIGTERM, so that a training saves a
    checkpoint and stops. Leaving the block then raises the reason.

    Args:
        say: receives a message as soon as the service ends.
    """

    def __init__(self, group: Supervisor, service: Service, say: Callable[[str], None]) -> None:
        self._group = group
        self._service = service
        self._say = say
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._failure: ServiceError | None = None

    def watch(self) -> None:
        """Start watching; call it once the service is ready."""
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
                self._restart(death)

    def _restart(self, death: ServiceError) -> None:
        how = str(death).partition(". ")[0]
        self._say(f"{how}; this run depends on it, so it is being restarted.")
        self._group.start(self._service, again=True)
        try:
            self._group.until_ready(self._service, stop=self._stop.is_set)
        except ServiceError:
            return  # the next check sees it again
        self._say(f"{self._service.name} is running again.")

    def _give_up(self, death: ServiceError) -> None:
        self._failure = ServiceError(
            f"{death}\nIt could not be restarted, so the run was stopped. Finished stages are "
            "kept: repeat the command to resume from the last checkpoint."
        )
        self._say(f"{self._service.name} cannot be restarted: the run is being stopped.")
        os.kill(os.getpid(), signal.SIGTERM)
        # A training that is told to stop saves within seconds. After that the process would only
        # retry to report its end to a service that is gone.
        if not self._stop.wait(GRACE_SECONDS):
            self._say(str(self._failure))
            os._exit(1)  # the reaper ends the rest

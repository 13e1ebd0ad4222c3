"""Runs several programs together: all live, or all are ended. Knows nothing about what they do."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from uuid import uuid4

from flows.local import reaper
from rlhf_core.errors import UserError

START_SECONDS = 180.0
TAIL_LINES = 15


class ServiceError(UserError):
    """A service ended by itself, or never came up; the message has the end of its log."""


class Service(NamedTuple):
    """A program to run: name, command line, what it adds to the environment, and when it is ready.

    `problem` says what is still missing, and nothing once the service does its work.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    problem: Callable[[], str] = str


class Supervisor:
    """Starts services with a log file each, and ends all of them when its block is left."""

    def __init__(self, home: Path, stop_order: Sequence[str]) -> None:
        """Args: home: where they work, with their logs below it; the order in which they stop.

        Nothing is found in a home: in the folder of a user they would read settings of other
        programs (`.env`, `prefect.toml`).
        """
        self._home = home
        self._logs = home / "logs"
        self._token = uuid4().hex
        self._stop_order = stop_order
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        marks = [self._mark(name) for name in self._stop_order]
        self._reaper = subprocess.Popen(
            [sys.executable, "-P", "-m", "flows.local.reaper", *marks],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        reaper.end([self._mark(name) for name in self._stop_order])
        for process in self._processes.values():
            process.kill()  # one that was too young to show its mark
            process.wait()
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait()

    def start(self, service: Service, *, again: bool = False) -> None:
        """Start it in a session of its own, so that Ctrl-C in the terminal does not reach it.

        Args:
            again: it has run before; its log goes on.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        with self.log(service.name).open("ab" if again else "wb") as log:
            self._processes[service.name] = subprocess.Popen(
                service.command,
                env={
                    **os.environ,
                    **service.environment,
                    reaper.VARIABLE: self._mark(service.name),
                    "PYTHONUNBUFFERED": "1",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self._home,
            )

    def log(self, name: str) -> Path:
        """The file that has what the service prints."""
        return self._logs / f"{name}.log"

    def run(self, service: Service) -> None:
        """Start a service that has an end, and wait for it while the others live."""
        self.start(service)
        process = self._processes.pop(service.name)
        while process.poll() is None:
            self.check()
            time.sleep(0.1)
        if process.returncode:
            raise self._death(service.name, process.returncode)

    def until_ready(self, *services: Service, stop: Callable[[], bool] = lambda: False) -> None:
        """Wait until each service has no problem any more, or until `stop` says so."""
        deadline = time.monotonic() + START_SECONDS
        for service in services:
            while (problem := service.problem()) and not stop():
                self.check()
                if time.monotonic() > deadline:
                    raise ServiceError(
                        f"{service.name} was not ready within {START_SECONDS:.0f} s ({problem}). "
                        f"{self._tail(service.name)}"
                    )
                time.sleep(0.2)

    def check(self) -> None:
        """Raise ServiceError if any of the services, or the reaper, has ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise self._death(name, process.returncode)
        if self._reaper.poll() is not None:
            raise ServiceError("The process that guards the services was killed: start again.")

    def _death(self, name: str, code: int) -> ServiceError:
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return ServiceError(f"{name} ended ({how}). {self._tail(name)}")

    def _tail(self, name: str) -> str:
        lines = self.log(name).read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join([f"The end of {self.log(name)}:", *lines])

    def _mark(self, name: str) -> str:
        return f"{self._token}:{name}"

"""Runs several programs together: if one ends, all are stopped. It does not know what they do."""

import os
import shutil
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
FULL = 64 << 10  # bytes: a disk with less is full


class ServiceError(UserError):
    """A service ended by itself or never became ready; the message has the end of its log."""


class Service(NamedTuple):
    """A program to run: name, command line, extra environment, and a readiness check.

    `problem` returns why the service is not ready, and an empty string once it is.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    problem: Callable[[], str] = str


class Supervisor:
    """Starts services with one log file each, and stops all of them at the end of its block."""

    def __init__(self, home: Path, stop_order: Sequence[str]) -> None:
        """Args: home: their working folder, which holds the logs; stop_order: names of services.

        They do not work in the user's folder, where they would read settings of other programs
        (`.env`, `prefect.toml`).
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
            process.kill()  # it may have been too young to show its mark
            process.wait()
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait()

    def start(self, service: Service, *, again: bool = False) -> None:
        """Start a service in its own session, so that Ctrl-C in the terminal does not reach it.

        Args:
            again: whether it ran before; its log is then continued.
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
        """The file with the output of a service."""
        return self._logs / f"{name}.log"

    def run(self, service: Service) -> None:
        """Run a service to completion, while the others are running."""
        self.start(service)
        process = self._processes.pop(service.name)
        while process.poll() is None:
            self.check()
            time.sleep(0.1)
        if process.returncode:
            raise self._death(service.name, process.returncode)

    def until_ready(self, *services: Service, stop: Callable[[], bool] = lambda: False) -> None:
        """Wait until each service is ready, or until `stop()` is true."""
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
            raise ServiceError(
                "The process that cleans up after the services was killed: start again."
            )

    def _death(self, name: str, code: int) -> ServiceError:
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return ServiceError(f"{name} ended ({how}). {self._tail(name)}")

    def _tail(self, name: str) -> str:
        log = self.log(name)
        if shutil.disk_usage(log.parent).free < FULL:  # then the log has no reason either
            return f"The disk of {log.parent} is full: free some space, and start again."
        lines = self.log(name).read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join([f"The end of {self.log(name)}:", *lines])

    def _mark(self, name: str) -> str:
        return f"{self._token}:{name}"

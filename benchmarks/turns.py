"""Programs that take turns on one machine: each stays, and computes only when it has its turn.

A side is started once, so that loading and warming up are paid once, and then measured in many
short turns between those of the others. Its program runs with `--turns` (see `report.Clock`).
"""

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Any

Line = dict[str, Any]

ROOT = Path(__file__).parent.parent
STAT = Path("/proc/stat")


class ProgramError(Exception):
    """A program ended before its turns did; the message is the end of what it said."""


@dataclass
class Program:
    """A process that does an iteration for each line that it gets."""

    words: Sequence[str]
    environment: Mapping[str, str]
    about: Line = field(default_factory=dict)  # what it says of itself before the first iteration
    _process: "subprocess.Popen[str] | None" = None
    _errors: IO[str] | None = None

    def __enter__(self) -> "Program":
        self._errors = TemporaryFile("w+")
        self._process = subprocess.Popen(
            [*self.words, "--turns"],
            env=dict(self.environment),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process is not None
        assert self._errors is not None
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def turn(self, iterations: int) -> Line:
        """Let it do so many iterations: their tokens, their seconds by phase, and the peak memory.

        Raises: ProgramError when it ends instead.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        self.about = self.about or self._read()
        laps = []
        for _ in range(iterations):
            try:
                self._process.stdin.write("go\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                raise self._failure() from None
            laps.append(self._read())
        seconds: dict[str, float] = {}
        for lap in laps:
            for phase, took in lap["seconds"].items():
                seconds[phase] = seconds.get(phase, 0.0) + took
        cpu = seconds.pop("cpu")
        iteration = sum(seconds.values())
        tokens = sum(lap["tokens"] for lap in laps)
        return {
            "iterations": iterations,
            "tokens": tokens,
            "seconds": seconds | {"all": iteration},
            "cpu_seconds": cpu,
            "tokens_per_second": tokens / iteration,
            "peak_memory_mb": laps[-1]["peak_memory_mb"],
        }

    def _read(self) -> Line:
        assert self._process is not None
        assert self._process.stdout is not None
        for text in self._process.stdout:
            if text.startswith("{"):
                line: Line = json.loads(text)
                return line
        raise self._failure()

    def _failure(self) -> ProgramError:
        assert self._process is not None
        assert self._errors is not None
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read()[-2000:]
        return ProgramError(f"{said}\nexit status {self._process.returncode}")


def order(names: Sequence[str], number: int) -> list[str]:
    """Each comes first, second and last in turn, round by round."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


@dataclass
class Others:
    """How much the processors did for others while something ran here."""

    _busy: float | None = None
    _begun: float = 0.0

    def begin(self) -> None:
        self._busy, self._begun = _busy_seconds(), time.monotonic()

    def cores(self, own_cpu_seconds: float) -> float | None:
        """Cores that others kept busy since `begin`, steal included; None where nothing tells."""
        now, wall = _busy_seconds(), time.monotonic() - self._begun
        if now is None or self._busy is None:
            return None
        return max(0.0, now - self._busy - own_cpu_seconds) / wall


def _busy_seconds() -> float | None:
    """Seconds that all processors have worked, or that a hypervisor gave to somebody else."""
    if not STAT.is_file():
        return None
    words = STAT.read_text(encoding="ascii").splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, soft, steal = map(int, words[:8])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")

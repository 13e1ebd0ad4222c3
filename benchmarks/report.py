"""Times of a benchmark, and what each side prints: a line when it ends, and one for each iteration
where `table.py` has the sides take turns."""

import json
import os
import resource
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from work import Work


@dataclass
class Clock:
    """Seconds of each phase of each iteration, and the CPU seconds of all threads.

    With `turns` an iteration begins when a line has come on the standard input, and is printed as a
    line of JSON when it has ended, so that several programs can take turns on one machine. Before
    the first the program prints what it is.
    """

    first: str  # the phase that an iteration begins with
    turns: bool = False
    tokens_of: Callable[[int], int] | None = None  # how many the iteration of a number works on
    about: dict[str, Any] = field(default_factory=dict)  # the program's name, its settings
    laps: list[dict[str, float]] = field(default_factory=list)
    phase: str | None = None
    _since: tuple[float, float] = (0.0, 0.0)

    def begin(self, phase: str | None) -> None:
        """The current phase ends here, and this one begins; None: nothing is timed."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = (time.perf_counter(), time.process_time())
        if self.phase is not None:
            wall, cpu = (end - start for end, start in zip(now, self._since, strict=True))
            lap = self.laps[-1]
            lap[self.phase] = lap.get(self.phase, 0.0) + wall
            lap["cpu"] = lap.get("cpu", 0.0) + cpu
            if self.turns and phase in (self.first, None):
                self._tell(lap)
        if phase == self.first:
            if self.turns:
                self._wait()
            self.laps.append({})
            now = (time.perf_counter(), time.process_time())
        self.phase, self._since = phase, now

    def _tell(self, lap: dict[str, float]) -> None:
        """Print an iteration that has ended, on the standard output that the process began with."""
        tokens = self.tokens_of(len(self.laps) - 1) if self.tokens_of else None
        line = {"tokens": tokens, "seconds": lap, "peak_memory_mb": peak_memory_mb()}
        print(json.dumps(line), file=sys.__stdout__, flush=True)

    def _wait(self) -> None:
        if not self.laps:
            print(json.dumps(self.about | versions()), file=sys.__stdout__, flush=True)
        if not sys.stdin.readline():
            raise SystemExit("whoever gives the turns has gone")


def report(
    program: str,
    work: Work,
    arguments: Namespace,
    clock: Clock,
    tokens: Sequence[int],
    **more: Any,
) -> None:
    """Print the JSON line: medians of the iterations after the warm-up.

    Args:
        program: name and version of the side that was measured.
        tokens: how many each iteration worked on, warm-up included, padding left out.
        more: what else the line should say.
    """
    measured, counts = clock.laps[arguments.warmup :], tokens[arguments.warmup :]
    phases = [name for name in measured[0] if name != "cpu"]
    walls = [sum(lap[phase] for phase in phases) for lap in measured]
    seconds = {phase: median(lap[phase] for lap in measured) for phase in phases}
    line = {
        "program": program,
        "work": work,
        **{name: v.name if isinstance(v, Path) else v for name, v in vars(arguments).items()},
        "seconds": {**seconds, "iteration": median(walls)},
        "cpu_seconds": median(lap["cpu"] for lap in measured),
        "tokens_per_iteration": sum(counts) / len(counts),
        "tokens_per_second": median(n / wall for n, wall in zip(counts, walls, strict=True)),
        "peak_memory_mb": peak_memory_mb(),
        **versions(),
        **more,
    }
    print(json.dumps(line), flush=True)


def versions() -> dict[str, Any]:
    """What a program computes on and with."""
    return {
        "allocator": "tuned" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "plain",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def peak_memory_mb() -> float:
    """Of tensors on a GPU where there is one, of the process otherwise (Linux counts it in KiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

"""Ends marked processes, even those whose parent was killed. Linux only; standard library alone.

A service of `rlhf up` carries a mark in its environment, and whatever it starts inherits the mark:
server workers, and flow runs, which Prefect puts into sessions of their own, out of reach of a
signal to a process group. `rlhf up` starts `python -m flows.guard MARK...` and keeps a pipe to it
open. However `rlhf up` ends, SIGKILL included, the kernel closes the pipe and the guard acts.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "RLHF_SERVICE"
GRACE_SECONDS = 8.0


def marked(mark: str) -> list[int]:
    """The ids of the running processes that carry `mark`; a zombie carries nothing any more."""
    wanted = f"{VARIABLE}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # ended meanwhile, or another user's
            continue
        if wanted in environment.split(b"\0"):
            found.append(int(entry.name))
    return found


def end(marks: Sequence[str]) -> None:
    """Stop the processes of each mark, one mark after the other: asked first, then made to."""
    for mark in marks:
        _signal(marked(mark), signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
        while left := marked(mark):
            _signal(left, signal.SIGKILL)
            time.sleep(0.05)


def _signal(processes: Sequence[int], number: signal.Signals) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    sys.stdin.buffer.read()  # returns when the other end of the pipe is closed
    end(sys.argv[1:])

"""Terminates marked processes, including orphans. Linux only; standard library only.

Each service of `rlhf up` has a mark in its environment, which its children inherit: server workers,
and flow runs, which Prefect puts into sessions of their own, out of reach of a signal to a process
group. `rlhf up` starts `python -m flows.local.reaper MARK...` and keeps a pipe to it open. However
`rlhf up` ends, even by SIGKILL, the kernel closes the pipe and the reaper terminates the processes.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

VARIABLE = "RLHF_SERVICE"
GRACE_SECONDS = 6.0  # first for the children, then for the service


def end(marks: Sequence[str]) -> None:
    """Terminate the processes of each mark, one mark after the other.

    Children end first, so that the service which started them still sees and reports it. Each
    process gets one SIGTERM, and SIGKILL after `GRACE_SECONDS`.
    """
    for mark in marks:
        _terminate(partial(children, mark))
        _terminate(partial(marked, mark))
        while left := marked(mark):
            _signal(left, signal.SIGKILL)
            time.sleep(0.05)


def marked(mark: str) -> set[int]:
    """The ids of running processes with `mark` in their environment; a zombie has none."""
    wanted = f"{VARIABLE}={mark}".encode()
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # it has just ended, or is another user's
            continue
        if wanted in environment.split(b"\0"):
            found.add(int(entry.name))
    return found


def children(mark: str) -> set[int]:
    """The marked processes whose parent is marked too."""
    processes = marked(mark)
    return {process for process in processes if _parent(process) in processes}


def _parent(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[1])


def _terminate(find: Callable[[], set[int]]) -> None:
    """Send SIGTERM to each process that `find` returns, until there is none or time is up."""
    signalled: set[int] = set()
    deadline = time.monotonic() + GRACE_SECONDS
    while (found := find()) and time.monotonic() < deadline:
        _signal(found - signalled, signal.SIGTERM)
        signalled |= found
        time.sleep(0.1)


def _signal(processes: Collection[int], number: signal.Signals) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    sys.stdin.buffer.read()  # returns when the other end of the pipe is closed
    end(sys.argv[1:])

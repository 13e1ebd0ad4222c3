"""Keep a chat template within limits: it is a program that came with a model.

Jinja's sandbox keeps a template from files and modules, not from loops or from a gigabyte of text.
So a template first renders in a process of its own, which this module is too, and later under a
deadline. It imports nothing of ours, because that process runs it by its path.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MIB = 2**20
SECONDS, MEMORY = 2, 512 * MIB  # for one dialogue, which takes a millisecond
TOKENISED = 100_000  # characters a second, at least
LOOK = 0.1  # seconds between two looks at those that render
Messages = Sequence[Mapping[str, Any]]


class TemplateLimitError(Exception):
    """A chat template takes too long, or too much memory."""

    def __init__(self, reason: str = f"it takes more than {SECONDS} s") -> None:
        """The default is what a thread is interrupted with, which takes a class."""
        super().__init__(reason)


@contextmanager
def within_limits(template: str, messages: Messages) -> Iterator[None]:
    """A block that renders `messages` with `template`, and may tokenise what comes out.

    Raises: TemplateLimitError.
    """
    if reason := _rehearsed(template, messages):
        raise TemplateLimitError(reason)
    with _deadline(SECONDS + sum(len(str(message)) for message in messages) / TOKENISED):
        yield


_rehearsals: dict[str, str] = {}


def _rehearsed(template: str, messages: Messages) -> str:
    """Why a template cannot be used; empty if it can. Its first messages are tried."""
    if template not in _rehearsals:
        _rehearsals[template] = _rehearse(template, messages)
    return _rehearsals[template]


def _rehearse(template: str, messages: Messages) -> str:
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__],
            input=json.dumps({"template": template, "messages": list(messages)}).encode(),
            capture_output=True,
            timeout=60 + 10 * SECONDS,  # on a machine that is busy
        )
    except subprocess.TimeoutExpired:
        return str(TemplateLimitError())
    if done.returncode == -signal.SIGXCPU:
        return str(TemplateLimitError())
    if done.returncode:
        return f"it takes more than {MEMORY // MIB} MiB of memory"
    return ""


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise TemplateLimitError in this thread when the block takes more CPU time.

    The clock of the wall would also count the time that a busy machine or a stopped process waits.
    """
    watch, thread = _watch(), threading.get_ident()
    watch.start(thread, seconds)
    try:
        yield
    except TemplateLimitError:
        watch.raised(thread)
        raise
    finally:
        watch.stop(thread)


class _Watch:
    """A thread that looks at those that render: one for all, as a new one takes a millisecond."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._ends: dict[int, float] = {}  # by thread, on its clock
        self._late: set[int] = set()  # threads that an exception is on its way to
        self._busy = threading.Event()
        threading.Thread(target=self._look, name="templates", daemon=True).start()

    def start(self, thread: int, seconds: float) -> None:
        with self._lock:
            self._ends[thread] = _thread_time(thread) + seconds
        self._busy.set()

    def raised(self, thread: int) -> None:
        with self._lock:
            self._late.discard(thread)

    def stop(self, thread: int) -> None:
        with self._lock:
            self._ends.pop(thread, None)
            if thread in self._late:  # in the last moment, and not raised yet
                self._late.discard(thread)
                _raise_in(thread, None)

    def _look(self) -> None:
        while True:
            self._busy.wait()
            time.sleep(LOOK)
            with self._lock:
                for thread, end in list(self._ends.items()):
                    if _thread_time(thread) > end:
                        del self._ends[thread]
                        self._late.add(thread)
                        _raise_in(thread, TemplateLimitError)
                if not self._ends:
                    self._busy.clear()


_watches: list[_Watch] = []


def _watch() -> _Watch:
    """The watch of this process; a fork has no threads but the one that forked."""
    if not _watches or _watches[0].process != os.getpid():
        _watches[:] = [_Watch()]
    return _watches[0]


def _thread_time(thread: int) -> float:
    """The CPU time of a thread (s); the time of the wall where the system does not tell (macOS)."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic()
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    """Raise an exception in a thread as soon as it runs Python again, or take that back."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )


def _main() -> int:
    """The process of its own: the job is on standard input. Errors of the template are no matter
    here, where it lacks the functions of transformers: it will meet them again."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    job = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, hard))
    statm = Path("/proc/self/statm")
    if statm.exists():
        taken = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["strftime_now"] = str
    try:
        environment.from_string(job["template"]).render(
            messages=job["messages"], add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
        )
    except MemoryError:
        return 1
    except Exception:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(_main())

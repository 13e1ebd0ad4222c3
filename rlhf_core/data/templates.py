"""Keep a chat template within limits: it is a program that came with a model.

Jinja's sandbox keeps a template from files and modules, not from loops or from a gigabyte of text.
So a template first renders in a process of its own, which this module is too, and later under a
deadline. It imports nothing of ours, because that process runs it by its path.
"""

import ctypes
import json
import math
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MIB = 2**20
SECONDS, MEMORY = 2, 512 * MIB  # for one dialogue, which takes a millisecond
TOKENISED = 100_000  # characters a second, at least
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
    thread, lock = threading.get_ident(), threading.Lock()
    end = time.thread_time() + seconds
    done = fired = False
    timers: list[threading.Timer] = []

    def look() -> None:
        nonlocal fired
        with lock:
            if done:
                return
            if (left := end - _thread_time(thread)) > 0:
                timers.append(_start_timer(left, look))
            else:
                fired = True
                _raise_in(thread, TemplateLimitError)

    timers.append(_start_timer(seconds, look))
    try:
        yield
    except TemplateLimitError:
        fired = False
        raise
    finally:
        with lock:
            done = True
            timers[-1].cancel()
            if fired:  # in the last moment, and not raised yet
                _raise_in(thread, None)


def _thread_time(thread: int) -> float:
    """The CPU time of another thread (s); infinite where the system does not tell (macOS)."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return math.inf
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


def _start_timer(seconds: float, function: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()
    return timer


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

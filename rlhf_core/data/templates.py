"""Keep a chat template within limits: it is a program that came with a model.

Jinja's sandbox keeps a template from files and modules, not from loops or from a gigabyte of text.
So a template first renders in a process of its own, which this module is too, and later under a
deadline. It imports nothing of ours, because that process runs it by its path.
"""

import ctypes
import json
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MIB = 2**20
SECONDS, MEMORY = 2, 512 * MIB  # for one dialogue, which takes a millisecond
Messages = Sequence[Mapping[str, Any]]


class TemplateLimitError(Exception):
    """A chat template takes too long, or too much memory."""

    def __init__(self, reason: str = f"it takes more than {SECONDS} s") -> None:
        """The default is what a thread is interrupted with, which takes a class."""
        super().__init__(reason)


@contextmanager
def within_limits(template: str, messages: Messages) -> Iterator[None]:
    """A block that renders `messages` with `template`.

    Raises: TemplateLimitError.
    """
    if reason := _rehearsed(template, json.dumps(list(messages))):
        raise TemplateLimitError(reason)
    with _deadline(SECONDS):
        yield


_rehearsals: dict[str, str] = {}


def _rehearsed(template: str, messages: str) -> str:
    """Why a template cannot be used; empty if it can. Its first messages are tried."""
    if template not in _rehearsals:
        _rehearsals[template] = _rehearse(template, messages)
    return _rehearsals[template]


def _rehearse(template: str, messages: str) -> str:
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__],
            input=json.dumps({"template": template, "messages": json.loads(messages)}).encode(),
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
    """Raise TemplateLimitError in this thread when the block takes longer."""
    thread, lock = threading.get_ident(), threading.Lock()
    done = fired = False

    def interrupt() -> None:
        nonlocal fired
        with lock:
            if not done:
                fired = True
                _raise_in(thread, TemplateLimitError)

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except TemplateLimitError:
        fired = False
        raise
    finally:
        timer.cancel()
        with lock:
            done = True
            if fired:  # in the last moment, and not raised yet
                _raise_in(thread, None)


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

"""Slow calls at the same time, whose results come as they are ready."""

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(
    worker: Callable[[], AbstractContextManager[Callable[[T, threading.Event], R]]],
    items: Sequence[T],
    at_once: int,
) -> Generator[tuple[int, R]]:
    """The number and the result of each item, in the order in which they finish.

    The first exception of a call is raised here, and no other call is begun. The threads die with
    the process, so nobody waits for a call under way when a person stops the run.

    Args:
        worker: what a thread opens and closes itself, such as a connection. It gives the call,
            which gets an item, and an event that is set when its result is no longer wanted.
    """
    waiting = iter(range(len(items)))
    taking, stop = threading.Lock(), threading.Event()
    done: queue.SimpleQueue[tuple[int, R | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        number = 0
        try:
            with worker() as call:
                while not stop.is_set():
                    with taking:
                        number = next(waiting, -1)
                    if number < 0:
                        return
                    done.put((number, call(items[number], stop), None))
        except BaseException as error:
            stop.set()
            done.put((number, None, error))

    for _ in range(min(at_once, len(items))):
        threading.Thread(target=work, name="judge", daemon=True).start()
    try:
        for _ in items:
            number, result, error = done.get()
            if error is not None:
                raise error
            yield number, result  # type: ignore[misc]  # a result of R may be None
    finally:
        stop.set()

"""A state is copied in memory, so that a thread can write it while training goes on.

Copying is quicker than writing. Hashing, the checksums of torch's format and the writing itself
release the interpreter, so training is held up by the copy alone. This module knows tensors and
memory, but nothing about checkpoints.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from rlhf_core.machine.memory import free_memory

SHARE = 0.5  # of the memory that is free now may be taken by a copy: a step needs some too


class Writer:
    """Runs one function at a time in a thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a function was started whose end nobody has asked for."""
        return self._thread is not None

    @property
    def done(self) -> bool:
        """Whether there is nothing to wait for: `wait` returns at once."""
        return self._thread is None or not self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Run a function in a thread.

        Raises: RuntimeError when `wait` was not called for the one before.
        """
        if self.busy:
            raise RuntimeError("the writer is busy: wait for it")
        self._error = None

        def run() -> None:
            try:
                work()
            except BaseException as error:  # `wait` raises it where it can be handled
                self._error = error

        # A daemon does not keep a process that was interrupted again and again: what it leaves has
        # a temporary name. Whoever starts it waits for it in every other case.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the function to end, if one runs.

        Raises: what the function raised, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def copied(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """A deep copy of a state, which torch.save writes as the same bytes; None without room for it.

    Tensors are copied on the device that they are on. Memory is asked for before it is taken: the
    copy may have `SHARE` of what is free.
    """
    needed: dict[torch.device, int] = {}
    for device, size in _storages(state):
        needed[device] = needed.get(device, 0) + size
    if any(size > SHARE * free_memory(device) for device, size in needed.items()):
        return None
    try:
        # Tensors that share memory share it in the copy too, since all are copied by one call.
        return copy.deepcopy(dict(state))
    except (MemoryError, RuntimeError):  # torch has no other error for a CPU without memory
        return None


def _storages(state: Any) -> Iterator[tuple[torch.device, int]]:
    """Device and bytes of each piece of memory behind the tensors of a state, each once."""
    found: dict[tuple[torch.device, int], int] = {}
    stack = [state]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            found[item.device, storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, Mapping):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
    return ((device, size) for (device, _), size in found.items())

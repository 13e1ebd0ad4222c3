"""What ranks on a cluster say to the process that waits for them, and what it says to them: stop.

On the cluster it is a Ray actor on the machine of the process that waits; nothing in it is of Ray.
"""

import threading
from typing import Any, TypeAlias

Letter: TypeAlias = dict[str, Any]


class Mailbox:
    """Letters in the order in which each sender wrote them."""

    def __init__(self) -> None:
        self._letters: list[Letter] = []
        self._stopping = False
        self._lock = threading.Lock()

    def tell(self, letter: Letter) -> None:
        """Add a letter."""
        with self._lock:
            self._letters.append(letter)

    def take(self) -> list[Letter]:
        """All letters since the last call."""
        with self._lock:
            taken, self._letters = self._letters, []
        return taken

    def stop(self) -> None:
        """Ask the ranks to save a checkpoint and end."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether they are asked to."""
        return self._stopping

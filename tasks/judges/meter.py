"""What judges cost, counted by all threads that ask."""

import threading

from rlhf_core.judges.judge import Cost


class Meter:
    """Adds up costs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cost = Cost()

    @property
    def cost(self) -> Cost:
        """The cost so far."""
        return self._cost

    def add(
        self, *, requests: int = 0, remembered: int = 0, tokens: int = 0, seconds: float = 0.0
    ) -> None:
        """Add to the cost."""
        with self._lock:
            was = self._cost
            self._cost = Cost(
                was.requests + requests,
                was.remembered + remembered,
                was.tokens + tokens,
                was.seconds + seconds,
            )

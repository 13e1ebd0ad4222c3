"""The order in which training takes its rows, and the position in it, which can be saved."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch


class Batches(Iterator[list[int]]):
    """Yields the indices of one batch after another, shuffled anew in each epoch.

    The last batch of an epoch may be short. The state is the rest of the epoch, the number of
    epochs that follow, and the generator.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        epochs: int,
        generator: torch.Generator,
        *,
        first_in_order: bool = False,
    ) -> None:
        self._size = size
        self._batch_size = batch_size
        self._generator = generator
        self._waiting = list(range(size)) if first_in_order else []
        self._epochs = epochs - first_in_order

    def __next__(self) -> list[int]:
        if not self._waiting:
            if self._epochs <= 0:
                raise StopIteration
            self._epochs -= 1
            self._waiting = torch.randperm(self._size, generator=self._generator).tolist()
        batch, self._waiting = (
            self._waiting[: self._batch_size],
            self._waiting[self._batch_size :],
        )
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the order."""
        return {
            "waiting": list(self._waiting),
            "epochs": self._epochs,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._waiting, self._epochs = list(state["waiting"]), state["epochs"]
        self._generator.set_state(state["generator"])


class PromptStream(Iterator[list[int]]):
    """Yields numbers of prompts forever, each prompt once before any repeats."""

    def __init__(self, prompts: int, size: int, order: torch.Generator) -> None:
        self._prompts = prompts
        self._size = size
        self._order = order
        self._waiting: list[int] = []

    def __next__(self) -> list[int]:
        while len(self._waiting) < self._size:
            self._waiting += torch.randperm(self._prompts, generator=self._order).tolist()
        batch, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the order."""
        return {"waiting": list(self._waiting), "order": self._order.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._waiting = list(state["waiting"])
        self._order.set_state(state["order"])


def chunks(items: list[int], size: int) -> Iterator[list[int]]:
    """Consecutive chunks of at most `size` items: the micro-batches of a batch."""
    for start in range(0, len(items), size):
        yield items[start : start + size]

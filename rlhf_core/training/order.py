"""The order in which training takes its rows, and the position in it, which can be saved.

A position is what the order was drawn from and how many rows were taken, so that it is as small for
millions of rows as for ten: each safe point of a training copies it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Order(NamedTuple):
    """All rows once, and the state of the generator that they were drawn from; None = given."""

    rows: Tensor  # int32
    drawn_from: Tensor | None

    def state(self) -> dict[str, Tensor]:
        if self.drawn_from is None:
            return {"rows": self.rows}
        return {"drawn_from": self.drawn_from}


class _Orders:
    """Rows in the order of one permutation after another, drawn when somebody asks for it."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self._size = size
        self._generator = generator
        self._orders: list[_Order] = []  # with rows that were not taken
        self._taken = 0  # of the first

    def __len__(self) -> int:
        """The rows that were drawn and not taken."""
        return sum(len(order.rows) for order in self._orders) - self._taken

    def give(self, rows: Tensor) -> None:
        """Append rows in an order that is not drawn."""
        if len(rows):
            self._orders.append(_Order(rows.int(), None))

    def draw(self) -> None:
        """Append all rows in an order that is."""
        drawn_from = self._generator.get_state()
        rows = torch.randperm(self._size, generator=self._generator)
        self._orders.append(_Order(rows.int(), drawn_from))

    def take(self, count: int) -> list[int]:
        """The next rows; fewer if no more are drawn."""
        found: list[int] = []
        while self._orders and len(found) < count:
            rows = self._orders[0].rows[self._taken : self._taken + count - len(found)].tolist()
            found += rows
            self._taken += len(rows)
            if self._taken == len(self._orders[0].rows):
                self._orders, self._taken = self._orders[1:], 0
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "orders": [order.state() for order in self._orders],
            "taken": self._taken,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._orders = []
        for order in state["orders"]:
            if "rows" in order:
                self.give(order["rows"])
            else:
                self._generator.set_state(order["drawn_from"])
                self.draw()
        self._taken = state["taken"]
        self._generator.set_state(state["generator"])

    def load_waiting(self, waiting: list[int], generator: Tensor) -> None:
        """Restore a state of earlier versions, which list the rows that are left."""
        self._orders, self._taken = [], 0
        self.give(torch.tensor(waiting))
        self._generator.set_state(generator)


class Batches(Iterator[list[int]]):
    """Yields the indices of one batch after another, shuffled anew in each epoch.

    The last batch of an epoch may be short. The state is what the epoch was drawn from, how far it
    is, the number of epochs that follow, and the generator.
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
        self._batch_size = batch_size
        self._rows = _Orders(size, generator)
        if first_in_order:
            self._rows.give(torch.arange(size))
        self._epochs = epochs - first_in_order

    def __next__(self) -> list[int]:
        if not len(self._rows):
            if self._epochs <= 0:
                raise StopIteration
            self._epochs -= 1
            self._rows.draw()
        return self._rows.take(self._batch_size)

    def state_dict(self) -> dict[str, Any]:
        """The position in the order."""
        return {"epochs": self._epochs, **self._rows.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, also in earlier versions."""
        if "waiting" in state:
            self._rows.load_waiting(state["waiting"], state["generator"])
        else:
            self._rows.load_state_dict(state)
        self._epochs = state["epochs"]


class PromptStream(Iterator[list[int]]):
    """Yields numbers of prompts forever, each prompt once before any repeats."""

    def __init__(self, prompts: int, size: int, order: torch.Generator) -> None:
        self._size = size
        self._prompts = _Orders(prompts, order)

    def __next__(self) -> list[int]:
        while len(self._prompts) < self._size:
            self._prompts.draw()
        return self._prompts.take(self._size)

    def state_dict(self) -> dict[str, Any]:
        """The position in the order."""
        return self._prompts.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, also in earlier versions."""
        if "waiting" in state:
            self._prompts.load_waiting(state["waiting"], state["order"])
        else:
            self._prompts.load_state_dict(state)


def chunks(items: list[int], size: int) -> Iterator[list[int]]:
    """Consecutive chunks of at most `size` items: the micro-batches of a batch."""
    for start in range(0, len(items), size):
        yield items[start : start + size]

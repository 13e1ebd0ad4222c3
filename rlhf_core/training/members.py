"""Several members that train at once on one trunk, each on votes of its own.

What lies below the adapters is the same for all members and does not change while they train. So
training goes through the votes in blocks of a few batches: the states of a block's texts are
computed once, and within the block every member has its own order, and its own bootstrap of the
votes (Breiman 1996, https://doi.org/10.1007/BF00058655), drawn by prompt, since votes on one prompt
are correlated.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_core.backbone.adapters import adapted_from
from rlhf_core.backbone.networks import Network
from rlhf_core.backbone.packing import Packed, SharedStates, pack_pairs
from rlhf_core.backbone.responses import share
from rlhf_core.data.pairs import Pair
from rlhf_core.seeding import generator
from rlhf_core.training.order import chunks

BLOCK = 4  # batches whose texts keep their states in memory


def bootstrap(prompts: Tensor, draws: torch.Generator) -> list[int]:
    """How often each vote is in a bootstrap that draws as many prompts as there are, with
    replacement.

    Shapes: prompts (N,) number of the prompt of each vote, from 0.
    """
    number = int(prompts.max()) + 1
    drawn = torch.randint(number, (number,), generator=draws)
    return torch.bincount(drawn, minlength=number)[prompts].tolist()


class MemberStep(NamedTuple):
    """What the members learn from in one step, each from its own rows."""

    picked: list[list[int]]  # of each member; may be empty
    block: list[list[list[int]]]  # the `picked` of all steps of its block
    new: bool  # whether the block differs from that of the step before


class MemberBatches(Iterator[MemberStep]):
    """Yields the rows of one step after another. A member never gets a row of weight 0.

    As many steps as one model would take. The state is the number of steps taken: everything else
    follows from the seed.

    Args:
        weights: of each member and row.
        batch_size: rows of a step if every weight were 1.
        seed: of the run.
    """

    def __init__(
        self, weights: Sequence[Sequence[int]], batch_size: int, epochs: int, seed: int
    ) -> None:
        self._weights = weights
        self._rows = len(weights[0])
        self._batch_size = batch_size
        self._steps = math.ceil(self._rows / batch_size)  # of an epoch
        self._epochs = epochs
        self._seed = seed
        self._taken = 0
        self._at: tuple[int, int] | None = None  # epoch and block of the last step
        self._order: tuple[int, Tensor] | None = None  # of all rows, and its epoch
        self._block: list[list[list[int]]] = []

    def __next__(self) -> MemberStep:
        if self._taken >= self._steps * self._epochs:
            raise StopIteration
        epoch, step = divmod(self._taken, self._steps)
        at = epoch, step // BLOCK
        if new := at != self._at:
            self._block, self._at = self._plan(*at), at
        self._taken += 1
        return MemberStep(self._block[step % BLOCK], self._block, new)

    def _plan(self, epoch: int, block: int) -> list[list[list[int]]]:
        size = BLOCK * self._batch_size
        rows = self._order_of(epoch)[block * size : (block + 1) * size].tolist()
        steps = math.ceil(len(rows) / self._batch_size)
        members = []
        for number, weights in enumerate(self._weights, start=1):
            mine = torch.tensor([row for row in rows if weights[row]], dtype=torch.long)
            draws = self._draws(f"{epoch}/{block}/{number}")
            mine = mine[torch.randperm(len(mine), generator=draws)]
            members.append([part.tolist() for part in mine.tensor_split(steps)])
        return [list(step) for step in zip(*members, strict=True)]

    def _order_of(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, torch.randperm(self._rows, generator=self._draws(f"{epoch}"))
        return self._order[1]

    def _draws(self, purpose: str) -> torch.Generator:
        return generator(self._seed, f"reward/order/{purpose}")

    def state_dict(self) -> dict[str, Any]:
        """The position in the order."""
        return {"taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._taken, self._at = state["taken"], None


class PairStates:
    """Pairs with the states below the adapters, computed once for all members.

    Without such states (an adapter in the first block, or a model that computes padded blocks)
    every member computes its pairs whole.

    Args:
        network: any of the members.
        pairs: by row.
        size: pairs in one forward pass.
        check: called before each.
    """

    def __init__(
        self,
        network: Network,
        pairs: Mapping[int, Pair],
        size: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._network = network
        self._pairs = pairs
        self._depth = adapted_from(network.model)
        self._states: dict[int, tuple[Tensor, Tensor]] = {}  # (T, d) of chosen and rejected
        self._in_tuple = False
        if self._depth is None:
            return
        for rows in chunks(list(pairs), size):
            check()
            packed = share(pack_pairs([pairs[row] for row in rows], network.model.device), network)
            assert packed.shared is not None
            self._in_tuple = packed.shared.in_tuple
            texts = [
                packed.shared.states[index[:length]]
                for index, length in zip(packed.unpack_index, packed.lengths.tolist(), strict=True)
            ]
            self._states |= dict(zip(rows, zip(texts[::2], texts[1::2], strict=True), strict=True))

    def pack(self, rows: Sequence[int]) -> Packed:
        """The texts of some rows, chosen and rejected in turn, with their states."""
        device = self._network.model.device
        packed = pack_pairs([self._pairs[row] for row in rows], device)
        if self._depth is None:
            return packed
        texts = [text for row in rows for text in self._states[row]]
        states = packed.repack(pad_sequence(texts, batch_first=True))
        body = self._network.model.base_model
        return replace(packed, shared=SharedStates(body, self._depth, states, self._in_tuple))

"""The order of a queue: arms, and in each arm which pair comes when.

The design arm takes the D-optimal order, at most one pair of nearly equal prompts before each other
prompt has had as many; the random arm takes its pairs as a hash has them; the hold-out too, one
pair of each prompt before the second of any. The three are interleaved by their shares.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.labelling.arms import Arm, Known, Shares, hashed, interleaved
from rlhf_core.labelling.design import d_optimal
from rlhf_core.labelling.probe import Probe

HORIZON = 1000  # pairs of the design that are put in order; those behind come by hash
POOL = 5000  # pairs of the design that are looked at for that, the first by the hash


@dataclass(frozen=True)
class Waiting:
    """The pairs of a queue, and what has been asked."""

    keys: Sequence[str]  # (N,) of each pair, the same in every process
    groups: Sequence[int]  # (N,) the group of nearly equal prompts
    names: Sequence[str]  # (G,) the key of each group
    asked: Sequence[int]  # (G,) pairs of each group that were labelled or are being labelled
    held_out: frozenset[int]  # groups whose labels were held out
    trained_on: frozenset[int]  # groups with labels that were not

    def arms(self, salt: str, shares: Shares) -> list[Arm]:
        """The arm of each group."""
        return [
            Known(name, group in self.held_out, group in self.trained_on).arm(salt, shares)
            for group, name in enumerate(self.names)
        ]


class Placed(NamedTuple):
    """A pair and its place."""

    pair: int  # index
    arm: Arm


def order_queue(
    waiting: Waiting,
    features: Callable[[list[int]], Tensor],
    probe: Probe,
    *,
    salt: str,
    shares: Shares,
    by_design: bool = True,
    horizon: int = HORIZON,
    pool: int = POOL,
) -> list[Placed]:
    """All pairs of a queue in their order, each with the arm that its label will belong to.

    Args:
        features: (n, k) of the pairs with these indices, as the probe reads them; asked for those
            of the design.
        probe: what the votes so far say about the last layer.
        salt: of the project.
        by_design: False = the design arm is in random order as well, and its labels belong to the
            random arm.
        horizon: how many pairs of the design are put in order; those behind them come by hash and
            belong to the random arm, until the next time.
        pool: how many pairs of the design are looked at, so that a long queue costs no more.
    """
    arms = waiting.arms(salt, shares)
    of: dict[Arm, list[int]] = defaultdict(list)
    drawn = sorted(range(len(waiting.keys)), key=lambda i: hashed(waiting.keys[i], f"{salt}/order"))
    for pair in drawn:
        of[arms[waiting.groups[pair]]].append(pair)
    of["hold_out"] = _one_of_each(of["hold_out"], waiting.groups, waiting.asked)
    chosen: list[int] = []
    if by_design and of["design"]:
        chosen = _designed(waiting, of["design"][:pool], features, probe, horizon)
    first = set(chosen)
    of["design"] = chosen + [pair for pair in of["design"] if pair not in first]

    def belongs(pair: int) -> Arm:
        arm = arms[waiting.groups[pair]]
        return "random" if arm == "design" and pair not in first else arm

    return [Placed(pair, belongs(pair)) for pair in interleaved(of, shares)]


def _designed(
    waiting: Waiting,
    pairs: list[int],
    features: Callable[[list[int]], Tensor],
    probe: Probe,
    horizon: int,
) -> list[int]:
    """The first pairs of the design."""
    x = features(pairs)
    order = d_optimal(
        x,
        probe.information(x),
        probe.precision,
        horizon,
        groups=torch.tensor([waiting.groups[pair] for pair in pairs]),
        asked=torch.tensor(list(waiting.asked)),
    )
    return [pairs[i] for i in order.chosen.tolist()]


def _one_of_each(pairs: list[int], groups: Sequence[int], asked: Sequence[int]) -> list[int]:
    """The pairs so that no group is asked about again before each other one has had as many."""
    turns: Counter[int] = Counter()
    turn = {}
    for pair in pairs:
        turn[pair] = asked[groups[pair]] + turns[groups[pair]]
        turns[groups[pair]] += 1
    return sorted(pairs, key=lambda pair: turn[pair])

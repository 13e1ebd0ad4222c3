"""The processes that train together, each with its share of every batch. Knows nothing of losses.

One process alone is the same with a world of one, so a stage is written once. With several, torch
brings the process group and wraps the networks (DDP), or spreads them over the ranks (FSDP); every
number that a stage computes is then that of the whole batch, whatever the number of ranks.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from rlhf_core.errors import ConfigError

Strategy = Literal["ddp", "fsdp"]
PATIENCE = timedelta(minutes=30)  # how long a rank waits for the others, while one writes a file


class Rows(Protocol):
    """Records that can be picked by row."""

    def rows(self, index: Tensor) -> Self:
        """Some of them."""

    def to(self, device: str) -> Self:
        """The same on another device."""


Part = TypeVar("Part", bound=Rows)
Item = TypeVar("Item")


class Micro(NamedTuple):
    """Some rows of a batch that go through the network together."""

    rows: list[int]
    weight: float  # 0 for rows that only keep this rank in step with the others
    last: bool  # of this rank's rows: gradients meet


class Ranks:
    """This process among those that share the work; by itself without a group."""

    def __init__(self, device: torch.device | None = None, strategy: Strategy = "ddp") -> None:
        self._device = device  # of this rank, when there are others
        self._strategy = strategy
        self.rank = 0 if device is None else dist.get_rank()
        self.world = 1 if device is None else dist.get_world_size()

    @classmethod
    def meet(cls, *, cpu: bool, strategy: Strategy = "ddp") -> tuple[Self, str]:
        """Join the processes that a launcher such as torchrun has started; also says which device
        is this rank's."""
        found = None if cpu else torch.accelerator.current_accelerator(check_available=True)
        device = torch.device("cpu")
        if found is not None:
            device = torch.device(found.type, dist.get_node_local_rank(fallback_rank=0))
            torch.accelerator.set_device_index(device)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(), str(device)
        if not dist.is_initialized():
            backend = dist.get_default_backend_for_device(device)
            dist.init_process_group(
                backend, timeout=PATIENCE, device_id=None if found is None else device
            )
        return cls(device, strategy), str(device)

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    # --- whose rows ---

    def share(self, rows: Sequence[int]) -> list[int]:
        """The rows of a batch that this rank works on: neighbours, which may share a prompt."""
        number = len(rows)
        return list(rows[number * self.rank // self.world : number * (self.rank + 1) // self.world])

    def micro_batches(self, rows: Sequence[int], size: int) -> list[Micro]:
        """This rank's rows, at most `size` at a time; every rank has as many micro-batches.

        A rank that has run out of rows goes through one of them again, at weight 0.
        """
        own = self.share(rows)
        number = self.passes(len(rows), size)
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        micros = [Micro(part, 1.0, last=False) for part in parts]
        micros += [Micro([rows[0]], 0.0, last=False)] * (number - len(micros))
        return [*micros[:-1], micros[-1]._replace(last=True)]

    def passes(self, rows: int, size: int) -> int:
        """Micro-batches of at most `size` rows that every rank has of so many rows."""
        largest = -(-rows // self.world)  # rows that a rank may have
        return -(-largest // size)

    # --- networks ---

    def prepare(
        self, network: nn.Module, learns: Iterable[nn.Parameter], blocks: Iterable[nn.Module]
    ) -> nn.Module:
        """The network as it is called in training; the optimizer is made afterwards.

        What does not learn is frozen. With FSDP all parameters of the network are shards from here
        on, those of each block gathered for themselves.

        Raises: ConfigError when FSDP would have to spread a transformer a second time.
        """
        if self._device is None:
            return network
        held = {id(parameter) for parameter in learns}
        for parameter in network.parameters():
            parameter.requires_grad_(id(parameter) in held)
        if self._strategy == "ddp":
            places = None if self._device.type == "cpu" else [self._device.index]
            return DistributedDataParallel(network, device_ids=places)
        if next(_shards(network), None) is not None:
            raise ConfigError(
                "FSDP cannot spread a transformer that two networks learn on; take strategy ddp, "
                "set lora_rank to 0, or train the reward model without LoRA"
            )
        mesh = init_device_mesh(self._device.type, (self.world,))
        for module in (*blocks, network):
            # No copy of the weights outlives a forward pass, so none can be older than the shards.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        _join_shards(network)
        return network

    @contextmanager
    def whole(self, *networks: nn.Module | None) -> Iterator[None]:
        """All weights of the networks on every rank: meanwhile each may call them as often as it
        likes, without the others, and save them. They must not learn meanwhile.

        Nothing happens without FSDP.
        """
        shards = [shard for network in networks if network for shard in _shards(network)]
        for shard in shards:
            shard.set_reshard_after_forward(False, recurse=False)
            shard.unshard()
        flags = [(p, p.requires_grad) for n in networks if n and shards for p in n.parameters()]
        try:
            yield
        finally:
            for parameter, learns in flags:  # adapters may have been switched
                parameter.requires_grad_(learns)
            for shard in shards:
                shard.reshard()
                shard.set_reshard_after_forward(True, recurse=False)

    def accumulate(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Gradients stay on this rank until the last micro-batch, and then are summed over all.

        With FSDP they are summed each time, as no rank has room for all of them.
        """
        if last or not isinstance(module, DistributedDataParallel):
            return nullcontext()
        return cast(AbstractContextManager[None], module.no_sync())

    def backward(self, loss: Tensor) -> None:
        """Add this rank's part of a gradient; the ranks' parts are summed and not averaged."""
        (loss * self.world).backward()

    # --- numbers ---

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over the ranks, the same to the bit on every rank."""
        if self._device is None:
            return dict(values)
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def collect(
        self,
        rows: int,
        size: int,
        ask: Callable[[list[int]], Tensor],
        between: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """(rows, ...) what `ask` says of each row, on the CPU; it is asked about this rank's share,
        at most `size` rows at a time, and as often on every rank, with `between` before each."""
        said = []
        for micro in self.micro_batches(range(rows), size):
            between()
            said.append((micro, ask(micro.rows).cpu()))
        return torch.cat(self._all([tensor for micro, tensor in said if micro.weight]))

    def gather(
        self, parts: Sequence[Part], rows: Sequence[int], join: Callable[[Sequence[Part]], Part]
    ) -> Part:
        """All rows of a batch in order, from the parts that the ranks have worked on.

        `rows` says which rows of the batch this rank's `parts` hold; both may be empty.
        """
        if self._device is None:
            return join(parts)
        whole = join(self._all([part.to("cpu") for part in parts]))
        order = torch.tensor(self._all(list(rows))).argsort()
        return whole.rows(order).to(str(self._device))

    def _all(self, items: list[Item]) -> list[Item]:
        """The items of every rank, in the order of the ranks."""
        if self._device is None:
            return items
        found: list[list[Item]] = [[] for _ in range(self.world)]
        dist.all_gather_object(found, items)
        return [item for part in found for item in part]


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread over the ranks, which have to ask together, on the CPU; any
    other tensor as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part of a whole tensor, spread as another one is, if that is."""
    if not isinstance(tensor, DTensor) or whole.shape != tensor.shape:
        return whole
    mesh, local = tensor.device_mesh, whole.to(tensor.device)
    return distribute_tensor(local, mesh, tensor.placements, src_data_rank=None)


def _shards(network: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in network.modules() if isinstance(module, FSDPModule))


def _join_shards(network: nn.Module) -> None:
    """Have FSDP take the network as the root of its shards, whichever of them is called first.

    The root is what runs the first forward pass, so the network runs one that does nothing. A block
    that came first, when texts are sampled, would be a root of its own.
    """
    root = cast(Any, network)
    root.join_shards = lambda: None
    register_fsdp_forward_method(root, "join_shards")
    root.join_shards()
    del root.join_shards

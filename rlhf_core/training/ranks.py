"""The processes that train together, each on its share of every batch. Knows nothing about losses.

A single process is a world of one, so a stage is written only once. With several, torch provides
the process group and wraps the networks (DDP) or shards them over the ranks (FSDP). Every number
that a stage computes is that of the whole batch, whatever the number of ranks.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rlhf_core.errors import ConfigError

if TYPE_CHECKING:  # FSDP is a tenth of what a run imports, and data are prepared without it
    from torch.distributed.fsdp import FSDPModule

Strategy = Literal["ddp", "fsdp"]
PATIENCE = timedelta(
    minutes=30
)  # how long a rank waits for the others, e.g. while one writes a file


class RowIndexed(Protocol):
    """Records that can be indexed by row."""

    def rows(self, index: Tensor) -> Self:
        """Some of the rows."""

    def to(self, device: str) -> Self:
        """The same records on another device."""


Part = TypeVar("Part", bound=RowIndexed)
Item = TypeVar("Item")


class Micro(NamedTuple):
    """A micro-batch: rows of a batch that go through the network together."""

    rows: list[int]
    weight: float  # 0 for rows that only keep this rank in step with the others
    last: bool  # of this rank: gradients are summed over the ranks


class Ranks:
    """This process among those that share the work; without a group it is the only one."""

    def __init__(
        self,
        device: torch.device | None = None,
        strategy: Strategy = "ddp",
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.stopping = stopping  # whether whoever started the ranks wants them to stop
        self._device = device  # of this rank; None without a group
        self._strategy = strategy
        self.rank = 0 if device is None else dist.get_rank()
        self.world = 1 if device is None else dist.get_world_size()

    @classmethod
    def meet(
        cls, *, cpu: bool, strategy: Strategy = "ddp", stopping: Callable[[], bool] = lambda: False
    ) -> tuple[Self, str]:
        """Join the processes that a launcher such as torchrun started.

        Args:
            stopping: whether they shall stop, for a launcher that cannot send a signal.

        Returns: the ranks, and the device of this one.
        """
        found = None if cpu else torch.accelerator.current_accelerator(check_available=True)
        device = torch.device("cpu")
        if found is not None:
            device = torch.device(found.type, dist.get_node_local_rank(fallback_rank=0))
            torch.accelerator.set_device_index(device)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(stopping=stopping), str(device)
        if not dist.is_initialized():
            backend = dist.get_default_backend_for_device(device)
            dist.init_process_group(
                backend, timeout=PATIENCE, device_id=None if found is None else device
            )
        return cls(device, strategy, stopping), str(device)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    # --- rows ---

    def share(self, rows: Sequence[int]) -> list[int]:
        """The rows of a batch that this rank works on; they are adjacent and may share a prompt."""
        number = len(rows)
        return list(rows[number * self.rank // self.world : number * (self.rank + 1) // self.world])

    def micro_batches(self, rows: Sequence[int], size: int) -> list[Micro]:
        """This rank's rows, at most `size` at a time; every rank gets equally many micro-batches.

        A rank that runs out of rows repeats one of the batch at weight 0.
        """
        share = self.share(rows)
        number = self.passes(len(rows), size)
        parts = [share[start : start + size] for start in range(0, len(share), size)]
        micros = [Micro(part, 1.0, last=False) for part in parts]
        micros += [Micro([rows[0]], 0.0, last=False)] * (number - len(micros))
        return [*micros[:-1], micros[-1]._replace(last=True)]

    def passes(self, rows: int, size: int) -> int:
        """The number of micro-batches of at most `size` rows that every rank runs."""
        largest = -(-rows // self.world)  # rows of a rank, at most
        return -(-largest // size)

    # --- networks ---

    def prepare(
        self, network: nn.Module, learns: Iterable[nn.Parameter], blocks: Iterable[nn.Module]
    ) -> nn.Module:
        """Wrap the network for training; create the optimizer afterwards.

        Parameters that do not train are frozen. With FSDP all parameters of the network become
        shards, which are gathered block by block.

        Raises: ConfigError when FSDP would have to shard a transformer a second time.
        """
        if self._device is None:
            return network
        trainable = {id(parameter) for parameter in learns}
        for parameter in network.parameters():
            parameter.requires_grad_(id(parameter) in trainable)
        if self._strategy == "ddp":
            devices = None if self._device.type == "cpu" else [self._device.index]
            return DistributedDataParallel(network, device_ids=devices)
        if next(_shards(network), None) is not None:
            raise ConfigError(
                "FSDP cannot shard a transformer on which two networks train; use strategy ddp, "
                "set lora_rank to 0, or train the reward model without LoRA"
            )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self._device.type, (self.world,))
        for module in (*blocks, network):
            # No gathered weights outlive a forward pass, so none can be older than the shards.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        _join_shards(network)
        return network

    def require_shared(self, setting: str) -> None:
        """Raise ConfigError when several networks that train cannot share a transformer here.

        `setting` is what the user can change, as an instruction.
        """
        if self._device is not None and self._strategy == "fsdp":
            raise ConfigError(
                "FSDP cannot shard a transformer on which several networks train; use strategy "
                f"ddp, or {setting}"
            )

    @contextmanager
    def whole(self, *networks: nn.Module | None) -> Iterator[None]:
        """Gather all weights of the networks on every rank. Inside the block each rank may call and
        save them independently of the others, but must not train them.

        Does nothing without FSDP.
        """
        shards = [shard for network in networks if network for shard in _shards(network)]
        for shard in shards:
            shard.set_reshard_after_forward(False, recurse=False)
            shard.unshard()
        flags = [(p, p.requires_grad) for n in networks if n and shards for p in n.parameters()]
        try:
            yield
        finally:
            for parameter, learns in flags:  # enabling adapters may have changed them
                parameter.requires_grad_(learns)
            for shard in shards:
                shard.reshard()
                shard.set_reshard_after_forward(True, recurse=False)

    def accumulate(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Keep gradients on this rank until the last micro-batch, which sums them over all ranks.

        With FSDP they are summed each time, since no rank has memory for all of them.
        """
        if last or not isinstance(module, DistributedDataParallel):
            return nullcontext()
        return cast(AbstractContextManager[None], module.no_sync())

    def backward(self, loss: Tensor) -> None:
        """Add this rank's part of a gradient; the parts are summed, not averaged."""
        (loss * self.world).backward()

    # --- numbers ---

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over the ranks, the same to the bit on every rank."""
        if self._device is None:
            return dict(values)
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor on the CPU over the ranks, the same to the bit on every rank."""
        if self._device is None:
            return values
        sums = values.to(self._device)
        dist.all_reduce(sums)
        return sums.cpu()

    def collect(
        self,
        rows: int,
        size: int,
        compute: Callable[[list[int]], Tensor],
        between: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """(rows, ...) the result of `compute` for each row, on the CPU.

        Each rank computes its share, at most `size` rows at a time and equally often on every rank,
        and calls `between` before each time.
        """
        results = []
        for micro in self.micro_batches(range(rows), size):
            between()
            results.append((micro, compute(micro.rows).cpu()))
        return torch.cat(self.from_all([tensor for micro, tensor in results if micro.weight]))

    def gather(
        self, parts: Sequence[Part], rows: Sequence[int], join: Callable[[Sequence[Part]], Part]
    ) -> Part:
        """All rows of a batch in order, from the parts of all ranks.

        `rows` are the rows of the batch in this rank's `parts`; both may be empty.
        """
        if self._device is None:
            return join(parts)
        whole = join(self.from_all([part.to("cpu") for part in parts]))
        order = torch.tensor(self.from_all(list(rows))).argsort()
        return whole.rows(order).to(str(self._device))

    def from_main(self, value: Item) -> Item:
        """The value of the main rank; all ranks have to call this."""
        if self._device is None:
            return value
        found = [value if self.main else None]
        dist.broadcast_object_list(found, src=0, device=self._device)
        return cast(Item, found[0])

    def from_all(self, items: list[Item]) -> list[Item]:
        """The items of every rank, in the order of the ranks; all ranks have to call this."""
        if self._device is None:
            return items
        found: list[list[Item]] = [[] for _ in range(self.world)]
        dist.all_gather_object(found, items)
        return [item for part in found for item in part]


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole on the CPU, for which all ranks have to call this together; any
    other tensor unchanged."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part of a whole tensor, sharded like `tensor` if that is sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(tensor, DTensor) or whole.shape != tensor.shape:
        return whole
    mesh, local = tensor.device_mesh, whole.to(tensor.device)
    return distribute_tensor(local, mesh, tensor.placements, src_data_rank=None)


def _shards(network: nn.Module) -> "Iterator[FSDPModule]":
    from torch.distributed.fsdp import FSDPModule

    return (module for module in network.modules() if isinstance(module, FSDPModule))


def _join_shards(network: nn.Module) -> None:
    """Make the network the root of its FSDP shards, whichever of them is called first later.

    FSDP takes the module with the first forward pass as the root, so the network runs one that does
    nothing. Otherwise a block that sampling calls first would become a root.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    root = cast(Any, network)
    root.join_shards = lambda: None
    register_fsdp_forward_method(root, "join_shards")
    root.join_shards()
    del root.join_shards

"""The processes that train together, each with its share of every batch. Knows nothing of losses.

One process alone is the same with a world of one, so a stage is written once. With several,
Accelerate starts the process group and wraps the networks (DDP), or spreads them over the ranks
(FSDP); every number that a stage computes is then that of the whole batch, whatever the number of
ranks.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Literal, NamedTuple, Protocol, Self, TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

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
    """This process among those that share the work."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        alone = accelerator is None or accelerator.num_processes == 1
        self._accelerator = None if alone else accelerator
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.world = 1 if accelerator is None else accelerator.num_processes

    @classmethod
    def meet(cls, *, cpu: bool, strategy: Strategy = "ddp") -> tuple[Self, str]:
        """Join the processes that a launcher such as torchrun has started; also says which device
        is this rank's."""
        options = [InitProcessGroupKwargs(timeout=PATIENCE)]
        if strategy == "ddp":
            accelerator = Accelerator(cpu=cpu, kwargs_handlers=options)
            return cls(accelerator), str(accelerator.device)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,
        )
        accelerator = Accelerator(cpu=cpu, kwargs_handlers=options, fsdp_plugin=plugin)
        if cpu:  # Accelerate turns to FSDP on GPUs alone; told to, it does the same on a CPU
            for state in (PartialState(), accelerator.state):
                state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = plugin
        return cls(accelerator), str(accelerator.device)

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    @property
    def _sharded(self) -> bool:
        return self._accelerator is not None and self._accelerator.is_fsdp2

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

    def prepare(self, network: nn.Module, optimizer: Optimizer) -> nn.Module:
        """The network as it is called in training.

        What the optimizer does not hold is frozen. With FSDP the network's own parameters, and
        those that the optimizer holds, are shards from here on.

        Raises: ConfigError when FSDP would have to spread a transformer a second time.
        """
        if self._accelerator is None:
            return network
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for parameter in network.parameters():
            parameter.requires_grad_(id(parameter) in held)
        if not self._sharded:
            return cast(nn.Module, self._accelerator.prepare(network))
        if next(_shards(network), None) is not None:
            raise ConfigError(
                "FSDP cannot spread a transformer that two networks learn on; take strategy ddp, "
                "set lora_rank to 0, or train the reward model without LoRA"
            )
        self._accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = _blocks(network)
        self._accelerator.prepare(network, optimizer)
        # No copy of the weights outlives a forward pass, so none can be older than the shards.
        spread = cast(FSDPModule, network)
        spread.set_reshard_after_forward(True)
        spread._get_fsdp_state()._lazy_init()  # the shards belong together, whichever comes first
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
        if last or self._accelerator is None or self._sharded:
            return nullcontext()
        return cast(AbstractContextManager[None], self._accelerator.no_sync(module))

    def backward(self, loss: Tensor) -> None:
        """Add this rank's part of a gradient; the ranks' parts are summed and not averaged."""
        (loss * self.world).backward()

    # --- numbers ---

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over the ranks, the same to the bit on every rank."""
        if self._accelerator is None:
            return dict(values)
        device = self._accelerator.device
        parts = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        sums = cast(Tensor, self._accelerator.reduce(parts, "sum"))
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
        if self._accelerator is None:
            return join(parts)
        whole = join(self._all([part.to("cpu") for part in parts]))
        order = torch.tensor(self._all(list(rows))).argsort()
        return whole.rows(order).to(str(self._accelerator.device))

    def _all(self, items: list[Item]) -> list[Item]:
        """The items of every rank, in the order of the ranks."""
        return items if self._accelerator is None else cast(list[Item], gather_object(items))


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


def _blocks(network: nn.Module) -> list[str]:
    """What transformers calls the classes of the blocks, each of which is spread for itself."""
    modules = list(network.modules())
    named = {name for m in modules for name in getattr(m, "_no_split_modules", None) or ()}
    return sorted(named & {type(m).__name__ for m in modules})

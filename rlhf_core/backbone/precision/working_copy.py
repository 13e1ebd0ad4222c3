"""A working copy of a transformer's weights in bfloat16, beside the float32 weights that train.

The masters are what the optimizer steps, what checkpoints and model directories hold, and where
gradients are summed: all in float32. Forward, backward and sampling multiply with the copy. A
weight is cast anew after it has changed and not before, whoever changed it, so that a frozen weight
is cast once, and one that trains once an optimizer step, whatever the number of micro-batches,
texts and tokens. The numbers are those of autocast, which casts in every forward pass, to the bit.

The copy has the weights of the linear layers. Embeddings and norms are computed in float32, and
other weights (stacked experts, convolutions) are cast by autocast when they are used. A transformer
that FSDP shards has no copy, since its weights are gathered anew for each pass: it is computed by
autocast alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)  # and no subclass, which may do something else with its weight


class WorkingCopy:
    """The casts of one transformer's weights.

    Several networks may share a transformer, and then they share its copy; `of` finds it.
    """

    _all: ClassVar[WeakKeyDictionary[nn.Module, "WorkingCopy"]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._casts: dict[int, _Cast] = {}  # by the identity of the master
        self._masters: list[_Place] = []  # while the copy is in use

    @classmethod
    def of(cls, model: PreTrainedModel) -> "WorkingCopy":
        """The copy of a transformer, made when it is first used."""
        return cls._all.setdefault(model, cls())

    @contextmanager
    def used_by(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside the block the linear layers multiply with the copy.

        Gradients pass through it to the masters, where they are summed in float32.
        """
        outer = bool(self._masters)
        places = self._masters if outer else list(_places(model))
        self._refresh([master for _, _, master in places])
        before = [owner._parameters[name] for owner, name, _ in places]
        self._masters = places
        try:
            for owner, name, master in places:
                _put(owner, name, self._stand_in(master))
            yield
        finally:
            for (owner, name, _), value in zip(places, before, strict=True):
                _put(owner, name, value)
            if not outer:
                self._masters = []

    def cast(self, model: PreTrainedModel, weight: Tensor) -> Tensor | None:
        """The copy of one weight, without a way back to it; None if it has none."""
        if not any(weight is master for _, _, master in _places(model)):
            return None
        self._refresh([weight], all_of_them=False)
        return self._casts[id(weight)].copy

    def _stand_in(self, master: Tensor) -> Tensor:
        copy = self._casts[id(master)].copy
        if not (master.requires_grad and torch.is_grad_enabled()):
            return copy
        return cast(Tensor, _StandIn.apply(master, copy))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _refresh(self, masters: list[Tensor], *, all_of_them: bool = True) -> None:
        """Cast what is new or has changed, and forget what is gone."""
        old = self._casts
        self._casts = {} if all_of_them else old
        for master in masters:
            kept = old.get(id(master))
            if kept is None or kept.master is not master or kept.copy.device != master.device:
                kept = _Cast(master, master.detach().to(torch.bfloat16), _stamp(master))
            elif kept.stamp != (stamp := _stamp(master)):
                # In place: a backward pass of before this change would be refused by autograd.
                kept.copy.copy_(master.detach())
                kept.stamp = stamp
            self._casts[id(master)] = kept


_Place = tuple[nn.Module, str, Tensor]  # a module, the name of a parameter, and the parameter


@dataclass
class _Cast:
    master: Tensor
    copy: Tensor  # bfloat16
    stamp: tuple[int, int]  # of the master when it was cast


class _StandIn(torch.autograd.Function):
    """The copy of a master in the forward pass; in the backward pass its gradient, in the type of
    the master."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, copy: Tensor) -> Tensor:
        """The copy, without a cast."""
        ctx.dtype = master.dtype
        return copy.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """The gradient of the master."""
        return upstream.to(ctx.dtype), None


def linear_weights(model: PreTrainedModel) -> list[Tensor]:
    """The weights and biases of which there is a copy, and so the products in bfloat16."""
    return [master for _, _, master in _places(model)]


def _places(model: PreTrainedModel) -> Iterator[_Place]:
    """The weights and biases of the linear layers, in the body and in the head of a policy."""
    body = list(model.base_model.modules())
    if any(isinstance(module, FSDPModule) for module in body):
        return
    head = model.get_output_embeddings()
    for owner in (*body, *([] if head is None else [head])):
        if type(owner) in LINEAR:
            for name, master in owner._parameters.items():
                if master is not None and master.dtype == torch.float32:
                    yield owner, name, master


def _put(owner: nn.Module, name: str, value: Tensor | None) -> None:
    """Put a tensor where a parameter is: `setattr` takes nothing but parameters."""
    owner._parameters[name] = cast(nn.Parameter | None, value)


def _stamp(master: Tensor) -> tuple[int, int]:
    """Changes whenever the values do: the counter that autograd keeps, and where they lie."""
    return master._version, master.data_ptr()

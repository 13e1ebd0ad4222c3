"""What all training stages share: settings, and a learner with a schedule and one safe step."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from rlhf_core.backbone.networks import Network, start_adapter
from rlhf_core.errors import NumericsError
from rlhf_core.seeding import stream_seed
from rlhf_core.settings.training import TrainingSection
from rlhf_core.training.ranks import Ranks, full, shard_like


def adapt(network: Network, config: TrainingSection, name: str, *, seed: int, stream: str) -> None:
    """Train an adapter instead of all weights, if `config.lora_rank` is set.

    Args:
        name: of the adapter.
        seed: of the run.
        stream: the random stream for its initial weights.
    """
    if config.lora_rank:
        start_adapter(
            network,
            name,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            layers=config.lora_layers,
            seed=stream_seed(seed, stream),
        )


class Learner:
    """A network with AdamW and a schedule, and a step that refuses values that are not finite.

    Calling it runs the network's `forward`, wrapped for all ranks.
    """

    def __init__(
        self,
        network: Network,
        config: TrainingSection,
        total_steps: int,
        *,
        ranks: Ranks | None = None,
        learning_rate: float | None = None,
    ) -> None:
        self.network = network
        self._ranks = ranks or Ranks()
        self._module = self._ranks.prepare(network, network.learnable().values(), network.blocks())
        self._named = network.learnable()  # after `prepare`, which may turn them into shards
        parameters = list(self._named.values())
        self._max_grad_norm = config.max_grad_norm
        self._adamw = AdamW(
            [
                {
                    "params": [p for p in parameters if p.ndim >= 2],
                    "weight_decay": config.weight_decay,
                },
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=config.learning_rate if learning_rate is None else learning_rate,
            fused=True,
        )
        warmup = round(config.warmup_ratio * total_steps)
        self._schedule = LambdaLR(
            self._adamw,
            lambda step: learning_rate_factor(config.schedule, step, warmup, total_steps),
        )

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The network's `forward`."""
        return self._module(*inputs, **options)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self._schedule.get_last_lr()[0])

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply the rate of all later steps; the schedule goes on. It is part of the state."""
        self._schedule.base_lrs = [rate * factor for rate in self._schedule.base_lrs]
        self._schedule._last_lr = [rate * factor for rate in self._schedule._last_lr]
        for group in self._adamw.param_groups:
            group["lr"] *= factor
            group["initial_lr"] *= factor

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward pass; the last of a step sums over the ranks."""
        return self._ranks.accumulate(self._module, last=last)

    def backward(self, loss: Tensor, name: str) -> None:
        """Add the gradient of this rank's share of a loss.

        Raises: NumericsError naming the loss when it is not finite.
        """
        require_finite(name, loss)
        self._ranks.backward(loss)

    def step(self) -> float:
        """Clip, update, advance the schedule, clear the gradients.

        Returns: the gradient norm before clipping.
        Raises: NumericsError naming the first tensor whose gradient is not finite.
        """
        gradients = [p.grad for p in self._named.values() if p.grad is not None]
        # Check the norm before clipping: scaling by NaN would put NaN into every tensor.
        norm = full(nn.utils.get_total_norm(gradients))
        if not bool(norm.isfinite()):
            raise NumericsError(
                f"the gradient of {self._first_bad()} is not finite; training stopped before "
                "the update. Lower learning_rate, or check the batch that was logged last"
            )
        nn.utils.clip_grads_with_norm_(self._named.values(), self._max_grad_norm, norm)
        self._adamw.step()
        # A fused step does not count as a change of the weights, by which a working copy of them
        # knows that it is old.
        increment_version(list(self._named.values()))
        self._schedule.step()
        self.drop_gradient()
        return norm.item()

    def drop_gradient(self) -> None:
        """Discard the gradient accumulated since the last step."""
        self._adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The trainable weights, AdamW's moments, and the state of the schedule.

        With FSDP all ranks have to call this, and only the main one gets whole tensors.
        """
        adamw = self._adamw.state_dict()
        moments = {number: self._whole(kept) for number, kept in adamw["state"].items()}
        return {
            "parameters": self._whole({name: p.detach() for name, p in self._named.items()}),
            "adamw": adamw | {"state": moments},
            "schedule": self._schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(shard_like(state["parameters"][name], parameter))
        held = [p for group in self._adamw.param_groups for p in group["params"]]
        moments = {
            number: {name: shard_like(value, held[number]) for name, value in kept.items()}
            for number, kept in state["adamw"]["state"].items()
        }
        self._adamw.load_state_dict(state["adamw"] | {"state": moments})
        self._schedule.load_state_dict(state["schedule"])

    def _whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = ((name, full(tensor)) for name, tensor in tensors.items())
        return {name: tensor for name, tensor in found if self._ranks.main}

    def _first_bad(self) -> str:
        bad = (
            name
            for name, p in self._named.items()
            if p.grad is not None and not full(p.grad).isfinite().all()
        )
        return next(bad, "the model")


def learning_rate_factor(schedule: str, step: int, warmup: int, total: int) -> float:
    """Share of the peak rate at a step: rises over `warmup` steps, then falls to 0 at `total`.

    linear: 1 - p; cosine: (1 + cos πp) / 2; with p = (step - warmup) / (total - warmup).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    p = min((step - warmup) / max(total - warmup, 1), 1.0)
    return 1.0 - p if schedule == "linear" else (1.0 + math.cos(math.pi * p)) / 2.0


def require_finite(name: str, value: Tensor) -> None:
    """Raise NumericsError naming the tensor unless all values are finite."""
    if not bool(value.isfinite().all()):
        raise NumericsError(
            f"{name} is not finite; training stopped before the update. Lower learning_rate, "
            "or check the batch that was logged last"
        )

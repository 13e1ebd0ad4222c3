"""What bfloat16 would gain on this machine: the matrix products of a model, timed in both types.

Only matrix products are timed, with the shapes of the model's linear layers and its head, since
nothing else is computed in bfloat16; so a whole step gains less.
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_core.backbone.precision.machine import native_bfloat16
from rlhf_core.backbone.precision.working_copy import linear_weights
from rlhf_core.settings.model import Precision

TOKENS = 128  # of a pass
TRIES = 2


@dataclass(frozen=True)
class Gain:
    """Seconds of the matrix products of one forward and backward pass."""

    float32: float
    bfloat16: float

    @property
    def ratio(self) -> float:
        """How many times as fast bfloat16 is."""
        return self.float32 / self.bfloat16


def measure(model: PreTrainedModel, device: str, tokens: int = TOKENS) -> Gain:
    """Time the products of a model; its weights may be on the device meta, and are not read.

    Of each shape one product is timed in turn in both types, the fastest of a few tries.
    """
    shapes = Counter(tuple(weight.shape) for weight in linear_weights(model) if weight.ndim == 2)
    totals = {torch.float32: 0.0, torch.bfloat16: 0.0}
    for shape, number in shapes.items():
        weight = torch.randn(shape, device=device)
        states = torch.randn(tokens, shape[1], device=device)
        operands = {dtype: (states.to(dtype), weight.to(dtype)) for dtype in totals}
        fastest = dict.fromkeys(totals, float("inf"))
        for attempt in range(TRIES + 1):
            for dtype, pair in operands.items():
                seconds = _time(*pair)
                if attempt:  # the first one prepares
                    fastest[dtype] = min(fastest[dtype], seconds)
        for dtype, seconds in fastest.items():
            totals[dtype] += number * seconds
    return Gain(*totals.values())


def describe(model: PreTrainedModel, chosen: Mapping[str, Precision], device: str) -> str:
    """A sentence: whether the machine has bfloat16, and what it would gain where.

    Args:
        chosen: the setting `precision` of each stage.
    """
    by = native_bfloat16(device)
    narrow = [stage for stage, setting in chosen.items() if setting == "bfloat16"]
    if not by:
        slow = f"; set {', '.join(f'{stage}.precision' for stage in narrow)} to float32" * bool(
            narrow
        )
        return f"bfloat16: this machine has no instructions for it, so it would be slower{slow}."
    ratio = measure(model, device).ratio
    wide = [stage for stage, setting in chosen.items() if setting == "float32"]
    said = (
        f"bfloat16: this machine has it ({by}), and the matrix products of this model take "
        f"{1 / ratio:.2f} of their time in float32"
    )
    if ratio > 1.1 and wide:
        return f"{said}; {', '.join(wide)} would be faster with precision: auto."
    return f"{said}."


def _time(states: Tensor, weight: Tensor) -> float:
    """Seconds of the three products of a linear layer: the output and both gradients."""
    begun = _now(states.device)
    out = states @ weight.T
    out @ weight
    out.T @ states
    return _now(states.device) - begun


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()

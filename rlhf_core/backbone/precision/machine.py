"""The types that products of matrices are computed in, and which of them a machine has.

`auto` is a setting and no type: `resolve` makes one of it before a stage starts, so that what is
recorded of a stage, its key and its checkpoints name the type that it was computed in.
"""

import logging
from functools import cache
from typing import Any, TypeVar

import torch

from rlhf_core.config import Section
from rlhf_core.settings.model import Precision

INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # of CPUs, on x86 and ARM
CAPABILITY = (8, 0)  # the first of NVIDIA's GPUs that multiplies bfloat16

S = TypeVar("S", bound=Section)
_log = logging.getLogger(__name__)


def native_bfloat16(device: str) -> str:
    """What multiplies bfloat16 on a device, as words for people; empty where nothing does.

    Emulation does not count: it is slower than float32.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return ", ".join(name for name in INSTRUCTIONS if capabilities.get(name))
    if kind == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        return f"compute capability {'.'.join(map(str, capability))}" * (capability >= CAPABILITY)
    return ""


def resolve(setting: Precision, device: str) -> Precision:
    """The type for a setting: `auto` is bfloat16 where the device has it and computes it right.

    Right is that products have the rounding of bfloat16 and the same bits each time, on which the
    invariants of the stages rest. Those of the model itself are checked in every run.
    """
    if setting != "auto":
        return setting
    return "bfloat16" if native_bfloat16(device) and _computes_right(device) else "float32"


def resolved(section: S, device: str) -> S:
    """A section of settings whose `precision`, if it has one, is a type and not `auto`."""
    setting: Any = getattr(section, "precision", None)
    if setting != "auto":
        return section
    return section.model_copy(update={"precision": resolve("auto", device)})


@cache
def warn_if_slow(device: str) -> None:
    """Warn, once a process, when bfloat16 is slower than float32 on this device."""
    if device == "cpu" and not native_bfloat16(device):
        _log.warning(
            "precision is bfloat16, but this CPU has no instructions for it (avx512_bf16, amx_bf16 "
            "or ARM's bf16), so training takes 2 to 6 times as long as in float32; set precision "
            "to float32 or auto"
        )


@cache
def _computes_right(device: str) -> bool:
    """Whether a product of bfloat16 matrices is that of float32, but for rounding, and the same
    to the bit when it is computed again.

    A sum of d products of numbers with 8 bits, which is added up in float32 and rounded once, is
    wrong by at most 2⁻⁸ of the sum of their sizes.
    """
    draws = torch.Generator().manual_seed(0)
    left, right = (torch.randn(shape, generator=draws) for shape in ((96, 256), (256, 160)))
    narrow = left.bfloat16().to(device), right.bfloat16().to(device)
    found = narrow[0] @ narrow[1]
    wide = left.bfloat16().double() @ right.bfloat16().double()
    allowed = left.bfloat16().double().abs() @ right.bfloat16().double().abs() * 2**-8
    close = bool(((found.cpu().double() - wide).abs() <= allowed).all())
    return close and torch.equal(found, narrow[0] @ narrow[1])

"""What this machine has in all: memory for a process, memory of a GPU, room on a disk."""

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rlhf_core.machine.memory import UNKNOWN, limits_of_groups, of_machine

_SET = 2**60  # bytes; control groups of version 1 write a larger number for no limit


class Limit(NamedTuple):
    """The most memory that a process can get, and what sets it."""

    bytes: int
    what: str


def memory_limit(device: str, *, root: Path = Path("/")) -> Limit | None:
    """The narrowest limit on the memory of a stage on a device; None if it is unknown.

    On a CPU it is the memory of the machine, of the control group or of the process (`ulimit -v`).

    Args:
        root: where /proc and /sys are.
    """
    if device != "cpu":
        import torch

        total = torch.cuda.get_device_properties(device).total_memory
        return Limit(total, "the GPU has")
    return min(_limits(root), default=None)


def room(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _limits(root: Path) -> Iterator[Limit]:
    if (total := of_machine("MemTotal", root)) != UNKNOWN:
        yield Limit(total, "this machine has")
    for most, _ in limits_of_groups(root):
        if most < _SET:
            yield Limit(most, "the control group of this process has")
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield Limit(soft, "`ulimit -v` allows")

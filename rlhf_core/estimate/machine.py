"""What this machine has: memory for a process, memory of a GPU, room on a disk."""

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


class Limit(NamedTuple):
    """The most memory that a process can get, and what sets it."""

    bytes: int
    what: str


def memory_limit(device: str) -> Limit | None:
    """The narrowest limit on the memory of a stage on a device; None if it is unknown.

    On a CPU it is the memory of the machine, of the control group or of the process (`ulimit -v`).
    """
    if device != "cpu":
        import torch

        total = torch.cuda.get_device_properties(device).total_memory
        return Limit(total, "the GPU has")
    return min(_limits(), default=None)


def memory_free() -> int | None:
    """Memory that processes can get now (bytes): that of the machine that nobody uses."""
    found = _meminfo().get("MemAvailable")
    limits = [found] if found is not None else []
    for most, used in _cgroups():
        limits.append(most - used)
    return min(limits, default=None)


def room(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _limits() -> Iterator[Limit]:
    if (total := _meminfo().get("MemTotal")) is not None:
        yield Limit(total, "this machine has")
    for most, _ in _cgroups():
        yield Limit(most, "the control group of this process has")
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield Limit(soft, "`ulimit -v` allows")


def _meminfo() -> dict[str, int]:
    """Bytes by name; nothing where there is no /proc."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1
    }


def _cgroups() -> Iterator[tuple[int, int]]:
    """Limit and use of the control group of this process and of those above it (bytes)."""
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="ascii").strip().rpartition(":")[2]
    except OSError:
        return
    folder = _CGROUP / own.lstrip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(_CGROUP):
            return
        for most, used in (
            ("memory.max", "memory.current"),
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
        ):
            try:
                limit = (group / most).read_text(encoding="ascii").strip()
                if limit != "max" and int(limit) < 2**60:
                    yield int(limit), int((group / used).read_text(encoding="ascii"))
            except (OSError, ValueError):
                continue

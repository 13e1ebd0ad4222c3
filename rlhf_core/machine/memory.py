"""How much memory is free: of the machine, of the container, or of a GPU."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

UNKNOWN = 2**63  # bytes, where the system does not tell
_MACHINE, _OWN_GROUPS, _GROUPS = "/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup"
# Folder, limit, use, and the key of what the kernel can drop, of control groups v2 and v1.
_V2 = "", "memory.max", "memory.current", "inactive_file"
_V1 = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


def free_memory(device: torch.device | str = "cpu", *, root: Path = Path("/")) -> int:
    """Bytes that a process can still take on a device.

    On a CPU these are the bytes that the machine has available, or what the limits of this
    process's control groups leave, if that is less. On a GPU they are the bytes that no process has
    reserved: what torch keeps there for its next step is taken. On other devices it is 0.

    Args:
        root: where /proc and /sys are.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return 0
    left = [max(0, limit - taken) for limit, taken in limits_of_groups(root)]
    return min([of_machine("MemAvailable", root), *left])


def of_machine(name: str, root: Path = Path("/")) -> int:
    """A value of /proc/meminfo: MemTotal, MemAvailable (bytes)."""
    with suppress(OSError, ValueError, IndexError):
        for line in (root / _MACHINE[1:]).read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return UNKNOWN


def limits_of_groups(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """Limit and use of the control group of this process, and of those above it (bytes).

    What the kernel can drop of the use is not counted.
    """
    try:
        lines = (root / _OWN_GROUPS[1:]).read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            folder, most, used, cache = _V2
        elif "memory" in controllers.split(","):
            folder, most, used, cache = _V1
        else:
            continue
        top = root / _GROUPS[1:] / folder
        group = top / path.lstrip("/")
        for place in (group, *group.parents):
            if not place.is_relative_to(top):
                break
            with suppress(OSError, ValueError):  # "max", or no such file
                limit, taken = (int((place / name).read_text()) for name in (most, used))
                told = (place / "memory.stat").read_text().splitlines()
                facts = dict(line.split() for line in told)
                yield limit, taken - int(facts.get(cache, 0))

"""How a process that trains on a CPU asks for memory: it keeps what it was given.

Each step frees and takes hundreds of megabytes. By default glibc gives them back to the kernel,
which then clears every page again: a fifth to a third of the time of a training step where that is
slow. Kept, and in huge pages, they cost nothing the second time; the price is that a process stays
as large as it once was. Only a command does so, never an import: it is a decision about a process.
"""

import ctypes
import os
import platform
from collections.abc import Mapping
from types import MappingProxyType

TOP_PAD = 64 << 20  # bytes taken beyond what is asked for
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of malloc.h

# The same for a process that is yet to start.
ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "THP_MEM_ALLOC_ENABLE": "1",  # torch: huge pages for large tensors
        "MALLOC_TRIM_THRESHOLD_": "-1",
        "MALLOC_TOP_PAD_": str(TOP_PAD),
        "MALLOC_MMAP_MAX_": "0",
    }
)


def keep_memory() -> None:
    """Let this process keep its memory; to be called before torch is imported.

    Nothing happens where the C library is not glibc: others have no such settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)  # large blocks come from the heap too
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # the heap never shrinks
    libc.mallopt(_M_TOP_PAD, TOP_PAD)

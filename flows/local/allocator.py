"""Settings of the C allocator for training on a CPU: a process keeps the memory that it frees.

Each step frees and allocates hundreds of megabytes. By default glibc returns them to the kernel,
which then clears every page again: on some machines a fifth to a third of a training step. Memory
that is kept, in huge pages, costs nothing the second time; in exchange the process never shrinks.
Commands apply these settings and imports never do, because they affect the whole process.
"""

import ctypes
import os
import platform
from collections.abc import Mapping
from types import MappingProxyType

TOP_PAD = 64 << 20  # bytes that the heap grows beyond a request
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of malloc.h

# The same settings for a process that we start.
ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "THP_MEM_ALLOC_ENABLE": "1",  # torch: huge pages for large tensors
        "MALLOC_TRIM_THRESHOLD_": "-1",
        "MALLOC_TOP_PAD_": str(TOP_PAD),
        "MALLOC_MMAP_MAX_": "0",
    }
)


def keep_memory() -> None:
    """Make this process keep freed memory; call it before torch is imported.

    It does nothing if the C library is not glibc, since others have no such settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)  # large blocks come from the heap too
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # the heap never shrinks
    libc.mallopt(_M_TOP_PAD, TOP_PAD)

"""The most that this machine computes: products of matrices, and the memory beside them.

    python benchmarks/peak.py [--threads 1 2]

Prints one line of JSON: for each number of threads GFLOP/s of float32 and bfloat16, the best of
sizes and tries, and GB/s of reading and writing in a copy of 512 MB.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from typing import Any

import torch

SIZES = (1024, 2048, 4096)
TRIES = 3
DTYPES = (torch.float32, torch.bfloat16)


def fastest(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few tries, after one that prepares."""
    times = []
    for _ in range(TRIES + 1):
        begun = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def products(
    dtype: torch.dtype, sizes: tuple[int, ...] = SIZES, device: str = "cpu"
) -> dict[str, float]:
    """GFLOP/s by size."""
    found = {}
    for size in sizes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, dtype=dtype, device=device)
        seconds = fastest(lambda a=left, b=right, c=out: torch.mm(a, b, out=c))
        found[str(size)] = 2 * size**3 / seconds / 1e9
    return found


def bandwidth(megabytes: int = 512) -> float:
    """GB/s of a copy, reading and writing both counted."""
    source = torch.ones(megabytes << 18)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source)) / 1e9


def blas() -> str:
    """The libraries that torch multiplies with: float32 with the first, bfloat16 with oneDNN."""
    found = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    names = [found[1].upper()] if found else []
    return " and ".join(names + ["oneDNN"] * torch.backends.mkldnn.is_available())


def measure(threads: list[int], sizes: tuple[int, ...], megabytes: int) -> dict[str, Any]:
    """Everything, by number of threads."""
    found: dict[str, Any] = {"blas": blas(), "torch": torch.__version__}
    for number in threads:
        torch.set_num_threads(number)
        speeds = {str(dtype).removeprefix("torch."): products(dtype, sizes) for dtype in DTYPES}
        found[str(number)] = {
            **{name: max(by_size.values()) for name, by_size in speeds.items()},
            "by_size": speeds,
            "copy_gb_s": bandwidth(megabytes),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--megabytes", type=int, default=512, help="of the copy")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.threads, tuple(arguments.sizes), arguments.megabytes)))


if __name__ == "__main__":
    main()

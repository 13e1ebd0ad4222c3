"""Random numbers: one seed for a run, and an independent stream for each purpose."""

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rlhf_core.errors import CheckpointError


def stream_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for one purpose of a run; other purposes do not disturb it.

    blake2b of "seed/purpose": the same on every machine and in every process.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, purpose: str, device: str = "cpu") -> torch.Generator:
    """A generator for one purpose of a run, on the device where it is used."""
    return torch.Generator(device).manual_seed(stream_seed(seed, purpose))


def rng_state() -> dict[str, Any]:
    """The state of the global generators of python, numpy, torch and CUDA.

    CUDA is left out when it is not in use: reading its state would initialise it.
    """
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the state that `rng_state` returned.

    Raises: CheckpointError when it was taken with more GPUs than this process sees.
    """
    used, found = len(state["cuda"]), torch.cuda.device_count()
    if used > found:
        raise CheckpointError(
            f"the checkpoint was saved with {used} GPUs in use, but this process sees {found}; "
            "resume on a machine with {used}"
        )
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])

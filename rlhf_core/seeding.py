"""Random numbers: one seed for a run, an independent stream for each purpose."""

import hashlib

import torch


def stream_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for one purpose of a run; other purposes do not disturb it.

    blake2b of "seed/purpose": the same on every machine and in every process.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, purpose: str, device: str = "cpu") -> torch.Generator:
    """A generator for one purpose of a run, on the device where it is used."""
    return torch.Generator(device).manual_seed(stream_seed(seed, purpose))

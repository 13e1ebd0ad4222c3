"""Whether every machine of a cluster sees the same files and would compute the same numbers.

A rank on a machine with another release would give numbers that neither release gives, and one
that does not see the work folder would train on nothing, or keep its checkpoints for itself.
"""

import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Self

import torch

import rlhf_core
from rlhf_core.digests import tree_digest
from rlhf_core.errors import ConfigError
from rlhf_core.training.ranks import Ranks


@dataclass(frozen=True)
class Sameness:
    """What the machine of the process that waits has, and each rank has to find."""

    token: Path  # a file in the work folder
    releases: dict[str, str]  # by package; of our own code a digest

    @classmethod
    @contextmanager
    def of(cls, folder: Path) -> Iterator[Self]:
        """This machine, with a token in the folder as long as the block runs."""
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        token = folder / f"cluster-{secrets.token_hex(8)}"
        token.touch()
        try:
            yield cls(token, _releases())
        finally:
            token.unlink(missing_ok=True)

    def fault(self) -> str:
        """What is wrong on this machine, as a sentence; empty if nothing is."""
        here = socket.gethostname()
        if not self.token.exists():
            return (
                f"the machine {here} does not see the folder {self.token.parent}; RLHF_HOME has to "
                "be on a disk that all machines of the cluster share, under the same path"
            )
        for package, found in _releases().items():
            if found != (wanted := self.releases[package]):
                return (
                    f"the machine {here} has {package} {found}, and the one that started the stage "
                    f"has {wanted}; install the same release on all machines of the cluster"
                )
        return ""

    def require(self, ranks: Ranks) -> None:
        """Raise ConfigError on all ranks when something is wrong on one of their machines."""
        faults = [fault for fault in ranks.from_all([self.fault()]) if fault]
        if faults:
            raise ConfigError(faults[0])


def _releases() -> dict[str, str]:
    code = tree_digest(Path(rlhf_core.__file__).parent, "**/*.py")
    return {
        "rlhf_core": code[:12],
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
    }

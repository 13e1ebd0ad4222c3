"""How a stage resumes: which run it is, and where its checkpoints are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from rlhf_core.config import identifying
from rlhf_core.data import prepared
from rlhf_core.digests import content_digest
from rlhf_core.metrics import StageLogger
from rlhf_core.training.checkpoint import Checkpoints
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.session import Session, Stateful
from rlhf_core.types import PromptBatch, Responses, Rollout


@dataclass(frozen=True)
class Recovery:
    """Where and how often a stage saves checkpoints; without a folder it saves none."""

    directory: Path | None = None
    every_seconds: float = 60.0
    keep: int = 2

    @property
    def tokens(self) -> Path | None:
        """Where encoded texts are kept, beside the checkpoints; None = until the process ends."""
        return None if self.directory is None else self.directory.with_name("tokens")

    def open(
        self,
        logger: StageLogger,
        *,
        identity: Mapping[str, str],
        learners: Mapping[str, Stateful],
        positions: Mapping[str, Stateful | torch.Generator],
        ranks: Ranks,
    ) -> Session:
        """The session of a stage. One rank saves, and every rank resumes from what it saved."""
        checkpoints = None
        if self.directory is not None:
            records = (PromptBatch, Responses, Rollout)
            checkpoints = Checkpoints(self.directory, keep=self.keep, records=records)
        return Session(
            logger,
            checkpoints=checkpoints,
            identity=identity,
            learners=learners,
            positions=positions,
            every_seconds=self.every_seconds,
            ranks=ranks,
        )


NO_RECOVERY = Recovery()


def run_identity(
    stage: str, seed: int, sections: Mapping[str, BaseModel], inputs: Mapping[str, Path]
) -> dict[str, str]:
    """What defines a run: its settings, its seed, and the digests of its input data and models.

    The number of ranks is not part of it: a run may resume on more or fewer.
    """
    facts = {"stage": stage, "seed": str(seed), "torch": torch.__version__}
    for name, section in sections.items():
        facts |= dict(_flat(identifying(section), name))
    return facts | {f"digest of {name}": _digest(path) for name, path in inputs.items()}


def _flat(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", str(value)


def _digest(path: Path) -> str:
    """The digest of prepared tables, of a model's weights, or of one file."""
    if path.is_file():
        return content_digest([path])[:16]
    if next(path.glob("*.safetensors"), None) is None:
        return prepared.digest(path)
    from rlhf_core.backbone.directory import weights_digest  # with transformers' models

    return weights_digest(path)[:16]

"""How a stage is made to survive: which run this is, and where its checkpoints lie."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from rlhf_core.backbone.directory import weights_digest
from rlhf_core.data import prepared
from rlhf_core.digests import content_digest
from rlhf_core.metrics import StageLogger
from rlhf_core.training.checkpoint import Checkpoints
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.session import Session, Stateful
from rlhf_core.types import PromptBatch, Responses, Rollout


@dataclass(frozen=True)
class Recovery:
    """Where a stage keeps its checkpoints, and how often; without a folder it keeps none."""

    directory: Path | None = None
    every_seconds: float = 60.0
    keep: int = 2

    def open(
        self,
        logger: StageLogger,
        *,
        identity: Mapping[str, str],
        learners: Mapping[str, Stateful],
        positions: Mapping[str, Stateful | torch.Generator],
        ranks: Ranks,
    ) -> Session:
        """The session of a stage. One rank saves, and every rank continues from what it saved."""
        kept = None
        if self.directory is not None:
            records = (PromptBatch, Responses, Rollout)
            kept = Checkpoints(self.directory, keep=self.keep, records=records)
        return Session(
            logger,
            checkpoints=kept,
            identity=identity,
            learners=learners,
            positions=positions,
            every_seconds=self.every_seconds,
            ranks=ranks,
        )


NO_RECOVERY = Recovery()


def identity(
    stage: str, seed: int, sections: Mapping[str, BaseModel], inputs: Mapping[str, Path]
) -> dict[str, str]:
    """What a run is: its settings, its seed, and the digests of the data and models it starts from.

    The number of ranks is no part of it: a run may continue on more or fewer.
    """
    facts = {"stage": stage, "seed": str(seed), "torch": torch.__version__}
    for name, section in sections.items():
        facts |= dict(_flat(section.model_dump(mode="json"), name))
    return facts | {f"digest of {name}": _digest(path) for name, path in inputs.items()}


def _flat(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", str(value)


def _digest(path: Path) -> str:
    """Of prepared tables, of a model's weights, or of one file."""
    if path.is_file():
        return content_digest([path])[:16]
    if next(path.glob("*.safetensors"), None) is None:
        return prepared.digest(path)
    return weights_digest(path)[:16]

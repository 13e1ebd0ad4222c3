"""What a stage is called with beside its own settings; every stage function is `(config, work)`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from rlhf_core.config import Section
from rlhf_core.metrics import MemoryLogger, StageLogger
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.recovery import NO_RECOVERY, Recovery
from rlhf_core.types import Report

S = TypeVar("S", bound=Section)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The files, settings and surroundings of one call of a stage.

    Args:
        inputs: directories by role: data, sft, reward, reward.NAME, policy, champion.
        outputs: directories to write, by kind: data, sft, reward, policy, critic, milestones.
        sections: settings that the stage shares with others, by name: sampling, model, limits.
        seed: of the whole run; a stage draws each of its random streams from it.
        device: cpu or cuda.
        logger: where metrics, progress and phases go.
        recovery: where checkpoints are kept; by default nowhere.
        ranks: the processes that share the work; by default this one.
    """

    inputs: Mapping[str, Path] = field(default_factory=dict)
    outputs: Mapping[str, Path] = field(default_factory=dict)
    sections: Mapping[str, Section] = field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"
    logger: StageLogger = field(default_factory=MemoryLogger)
    recovery: Recovery = NO_RECOVERY
    ranks: Ranks = field(default_factory=Ranks)

    def section(self, kind: type[S]) -> S:
        """The shared settings of a class.

        Raises: ValueError when none were handed over.
        """
        for section in self.sections.values():
            if isinstance(section, kind):
                return section
        names = ", ".join(self.sections) or "none"
        raise ValueError(f"the stage needs a {kind.__name__}; its sections are: {names}")


StageFunction: TypeAlias = Callable[[Any, Work], Report]

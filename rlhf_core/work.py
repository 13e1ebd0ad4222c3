"""The arguments of a stage beside its own settings; every stage function is `(config, work)`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from rlhf_core.config import Section
from rlhf_core.engines.client import EnginePlace
from rlhf_core.judges.judge import Judging
from rlhf_core.metrics import MemoryLogger, StageLogger
from rlhf_core.rewards.functions import RewardPlaces
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.recovery import NO_RECOVERY, Recovery
from rlhf_core.types import Report

S = TypeVar("S", bound=Section)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The files, shared settings and environment of one call of a stage.

    Args:
        inputs: directories by role: data, sft, reward, reward.NAME, policy, champion.
        outputs: directories to write, by kind: data, sft, reward, policy, critic, milestones.
        sections: settings shared with other stages, by name: sampling, model, limits.
        seed: of the whole run; the stage derives each of its random streams from it.
        device: cpu or cuda.
        logger: receives metrics, progress and phases.
        recovery: where checkpoints are kept; nowhere by default.
        ranks: the processes that share the work; only this one by default.
        rewards_from: where reward functions may come from; anywhere by default, since whoever
            calls a stage of this package has named them.
        judging: reaches judges outside this package and remembers their verdicts; None = there is
            no endpoint, and nothing is remembered.
        engine: the servers that sample roll-outs; None = there are none.
        answers: a folder where sampled answers are kept from one call to the next, for a judge who
            takes days; None = they are sampled in each call.
    """

    inputs: Mapping[str, Path] = field(default_factory=dict)
    outputs: Mapping[str, Path] = field(default_factory=dict)
    sections: Mapping[str, Section] = field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"
    logger: StageLogger = field(default_factory=MemoryLogger)
    recovery: Recovery = NO_RECOVERY
    ranks: Ranks = field(default_factory=Ranks)
    rewards_from: RewardPlaces | None = None
    judging: Judging | None = None
    engine: EnginePlace | None = None
    answers: Path | None = None

    def section(self, kind: type[S]) -> S:
        """The shared settings of a class.

        Raises: ValueError when the stage was called without them.
        """
        for section in self.sections.values():
            if isinstance(section, kind):
                return section
        names = ", ".join(self.sections) or "none"
        raise ValueError(f"the stage needs a {kind.__name__}; its sections are: {names}")


StageFunction: TypeAlias = Callable[[Any, Work], Report]

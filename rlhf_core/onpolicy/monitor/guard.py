"""What acts on a run: halves its learning rates, or puts it back to its last good state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_core.onpolicy.monitor.last_good import LastGood
from rlhf_core.onpolicy.monitor.monitor import Monitor
from rlhf_core.onpolicy.monitor.rules import halvings, roll_backs
from rlhf_core.settings.monitor import MonitorAction, MonitorConfig
from rlhf_core.training.learner import Learner


@dataclass(frozen=True)
class Guard:
    """Carries out the most severe action of an iteration.

    A roll-back restores weights, optimizers, schedules and β, and halves the learning rate once
    more each time. The iterations are counted on and the prompts go on, so nothing is repeated and
    the run ends when it was planned to; at the last roll-back it ends at once.
    """

    config: MonitorConfig
    learners: Mapping[str, Learner]
    monitor: Monitor | None
    good: LastGood | None  # if the run may be rolled back

    def act(
        self,
        kind: MonitorAction | None,
        number: int,
        metrics: Mapping[str, float],
        history: Sequence[Mapping[str, float]],
    ) -> bool:
        """Do what was decided after an iteration; return whether the run has to end.

        Raises: ValueError for a roll-back when no state is kept.
        """
        halved = halvings(history)
        if kind == "roll_back":
            if self.good is None:
                raise ValueError("an observer asked for a roll-back, but the run keeps no state")
            self._scale(0.5 ** (halved + 1 - self.good.put_back()))
            return roll_backs(history) + 1 >= self.config.max_roll_backs
        if kind == "halve_learning_rate":
            self._scale(0.5)
            halved += 1
        if (
            self.good is not None
            and self.monitor is not None
            and number - self.good.number >= self.config.good_every
            and self.monitor.calm(metrics)
        ):
            self.good.keep(number, halved)
        return kind == "stop"

    def _scale(self, factor: float) -> None:
        for learner in self.learners.values():
            learner.scale_learning_rate(factor)

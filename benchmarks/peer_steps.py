"""Times the steps of a Hugging Face trainer."""

from typing import Any

from report import Clock
from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Each step from the end of the one before, so with the reading of its rows."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.begin(self.clock.first)

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.clock.begin(self.clock.first if state.global_step < state.max_steps else None)

"""What of the settings of a Hugging Face trainer is not its default."""

import os
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import TrainingArguments


class Defaults:
    """The settings of a Hugging Face trainer as it has them by default.

    Make it before the settings that are used: it sets variables of the environment and a state of
    accelerate that the next trainer reads, and it puts both back.
    """

    def __init__(self, kind: type[TrainingArguments]) -> None:
        before = dict(os.environ)
        plain = kind(output_dir="unused", use_cpu=not torch.cuda.is_available())
        self._settings = plain.to_dict()
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(reset_partial_state=True)

    def changed(self, settings: TrainingArguments) -> dict[str, Any]:
        """What differs from them."""
        return {
            name: value
            for name, value in settings.to_dict().items()
            if value != self._settings.get(name) and name != "output_dir"
        }

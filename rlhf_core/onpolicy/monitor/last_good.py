"""The last good state of a run, to which the monitor rolls it back."""

from collections.abc import Mapping
from typing import Any

import torch

from rlhf_core.onpolicy.kl_control import KLController
from rlhf_core.training.learner import Learner
from rlhf_core.training.ranks import Ranks


class LastGood:
    """Keeps a copy of weights, optimizers and KL controller, in memory and in the checkpoint.

    It belongs to the learners of a session, and not to its positions: it is large, and changes only
    right before a safe point.
    """

    def __init__(
        self, learners: Mapping[str, Learner], controller: KLController, ranks: Ranks
    ) -> None:
        self._learners = learners
        self._controller = controller
        self._ranks = ranks
        self._state: dict[str, Any] | None = None
        self.number = -1  # the iteration after which it was kept; 0: before the first

    def keep(self, number: int, halvings: int) -> None:
        """Keep the present state; all ranks have to call this together."""
        learners = {name: learner.state_dict() for name, learner in self._learners.items()}
        self.number = number
        self._state = {
            "learners": _copy(learners),
            "controller": dict(self._controller.state_dict()),
            "halvings": halvings,
        }

    def put_back(self) -> int:
        """Restore the kept state; return how often its learning rate had been halved."""
        state = self._ranks.from_main(self._state)
        assert state is not None
        for name, learner in self._learners.items():
            learner.load_state_dict(_copy(state["learners"][name]))
        self._controller.load_state_dict(state["controller"])
        return int(state["halvings"])

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"number": self.number, "state": self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.number, self._state = state["number"], state["state"]


def _copy(value: Any) -> Any:
    """A copy on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _copy(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(part) for part in value)
    return value

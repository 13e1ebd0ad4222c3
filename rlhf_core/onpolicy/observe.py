"""Observers look at each finished iteration and may stop the run.

An observer is a function from an `Observation` to an `Action`, or to None. It has no state:
`history` is in the checkpoint, so that a resumed run decides the same.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rlhf_core.metrics import Alarm
from rlhf_core.settings.monitor import MonitorAction
from rlhf_core.settings.onpolicy import OnPolicySection
from rlhf_core.types import Rollout


@dataclass(frozen=True)
class Observation:
    """A finished iteration."""

    number: int  # from 1
    rollout: Rollout
    metrics: Mapping[str, float]  # as they are logged
    history: Sequence[Mapping[str, float]]  # the metrics of the iterations before


@dataclass(frozen=True)
class Action:
    """A request of an observer: to log a warning, and perhaps to change the run or stop it."""

    kind: MonitorAction
    reason: str  # a sentence
    alarm: Alarm | None = None  # if it comes from the monitor


Observer: TypeAlias = Callable[[Observation], Action | None]


def observe(observers: Iterable[Observer], seen: Observation) -> list[Action]:
    """The actions of all observers."""
    return [action for observer in observers if (action := observer(seen)) is not None]


def kl_budget(config: OnPolicySection) -> Observer:
    """Stop or warn, as set by `at_kl_budget`, when the KL to the reference exceeds `kl_budget`."""

    def observer(seen: Observation) -> Action | None:
        if not over_kl_budget(seen.metrics, config):
            return None
        kl, score = seen.metrics["objective/kl"], seen.metrics["objective/score"]
        return Action(
            config.at_kl_budget,
            f"over the KL budget of {config.kl_budget:g} nats: score {score:+.2f}, "
            f"KL {kl:.2f} nats",
        )

    return observer


def over_kl_budget(metrics: Mapping[str, float], config: OnPolicySection) -> bool:
    """Whether the KL to the reference is over its budget, if there is one."""
    return 0 < config.kl_budget < metrics["objective/kl"]

"""What looks at an iteration: the KL budget, and any other observer that the loop is handed."""

import pytest

from rlhf_core.onpolicy.observe import Action, Observation, kl_budget, observe
from rlhf_core.settings.onpolicy import OnPolicySection


def seen(kl, number=1):
    metrics = {"objective/kl": kl, "objective/score": 1.5}
    return Observation(number, rollout=None, metrics=metrics, history=())


def section(**settings):
    return OnPolicySection(rollout_size=8, batch_size=8, **settings)


@pytest.mark.parametrize("kind", ["stop", "warn"])
def test_the_kl_budget_acts_only_above_it(kind):
    observer = kl_budget(section(kl_budget=2.0, at_kl_budget=kind))
    assert observer(seen(2.0)) is None
    action = observer(seen(2.5))
    assert action == Action(kind, "over the KL budget of 2 nats: score +1.50, KL 2.50 nats")


def test_without_a_budget_no_kl_is_too_much():
    assert kl_budget(section())(seen(1e9)) is None


def test_every_observer_is_asked():
    actions = [Action("warn", "one"), None, Action("stop", "two")]
    observers = [lambda _, action=action: action for action in actions]
    assert observe(observers, seen(0)) == [Action("warn", "one"), Action("stop", "two")]

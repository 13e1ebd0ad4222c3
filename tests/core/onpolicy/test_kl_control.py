"""The controllers of the KL coefficient."""

import json
import math

import pytest

from rlhf_core.errors import NumericsError
from rlhf_core.onpolicy.kl_control import AdaptiveKL, FixedKL


@pytest.mark.parametrize(
    ("kl", "expected"),
    # β₀ = 0.2, target 6, horizon 10000, 64 sequences: 64 / 10000 = 0.0064
    [
        (6.6, 0.2 * (1 + 0.1 * 0.0064)),  # 6.6 / 6 - 1 = 0.1
        (12.0, 0.2 * (1 + 0.2 * 0.0064)),  # 1 is clipped to 0.2
        (6.0, 0.2),
        (5.4, 0.2 * (1 - 0.1 * 0.0064)),
        (0.0, 0.2 * (1 - 0.2 * 0.0064)),
        (-3.0, 0.2 * (1 - 0.2 * 0.0064)),  # an estimate may be negative
    ],
)
def test_adaptive_kl_by_hand(kl, expected):
    controller = AdaptiveKL(0.2, target=6.0, horizon=10_000)
    controller.update(kl, 64)
    assert controller.value == pytest.approx(expected, rel=1e-12)


def test_adaptive_kl_brings_a_responsive_policy_to_its_target():
    controller = AdaptiveKL(0.5, target=6.0, horizon=1_000)
    for _ in range(400):
        controller.update(1 / controller.value, 64)  # a policy whose KL is 1 / β
    assert 1 / controller.value == pytest.approx(6.0, rel=1e-3)


@pytest.mark.parametrize("make", [lambda: AdaptiveKL(0.2, 6.0, 1_000), lambda: FixedKL(0.2)])
def test_a_controller_continues_from_its_checkpoint(make):
    whole, first, second = make(), make(), make()
    for kl in (9.0, 3.0, 8.0, 1.0):
        whole.update(kl, 64)
    for kl in (9.0, 3.0):
        first.update(kl, 64)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for kl in (8.0, 1.0):
        second.update(kl, 64)
    assert second.value == whole.value


def test_fixed_kl_stays_and_restores_what_it_was():
    controller = FixedKL(0.2)
    controller.update(1e9, 64)
    assert controller.value == 0.2
    controller.load_state_dict(FixedKL(0.7).state_dict())
    assert controller.value == 0.7


def test_adaptive_kl_refuses_what_would_spoil_the_coefficient():
    controller = AdaptiveKL(0.2, target=6.0, horizon=100)
    for kl in (math.nan, math.inf):
        with pytest.raises(NumericsError, match="KL"):
            controller.update(kl, 64)
    with pytest.raises(ValueError, match="horizon"):
        controller.update(6.0, 500)  # 1 - 0.2·500/100 = 0
    assert controller.value == 0.2
    for bad in ((0.0, 6.0, 100), (0.2, 0.0, 100), (0.2, 6.0, 0)):
        with pytest.raises(ValueError, match="positive"):
            AdaptiveKL(*bad)

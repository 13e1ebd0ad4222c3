"""The formulas and the rules of the monitor, against numbers worked by hand."""

import math

import numpy as np
import pytest
import torch

from rlhf_core.onpolicy.monitor.measures import (
    SHRINKAGE,
    Cloud,
    acceleration,
    distinct,
    rank_correlation,
    repetition,
    spread,
)
from rlhf_core.onpolicy.monitor.monitor import Baseline, gain, plain
from rlhf_core.onpolicy.monitor.rules import (
    ACTION,
    AGAIN,
    RULES,
    SEVERITY,
    halvings,
    roll_backs,
    since_roll_back,
)
from rlhf_core.onpolicy.monitor.samples import Samples
from rlhf_core.settings.monitor import MonitorConfig

RULE = {rule.measure: rule for rule in RULES}


# ---- formulas ----


def test_repetition_is_the_share_of_ngrams_that_occurred_before():
    # Of 123, 231, 312, 123 one is a repeat; a text of two tokens has no trigram.
    assert repetition([[1, 2, 3, 1, 2, 3], [1, 2]]) == pytest.approx(0.25 / 2)
    assert repetition([[7] * 10]) == pytest.approx(1 - 1 / 8)


def test_distinct_counts_over_all_texts():
    assert distinct([[1, 2, 3], [1, 2, 4]]) == pytest.approx(3 / 4)  # 12, 23, 12, 24
    assert math.isnan(distinct([[1], []]))


def test_acceleration_of_a_parabola_is_its_second_derivative():
    for step in (1.0, 3.0):
        series = [0.5 * 4 * (step * t) ** 2 + 3 * t for t in range(10)]
        assert acceleration(series, step) == pytest.approx(4)
    assert acceleration([3.0 * t for t in range(6)]) == pytest.approx(0)
    assert math.isnan(acceleration([1.0] * 5))


def test_rank_correlation_sees_order_alone():
    x = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert rank_correlation(x, x.exp()) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    assert rank_correlation(x, torch.tensor([1.0, 2, 4, 3])) == pytest.approx(0.8)
    assert math.isnan(rank_correlation(x, torch.ones(4)))


def test_spread_needs_two_members():
    assert spread(torch.tensor([[1.0, 3], [0, 0]])) == pytest.approx(math.sqrt(2) / 2)
    assert math.isnan(spread(torch.zeros(3, 1)))
    assert math.isnan(spread(torch.zeros(3, 0)))


@pytest.mark.parametrize(("n", "d"), [(6, 20), (40, 5)])
def test_distances_are_those_of_the_inverse_covariance(n, d):
    draws = torch.Generator().manual_seed(0)
    states, others = torch.randn(n, d, generator=draws), 2 * torch.randn(3, d, generator=draws)
    s = np.cov(states.double().numpy(), rowvar=False)
    sigma = (1 - SHRINKAGE) * s + SHRINKAGE * np.trace(s) / d * np.eye(d)
    x = others.double().numpy() - states.double().numpy().mean(0)
    expected = np.einsum("ij,jk,ik->i", x, np.linalg.inv(sigma), x) / d
    assert Cloud.of(states).distances(others).numpy() == pytest.approx(expected)


def test_a_cloud_of_one_point_has_no_distances():
    assert Cloud.of(torch.ones(4, 3)).distances(torch.zeros(2, 3)).isnan().all()


def test_gain_is_in_standard_deviations_of_sft_samples():
    assert gain(torch.tensor([3.0, 5.0]), 1.0, 2.0) == pytest.approx(1.5)
    assert gain(torch.full((8,), 1.0), 1.0, 0.0) == 0
    assert math.isnan(gain(torch.zeros(5, 0), 1.0, 2.0))
    # All SFT samples had 0; half of these have 1: the unit is that of a mixture of 4 to 1.
    scores = torch.tensor([0.0, 1.0] * 8)
    mixture = torch.cat([torch.zeros(64), scores]).double()
    assert gain(scores, 0.0, 0.0) == pytest.approx(0.5 / mixture.std(correction=0).item())


def samples(texts, *, finished, proxy, width=5):
    """Responses with log-probability -1 a token under the policy and -1.5 under the reference."""
    tokens, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
    nothing = torch.zeros(len(texts), 0)
    mask = mask.bool()
    return Samples(
        *(tokens, mask, torch.tensor(finished), -1.0 * mask, -1.5 * mask),
        *(torch.tensor(proxy), nothing, nothing, nothing),
    )


def test_the_token_that_ends_a_response_is_no_part_of_its_text():
    end = 9
    found = plain(samples([[1, 2, end], [1, 2]], finished=[True, False], proxy=[1.0, 2.0]))
    assert found["bigrams"] == pytest.approx(1 / 2)  # 12 and 12
    assert found["tokens"] == 2.5
    assert found["ended"] == 0.5
    assert found["surprise"] == pytest.approx(1.0)
    assert found["kl"] == pytest.approx((1.5 + 1.0) / 2)
    assert found["kl_error"] == pytest.approx(0.25)  # √(0.125) / √2
    assert found["proxy"] == 1.5
    assert all(math.isnan(found[name]) for name in ("held_out", "agreement", "member_spread"))


def test_a_baseline_survives_a_checkpoint():
    sets = [samples([[1, 2], [3, i]], finished=[True, False], proxy=[0.0, i]) for i in range(4)]
    made = Baseline.of([part.rows(torch.arange(2)) for part in sets])
    assert Baseline.restored(made.state_dict()).values == pytest.approx(made.values, nan_ok=True)
    assert made.cloud is None


# ---- rules ----


def trips(rule, values, **settings):
    """The numbers of the measurements at which a measure with these values trips."""
    config = MonitorConfig(prompts=1, **settings)
    history = [{} if value is None else {rule.metric: value} for value in values]
    return [n for n, now in enumerate(history) if rule.trips(now, history[:n], config)]


def test_a_rule_trips_when_it_was_confirmed_and_again_if_it_stays():
    values = [0.5, 2, 0.5, 2, 2, *[2] * (2 * AGAIN)]
    assert trips(RULE["gap"], values, max_gap=1, confirm=2) == [4, 4 + AGAIN, 4 + 2 * AGAIN]
    assert trips(RULE["gap"], values, max_gap=1, confirm=1)[:3] == [1, 3, 3 + AGAIN]
    assert trips(RULE["gap"], values, max_gap=0) == []  # no limit


def test_what_is_not_measured_neither_trips_nor_ends_a_row():
    assert trips(RULE["gap"], [2, None, None, 2], max_gap=1, confirm=2) == [3]
    assert trips(RULE["gap"], [2, 2, None, None, 0], max_gap=1, confirm=2) == [1]
    assert trips(RULE["gap"], [math.nan] * 9, max_gap=1, confirm=1) == []


def test_each_rule_knows_its_bad_side():
    length = {"max_length": 2, "min_length": 0.5, "confirm": 1}
    assert trips(RULE["brevity"], [1.9, 0.51, 2.1, 0.49], **length) == [3]
    assert trips(RULE["length"], [1.9, 0.4, 2.1], **length) == [2]
    assert trips(RULE["entropy"], [0.3, 0.1], min_entropy=0.2, confirm=1) == [1]


def test_a_roll_back_ends_a_row():
    rule, config = RULE["gap"], MonitorConfig(prompts=1, max_gap=1, confirm=2)
    beyond = {rule.metric: 2.0}
    assert rule.trips(beyond, [beyond], config)
    back = beyond | {ACTION: SEVERITY["roll_back"]}
    assert not rule.trips(beyond, [beyond, back], config)
    halved = beyond | {ACTION: SEVERITY["halve_learning_rate"]}
    history = [halved, back, halved]
    assert (roll_backs(history), halvings(history)) == (1, 3)
    assert since_roll_back(history) == [halved]


def test_every_measure_has_a_limit_and_an_action_and_a_sentence():
    config = MonitorConfig(prompts=1)
    for rule in RULES:
        alarm = rule.alarm({rule.metric: 1.25}, 7, config)
        assert alarm.line.startswith("monitor, iteration 7: ")
        assert "1.25" in alarm.line
        assert f"(limit {rule.limit(config):g})" in alarm.line
        assert alarm.line.endswith(". The run goes on")
    settings = {name for name in MonitorConfig.model_fields if name.startswith(("max_", "min_"))}
    assert {rule.setting for rule in RULES} == settings - {"max_roll_backs"}

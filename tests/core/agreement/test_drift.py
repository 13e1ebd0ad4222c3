"""Change over time: a change by hand, a test that holds its level, and people who come and go."""

from dataclasses import replace

import numpy as np
import pytest
from simulated_votes import Habit

from rlhf_core.agreement.assess import assess
from rlhf_core.agreement.drift import WEEK, blocks, places, slope


def test_a_slope_by_hand():
    when = np.linspace(0, 1, 20)
    values = 0.2 + 0.5 * when
    values[::2] += 0.01
    found, p = slope(values, when, np.zeros(20, int), np.arange(20))
    assert found.value == pytest.approx(0.5, abs=0.02)
    assert p < 1e-6


def test_somebody_who_leaves_is_no_change():
    """The first half is by one who is always right, the second by one who never is."""
    when, owners = np.linspace(0, 1, 40), np.repeat([0, 1], 20)
    random = np.random.default_rng(0)
    values = np.where(owners == 0, 0.9, 0.1) + random.normal(0, 0.05, 40)
    found, p = slope(values, when, owners, np.arange(40))
    assert abs(found.value) < 0.3
    assert p > 0.01


def test_the_level_holds_where_nothing_changes_and_a_change_is_seen(simulated):
    people = {f"p{i}": Habit() for i in range(6)}
    alarms = 0
    for seed in range(30):
        found = assess(simulated(people, pairs=120, gold=10, repeats=0, seed=seed)).trends
        alarms += any(trend.clear for trend in found)
    assert alarms <= 5  # 1.5 expected at 5 %; more than 5 have a chance below 0.004
    tired = assess(
        simulated(people, pairs=600, gold=40, repeats=0, drift=Habit(press=0.8, seconds=20))
    )
    clear = {trend.habit: trend for trend in tired.trends if trend.clear}
    assert {"left", "speed", "others"} <= clear.keys()
    assert clear["left"].change.value == pytest.approx(0.4, abs=0.12)
    assert clear["speed"].change.value == pytest.approx(np.log(20 / 60), abs=0.2)
    assert clear["others"].change.value < 0


def test_blocks_are_weeks_or_parts_and_need_times(simulated):
    votes = simulated(dict.fromkeys("abc"), pairs=100, gold=0, repeats=0)
    assert blocks(votes).names[0] == "part 1 of 10"
    assert np.bincount(blocks(votes).of).tolist() == [30] * 10
    spread = replace(votes, at=1.7e9 + np.arange(300) * WEEK / 20)
    weekly = blocks(spread)
    assert weekly.weekly
    assert weekly.names[0] == "from 2023-11-13"  # the Monday of the first vote's week
    assert np.bincount(weekly.of).min() >= 30
    unknown = replace(votes, at=np.full(300, np.nan))
    assert blocks(unknown).names == ()
    assert np.isnan(places(unknown)).all()
    assert assess(unknown).trends == ()

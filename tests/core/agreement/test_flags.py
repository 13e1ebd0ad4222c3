"""Flags: who has a habit is named, and who is careful hardly ever."""

import numpy as np
import pytest
from simulated_votes import PEOPLE, Habit

from rlhf_core.agreement.assess import assess

CROWD = {f"careful {i}": Habit() for i in range(12)}


def test_careful_people_are_hardly_ever_flagged(simulated):
    """Forty projects of twelve people of unequal care: at most 5 %, two, should have a flag,
    and six or more have a chance below 0.02."""
    random = np.random.default_rng(0)
    flagged = []
    for seed in range(40):
        people = {f"p{i}": Habit(right=random.uniform(0.8, 0.9)) for i in range(12)}
        quality = assess(simulated(people, pairs=150, gold=20, repeats=15, seed=seed, prompts=80))
        flagged.append(len(quality.flags))
    assert sum(count > 0 for count in flagged) <= 5, flagged


def test_each_habit_is_named_in_a_sentence(simulated):
    odd = {name: habit for name, habit in PEOPLE.items() if name != "careful"}
    quality = assess(simulated(CROWD | odd, pairs=1500, gold=120, repeats=150, seed=5))
    found = {(flag.annotator, flag.habit) for flag in quality.flags}
    assert {
        ("presser", "left"),
        ("lover", "longer"),
        ("fast", "fast"),
        ("spammer", "fast"),
        ("spammer", "gold"),
        ("adversary", "gold"),
        ("adversary", "others"),
    } <= found
    assert {name for name, _ in found} <= set(odd)
    [sentence] = [
        f.sentence for f in quality.flags if f.habit == "left" and f.annotator == "presser"
    ]
    assert sentence.startswith("presser chose the left answer in ")
    assert "decided votes; sides are drawn, so 45 to 55 % is what one expects." in sentence
    skill = {person.name: person.skill for person in quality.people}
    assert skill["careful 0"] == pytest.approx(0.85, abs=0.07)
    assert skill["adversary"] == pytest.approx(0.15, abs=0.08)
    assert skill["spammer"] == pytest.approx(0.5, abs=0.12)


def test_a_few_odd_votes_are_no_flag(simulated):
    quality = assess(
        simulated({"presser": Habit(press=1.0), "other": None}, pairs=4, each=2, gold=0)
    )
    assert quality.flags == ()

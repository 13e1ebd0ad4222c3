"""The gate under simulated verdicts: few trials here, 200 in benchmarks/promotion.py."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def trials():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("promotion")
    for name in ("promotion", "pages"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def world(trials):
    known = {found.name: found for found in trials.worlds()}
    return known.__getitem__


def promoted(trials, world, number):
    return sum(bool(trials.trial(world, seed)[0]) for seed in range(number))


def test_the_same_policy_again_and_again_is_not_promoted(trials, world):
    assert promoted(trials, replace(world("the same again"), prompts=30), 15) <= 1
    assert promoted(trials, replace(world("the same again, one answer"), prompts=30), 15) <= 1


def test_without_a_budget_it_would_be(trials, world, monkeypatch):
    """The trials can fail: at the full level in each look, an equal policy becomes champion."""

    def unlimited(number, total, others, opponent):
        found = trials_take_look(number, total, others, opponent)
        return found.model_copy(update={"alpha": total})

    trials_take_look = trials.take_look
    monkeypatch.setattr(trials, "take_look", unlimited)
    assert promoted(trials, replace(world("the same again, one answer"), prompts=30), 15) >= 4


def test_five_points_are_found(trials, world):
    assert promoted(trials, world("five points, one answer"), 10) >= 7


@pytest.mark.parametrize("planted", ["padding", "twice as long", "bad slice"])
def test_what_is_planted_is_never_promoted(trials, world, planted):
    assert promoted(trials, world(planted), 8) == 0


@pytest.mark.parametrize(
    ("planted", "changes", "family"),
    [
        ("padding", {"bias": 0.0, "over_champion": 0.75, "over_sft": 0.8}, "at equal length"),
        ("twice as long", {"longer": 0.0, "over_champion": 0.7, "over_sft": 0.8}, "length"),
        ("bad slice", {"bad_slice": 0.72}, "slices"),
    ],
)
def test_without_the_plant_it_is(trials, world, planted, changes, family):
    assert promoted(trials, replace(world(planted), **changes), 4) >= 3, family


def test_an_agreed_win_rate_is_the_one_that_was_drawn(trials, world):
    plain = replace(world("five points"), prompts=4000)
    sft, champion = trials.evaluate(plain, seed=1)
    assert sft.points.mean().item() == pytest.approx(0.62, abs=0.02)
    assert champion.points.mean().item() == pytest.approx(0.55, abs=0.02)
    # Two answers to a prompt agree more often than two to different prompts.
    first, second = champion.points.view(-1, 2).T
    assert ((first - 0.55) * (second - 0.55)).mean() > 0.05


def test_what_was_measured_is_in_the_page_and_is_what_was_asked(trials):
    lines = trials.read(trials.LINES)
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    section = page.partition(trials.BEGIN)[2].partition(trials.END)[0]
    assert section.strip() == trials.render(lines), "run benchmarks/promotion.py --write"
    shares = {line["name"]: line["promoted"] / line["trials"] for line in lines}
    assert {line["trials"] for line in lines} == {200}
    assert shares["the same again"] <= 0.05
    assert shares["the same again, one answer"] <= 0.05
    assert shares["five points"] >= 0.8
    assert shares["padding"] == shares["twice as long"] == shares["bad slice"] == 0

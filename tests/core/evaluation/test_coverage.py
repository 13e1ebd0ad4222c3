"""The intervals of an evaluation contain the truth, in the simulation that the benchmark makes."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def coverage(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("coverage")
    for name in ("coverage", "pages"):
        sys.modules.pop(name, None)


def covered(data_sets, count):
    found = [next(data_sets) for _ in range(count)]
    return {name: sum(each[name] for each in found) / count for name in found[0]}


# The standard error of a share near 0.95 in 200 data sets is 0.015.


@pytest.mark.parametrize("answers", [1, 2, 4])
@pytest.mark.parametrize("rate", [0.5, 0.8, None])
def test_ten_prompts_that_agree_with_themselves(coverage, answers, rate):
    found = covered(coverage.win_rates(10, coverage.Design(answers, 1.0), rate, 0), 200)
    assert 0.93 <= found["reported"] <= 1
    assert found["bootstrap"] < found["reported"]


@pytest.mark.parametrize("prompts", [30, 100])
def test_more_prompts_that_agree_with_themselves(coverage, prompts):
    found = covered(coverage.win_rates(prompts, coverage.Design(2, 1.0), None, 0), 200)
    assert 0.92 <= found["reported"] <= 0.98


def test_the_floor_is_wide_where_verdicts_on_a_prompt_differ(coverage):
    found = covered(coverage.win_rates(30, coverage.Design(4, 0.2), 0.6, 0), 200)
    assert found["reported"] >= 0.99  # what it costs to count prompts and not answers


@pytest.mark.parametrize(("prompts", "most"), [(10, 1.0), (100, 0.985)])
def test_differences(coverage, prompts, most):
    design = coverage.Compared(4, (1.0, 0.3), 1.0)
    found = covered(coverage.differences(prompts, design, 0), 200)
    assert 0.93 <= found["reported"] <= most
    assert found["bootstrap"] <= found["reported"]


def test_a_win_rate_at_equal_length_where_the_raw_one_is_bought_with_length(coverage):
    found = covered(coverage.equal_lengths(100, coverage.Lengths(0.0, 2.0, 1.0), 0), 60)
    assert found["told"] == 1
    assert found["reported"] >= 0.88
    assert found["raw"] < 0.2

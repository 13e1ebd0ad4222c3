"""The page of two runs: what differs first, and both answers side by side."""

import pytest
from recorded_runs import scorecard
from test_run_page import HOSTILE, require_self_contained, text_of

from rlhf_core.errors import UserError
from tasks.history.comparison import Measure, MetricRow, RunComparison, RunFacts, StageRow, Value
from tasks.pages.comparison_page import write_comparison
from tasks.settings import read_settings


def comparison(*metrics, stages=("sft", "evaluation")):
    runs = tuple(
        RunFacts(run_id=n * 32, name=f"demo#{n}", status="FINISHED", code="", url="u") for n in "12"
    )
    rows = tuple(StageRow(stage=name, first="FINISHED", second="FINISHED") for name in stages)
    return RunComparison(
        runs=runs, params=(), same_params=(), stages=rows, metrics=metrics, url="s"
    )


def metric(stage, name, first, second):
    return MetricRow(stage=stage, name=name, first=first, second=second)


def bounds(name, first, second, reach):
    for end, by in (("", 0), ("_low", -reach), ("_high", reach)):
        yield metric("evaluation", name + end, first + by, second + by)


def test_what_differs_most_is_first():
    found = comparison(
        metric("sft", "small", 1.00, 1.01),
        metric("sft", "one_run", None, 5.0),
        metric("sft", "large", 1.0, 4.0),
        *bounds("unclear", 1.0, 9.0, 5.0),  # a large difference that may be chance
        *bounds("clear", 1.0, 1.5, 0.1),
        *bounds("clearest", 1.0, -1.5, 0.1),
    )
    groups = found.groups(found.differing_measures())
    assert {stage: [row.name for row in rows] for stage, rows in groups.items()} == {
        "evaluation": ["clearest", "clear", "unclear"],
        "sft": ["large", "small", "one_run"],
    }
    assert list(groups) == ["evaluation", "sft"]  # something in it differs clearly


def measure(first, second):
    return Measure("s", "n", first, second, second.value - first.value, True)


def test_clear_means_that_the_intervals_do_not_overlap():
    assert measure(Value(1.0, 0.9, 1.1), Value(2.0, 1.2, 2.8)).clear
    assert measure(Value(2.0, 1.2, 2.8), Value(1.0, 0.9, 1.1)).clear
    assert not measure(Value(1.0, 0.9, 1.2), Value(2.0, 1.2, 2.8)).clear
    assert not measure(Value(1.0), Value(2.0)).clear
    assert not measure(Value(0.0, 0.0, 0.0), Value(2.0, 2.0, 2.0)).clear  # no intervals
    assert measure(Value(1.0), Value(4.0)).relative == 0.75
    assert measure(Value(0.0), Value(-4.0)).relative == 1.0


def test_the_page_shows_both_runs(recorded, tmp_path):
    prompts = [("Is it good?", "sft", "x"), (HOSTILE, "sft", "x")]
    first, _ = recorded(
        [*prompts, ("Is it good?", "policy", "It is long."), (HOSTILE, "policy", HOSTILE)],
        card=scorecard(0.75),
        curves={"ppo": {"objective/kl": [0.0, 1.0]}},
    )
    second, _ = recorded(
        [*prompts, ("Is it good?", "policy", "It is short."), ("Other?", "policy", "y")],
        card=scorecard(0.55),
        curves={"ppo": {"objective/kl": [0.0, 3.0]}},
        ppo={"kl_coef": 0.5, "iterations": 5},
    )
    output = tmp_path / "new" / "page.html"
    made = write_comparison(first.run_id, second.run_id, output, settings=read_settings())
    assert [row.name for row in made.params] == ["kl_coef"]
    page = output.read_text(encoding="utf-8")
    require_self_contained(page)
    text = text_of(page)
    assert "The runs differ in 1 setting; no result differs clearly." in text
    assert "ppo.kl_coef 0.1 0.5" in text
    assert "objective/kl 1 3 +2" in text
    assert "It is<del> long</del>." in page
    assert "It is<ins> short</ins>." in page
    assert "<script>" not in page  # the prompt that only one run has is not shown
    assert "Other?" not in text
    assert f"p-seed-1 ({first.run_id[:8]})" in text  # both have one name


def test_a_run_that_is_not_there_is_an_error_and_no_page(recorded, tmp_path):
    facts, _ = recorded(decision=None)
    with pytest.raises(UserError, match="no pipeline run matches 'nothing'"):
        write_comparison(facts.run_id, "nothing", tmp_path / "x.html", settings=read_settings())
    assert not (tmp_path / "x.html").exists()

"""What `rlhf compare` prints: what differs, whole, on any terminal and in a pipe."""

from io import StringIO

import pytest
from rich.console import Console

from flows.cli import printing
from tasks.history.comparison import MetricRow, ParamRow, RunComparison, RunFacts, StageRow

LONG = "summary/win_rate/policy_over_best_of_n"
COUNT = "summary/train_pairs"


def comparison(params=(), metrics=(), stages=()):
    runs = tuple(
        RunFacts(
            run_id=digit * 32, name=f"demo#{digit}", status="FINISHED", code="release 1", url="u"
        )
        for digit in "12"
    )
    both = [StageRow(stage=name, first="FINISHED", second="FINISHED") for name in ("sft", "ppo")]
    same = tuple(
        ParamRow(stage="ppo", name=name, first="0.1", second="0.1") for name in ("kl_coef", "lam")
    )
    return RunComparison(
        runs=runs,
        params=params,
        same_params=same,
        stages=(*both, *stages),
        metrics=metrics,
        url="s",
    )


def metric(name, first, second, stage="sft"):
    return MetricRow(stage=stage, name=name, first=first, second=second)


EQUAL = (metric("loss", 0.25, 0.25), metric("accuracy", 0.5, 0.5))
OTHER = (
    *EQUAL,
    metric(LONG, 0.8312, 0.8534),
    metric(f"{LONG}_low", 0.8201, 0.8489),
    metric(f"{LONG}_high", 0.8399, 0.8601),
    metric(COUNT, 12345.0, 12340.0),
)


@pytest.fixture(params=[40, 80, 200, None])
def shown(request, monkeypatch, capsys):
    """What is shown on a terminal of so many columns, or in a pipe."""
    kept = StringIO()
    width = request.param
    if width:
        console = Console(file=kept, force_terminal=True, no_color=True, width=width)
        monkeypatch.setattr(printing, "out", console)

    def show(found, everything=False):
        printing.show_comparison(found, everything=everything)
        return kept.getvalue() if width else capsys.readouterr().out

    show.width = width
    return show


def test_two_equal_runs_are_one_sentence(shown):
    lines = shown(comparison(metrics=EQUAL)).splitlines()
    assert lines[0] == (
        "Nothing differs between demo#1 11111111 and demo#2 22222222: "
        "2 settings, 2 stages and 2 metrics are the same."
    )
    assert len(lines) == 4  # and where each is, and both


def test_what_differs_is_whole_and_the_rest_is_left_out(shown):
    text = shown(comparison(metrics=OTHER))
    for whole in (f"sft {LONG}", "0.831 [0.82, 0.84]", "0.853 [0.849, 0.86]", "+0.0222"):
        assert whole in text
    for whole in ("12345", "12340", "-5"):
        assert whole in text
    assert "sft loss" not in text
    assert "_low" not in text
    assert "sft loss" in shown(comparison(metrics=OTHER), everything=True)


def test_a_table_where_it_fits(shown):
    text = shown(comparison(metrics=OTHER))
    assert ("│" in text) == (shown.width in (200, None))


def test_settings_and_stages_that_differ(shown):
    params = (ParamRow(stage="", name="seed", first="1", second="2"),)
    stages = (StageRow(stage="dpo", first=None, second="FINISHED"),)
    only = (metric("margin", None, 1.0, stage="dpo"),)
    text = shown(comparison(params=params, stages=stages, metrics=only))
    assert "seed" in text
    assert "ppo.kl_coef" not in text
    assert "dpo" in text
    assert "margin" not in text
    text = shown(comparison(params=params, stages=stages, metrics=only), everything=True)
    assert "ppo.kl_coef" in text
    assert "dpo margin" in text


def test_an_interval_that_differs_alone_is_shown(shown):
    bounds = (metric("x", 0.5, 0.5), metric("x_low", 0.1, 0.2), metric("x_high", 0.9, 0.9))
    text = shown(comparison(metrics=bounds))
    assert "0.5 [0.1, 0.9]" in text
    assert "0.5 [0.2, 0.9]" in text

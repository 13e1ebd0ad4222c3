"""Progress at a terminal is one bar, and elsewhere a line now and then."""

import io

from rich.console import Console

from tasks.record import terminal
from tasks.record.terminal import TerminalDisplay, on_terminal


def test_without_a_terminal_progress_is_a_line_now_and_then():
    out = io.StringIO()
    display = TerminalDisplay("sft", Console(file=out), line_seconds=1000)
    for done in range(1, 101):
        display.show(done, 100, f"[loss] {done}")
    display.close()
    assert out.getvalue().splitlines() == ["sft: 1/100 [loss] 1", "sft: 100/100 [loss] 100"]


def test_on_a_terminal_progress_is_one_bar():
    out = io.StringIO()
    display = TerminalDisplay("ppo", Console(file=out, force_terminal=True, width=100))
    for done in range(1, 4):
        display.show(done, 3, f"kl {done}")
    display.close()
    last = out.getvalue().rsplit("\r", 1)[-1]
    assert "ppo" in last
    assert "3/3" in last
    assert "kl 3" in last


def test_what_comes_after_the_last_step_is_a_line_now_and_then_too():
    out = io.StringIO()
    display = TerminalDisplay("reward_model", Console(file=out), line_seconds=1000)
    for done in range(1, 9):
        display.show(done, 8, "loss 0.4")
    for percent in range(100):
        display.show(8, 8, f"sampling {percent} % · loss 0.4")
    assert out.getvalue().splitlines() == [
        "reward_model: 1/8 loss 0.4",
        "reward_model: 8/8 loss 0.4",
    ]


def test_on_a_terminal_a_bar_without_an_end_says_what_goes_on():
    out = io.StringIO()
    display = TerminalDisplay("ppo", Console(file=out, force_terminal=True, width=100))
    display.show(0, 0, "loading the models")
    assert "loading the models" in out.getvalue()
    display.show(1, 3, "sampling 40 %")
    display.close()
    last = out.getvalue().rsplit("\r", 1)[-1]
    assert "1/3" in last
    assert "sampling 40 %" in last


def test_of_what_never_had_steps_no_bar_is_left():
    out = io.StringIO()
    display = TerminalDisplay("promotion", Console(file=out, force_terminal=True, width=100))
    display.show(0, 0, "storing the report")
    display.close()
    assert "storing the report" in out.getvalue()
    assert "promotion" not in out.getvalue().rsplit("\x1b[2K", 1)[-1]


def test_work_without_a_run_says_something_only_if_it_takes_long(capsys, monkeypatch):
    for seconds in (10.0, 0.0):
        display = TerminalDisplay("validate", line_seconds=seconds, passing=True)
        monkeypatch.setattr(terminal, "TerminalDisplay", lambda *_, d=display, **__: d)
        with on_terminal("validate") as logger:
            logger.phase("reading the preferences")
            logger.progress(1, 1)
            logger.phase("tokenising", 1, 4)
        said = capsys.readouterr().err.splitlines()
        assert said == (
            []
            if seconds
            else [
                "validate: reading the preferences",
                "validate: 1/1",
                "validate: 1/1 tokenising 25 %",
            ]
        )

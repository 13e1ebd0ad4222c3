"""A folder belongs to one process at a time, and is there whole or not at all."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import tasks.record.work_folder as work_folder_module
from tasks.record.work_folder import (
    DAY,
    abandoned_runs,
    empty,
    remember_run,
    remembered_run,
    sweep,
    work_folder,
)

HOLD = """
import pathlib, sys, time
from tasks.record.work_folder import work_folder
with work_folder(pathlib.Path(sys.argv[1]), kept=True) as folder:
    (folder / "begun").write_text("by a process")
    print(folder, flush=True)
    time.sleep(60)
"""


def hold(path):
    """A process that works in the folder, and which folder it got."""
    command = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_is_gone_when_the_work_is_done(tmp_path):
    for kept in (True, False):
        with work_folder(tmp_path / "deep" / "sft", kept=kept) as folder:
            (folder / "model").mkdir()
        assert names(tmp_path / "deep") == []


def fail(path, *, kept):
    with work_folder(path, kept=kept) as folder:
        for name in ("checkpoints", "inputs"):
            (folder / name).mkdir()
        raise KeyboardInterrupt


def test_work_that_failed_is_kept_or_not(tmp_path):
    for kept in (True, False):
        with pytest.raises(KeyboardInterrupt):
            fail(tmp_path / str(kept), kept=kept)
    assert names(tmp_path) == ["True"]
    assert names(tmp_path / "True") == ["checkpoints", "lock"]


def test_a_second_worker_waits_and_goes_on_with_what_a_killed_one_left(tmp_path, caplog):
    process, got = hold(tmp_path / "sft")
    assert got == str(tmp_path / "sft")
    timer = threading.Timer(1.0, process.kill)
    timer.start()
    with work_folder(tmp_path / "sft", kept=True) as folder:
        assert process.wait(10) == -signal.SIGKILL
        assert (folder / "begun").read_text() == "by a process"
    assert "another process is running the same work (sft); waiting for it" in caplog.text
    assert names(tmp_path) == []
    process.stdout.close()


def test_runs_whose_process_was_killed_are_known(tmp_path):
    for name in ("dead", "nameless"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    remember_run(tmp_path / "dead", "abc")
    age(tmp_path / "dead", 8)
    with work_folder(tmp_path / "alive", kept=True) as alive:
        remember_run(alive, "def")
        assert list(abandoned_runs(tmp_path)) == ["abc"]
    sweep(tmp_path, days=7)  # to be looked at is not to be touched
    assert names(tmp_path) == ["nameless"]


def age(folder, days):
    then = time.time() - days * DAY
    for path in (*folder.iterdir(), folder):
        os.utime(path, (then, then))


def test_what_nobody_touches_for_days_is_swept(tmp_path):
    for name, days in {"old": 8, "young": 6, "saved": 8, "used": 8}.items():
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        age(tmp_path / name, days)
    (tmp_path / "saved" / "checkpoints" / "step-1").mkdir()  # a save changes no other folder
    with work_folder(tmp_path / "used", kept=True) as used:
        age(used, 8)
        sweep(tmp_path, days=7)
        assert names(tmp_path) == ["saved", "used", "young"]
    sweep(tmp_path / "nowhere", days=7)


def test_the_run_is_remembered_until_the_folder_is_emptied(tmp_path):
    with work_folder(tmp_path / "sft", kept=True) as folder:
        assert remembered_run(folder) is None
        remember_run(folder, "abc")
        (folder / "checkpoints").mkdir()
        assert remembered_run(folder) == "abc"
        (folder / "run.json").write_text("torn")
        assert remembered_run(folder) is None
        empty(folder)
        assert names(folder) == ["lock"]


def stop(folder):
    """A training in a folder, stopped."""
    with pytest.raises(KeyboardInterrupt):
        fail(folder, kept=True)


def test_a_clock_that_jumps_sweeps_nothing(tmp_path, monkeypatch):
    stop(tmp_path / "sft")
    ahead = time.time() + 30 * DAY
    monkeypatch.setattr(time, "time", lambda: ahead)
    sweep(tmp_path, days=7)
    assert names(tmp_path / "sft") == ["checkpoints", "lock"]


def test_what_is_old_by_the_machine_or_from_another_start_of_it_is_swept(tmp_path, monkeypatch):
    boot, running = tmp_path / "boot", tmp_path / "uptime"
    boot.write_text("first\n")
    running.write_text(f"{DAY} 1.0\n")
    monkeypatch.setattr(work_folder_module, "_BOOT", boot)
    monkeypatch.setattr(work_folder_module, "_UPTIME", running)
    home = tmp_path / "work"
    for name in ("old", "before"):
        stop(home / name)
        age(home / name, 8)
    running.write_text(f"{7 * DAY} 1.0\n")  # six days later
    sweep(home, days=7)
    assert names(home) == ["before", "old"]
    running.write_text(f"{9 * DAY} 1.0\n")
    (home / "before" / "lock").write_text('["another", 8.9e5]')
    age(home / "before", 8)
    sweep(home, days=7)
    assert names(home) == []

"""Limits of this machine: `ulimit -v`, control groups, disks."""

import subprocess
import sys

import pytest

from rlhf_core.estimate import machine
from rlhf_core.estimate.machine import memory_free, memory_limit, room


def test_the_narrowest_limit_is_told(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 3000000 kB\n")
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path / "none")
    assert memory_limit("cpu") == (8_192_000_000, "this machine has")
    assert memory_free() == 3_072_000_000
    group = tmp_path / "group"
    group.mkdir()
    monkeypatch.setattr(machine, "_CGROUP", group)
    (group / "memory.max").write_text("2000000000\n")
    (group / "memory.current").write_text("500000000\n")
    limit = memory_limit("cpu")
    assert limit.bytes == 2_000_000_000
    assert "control group" in limit.what
    assert memory_free() == 1_500_000_000
    (group / "memory.max").write_text("max\n")
    assert memory_limit("cpu").what == "this machine has"


def test_ulimit_counts():
    code = (
        "import resource; from rlhf_core.estimate.machine import memory_limit;"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); print(*memory_limit('cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{1 << 30} `ulimit -v` allows"


def test_without_proc_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path / "none")
    assert memory_free() is None


@pytest.mark.parametrize("name", ["", "a", "a/b/c"])
def test_a_folder_that_is_not_there_yet_is_on_the_disk_of_those_above(tmp_path, name):
    assert room(tmp_path / name) == pytest.approx(room(tmp_path), rel=0.05)

"""Limits of this machine: `ulimit -v`, control groups, disks."""

import resource
import subprocess
import sys

import pytest

from rlhf_core.machine.limits import memory_limit, room


@pytest.fixture
def root(tmp_path):
    """A machine of 8 GB, whose process is in a control group."""
    for name, text in {
        "proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 3000000 kB\n",
        "proc/self/cgroup": "0::/jobs/one\n",
        "sys/fs/cgroup/jobs/one/memory.max": "max\n",
        "sys/fs/cgroup/jobs/one/memory.current": "500000000\n",
        "sys/fs/cgroup/jobs/one/memory.stat": "inactive_file 0\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_narrowest_limit_is_told(root):
    assert memory_limit("cpu", root=root) == (8_192_000_000, "this machine has")
    group = root / "sys/fs/cgroup/jobs/one"
    (group / "memory.max").write_text("2000000000\n")
    limit = memory_limit("cpu", root=root)
    assert limit.bytes == 2_000_000_000
    assert "control group" in limit.what
    (group / "memory.max").write_text(f"{2**63 - 4096}\n")
    assert memory_limit("cpu", root=root).what == "this machine has"


def test_ulimit_counts():
    code = (
        "import resource; from rlhf_core.machine.limits import memory_limit;"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); print(*memory_limit('cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{1 << 30} `ulimit -v` allows"


def test_without_proc_nothing_is_known(tmp_path):
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    assert (memory_limit("cpu", root=tmp_path) is None) == (soft == resource.RLIM_INFINITY)


@pytest.mark.parametrize("name", ["", "a", "a/b/c"])
def test_a_folder_that_is_not_there_yet_is_on_the_disk_of_those_above(tmp_path, name):
    assert room(tmp_path / name) == pytest.approx(room(tmp_path), rel=0.05)

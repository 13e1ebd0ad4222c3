"""Free memory, where a folder stands for /proc and /sys."""

import pytest
import torch

from rlhf_core.machine.memory import UNKNOWN, free_memory

MEBI = 1 << 20


@pytest.fixture
def root(tmp_path):
    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


MACHINE = {"proc__meminfo": "MemTotal: 99 kB\nMemAvailable:   8192 kB\n"}


def test_this_machine_has_some():
    assert 0 < free_memory() < UNKNOWN
    assert free_memory("meta") == 0


def test_what_the_machine_has_available(root):
    assert free_memory(torch.device("cpu"), root=root(**MACHINE)) == 8 * MEBI


def test_where_nothing_is_told_nothing_limits(root):
    assert free_memory(root=root()) == UNKNOWN
    assert free_memory(root=root(proc__meminfo="MemAvailable:\nx")) == UNKNOWN


def test_a_limit_of_a_group_above_counts_and_files_can_be_dropped(root):
    group = "sys__fs__cgroup__a__"
    files = {
        "proc__self__cgroup": "0::/a/b\n",
        f"{group}b__memory.max": "max\n",
        f"{group}b__memory.current": "1\n",
        f"{group}memory.max": f"{6 * MEBI}\n",
        f"{group}memory.current": f"{5 * MEBI}\n",
        f"{group}memory.stat": f"anon 7\ninactive_file {2 * MEBI}\n",
    }
    assert free_memory(root=root(**MACHINE, **files)) == 3 * MEBI


def test_groups_of_the_first_version(root):
    group = "sys__fs__cgroup__memory__x__memory."
    files = {
        "proc__self__cgroup": "9:name=systemd:/\n4:cpu,memory:/x\n0::/\n",
        f"{group}limit_in_bytes": f"{4 * MEBI}",
        f"{group}usage_in_bytes": f"{5 * MEBI}",
        f"{group}stat": "total_inactive_file 0\n",
    }
    assert free_memory(root=root(**MACHINE, **files)) == 0

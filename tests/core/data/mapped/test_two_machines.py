"""One folder made by two machines at once, whose locks reach each other or do not.

A machine is a process in namespaces of its own; other mounts give it another name, and a lock file
that the other one does not see, as NFS without locks does.
"""

import os
import shutil
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("unshare"),
    reason="namespaces need root and util-linux",
)

SCRIPT = """
import hashlib, sys, time
from pathlib import Path
from rlhf_core.data.mapped.folder import made_once
folder, name = Path(sys.argv[1]), sys.argv[2]
def make(path):
    folder.with_name(f"made-by-{name}").touch()
    for number in range(3):
        with (path / f"{number}.bin").open("wb") as file:
            for _ in range(5):
                file.write(bytes([number]) * 100_000)
                time.sleep(float(sys.argv[3]))
found = made_once(folder, make)
content = [(file.name, file.read_bytes()) for file in sorted(found.iterdir())]
print(hashlib.sha256(repr(content).encode()).hexdigest())
"""


@pytest.fixture
def shared(tmp_path):
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared" / "texts"


def machine(folder, name, *, locks, seconds=0.1):
    """A process on another machine that wants the folder."""
    private = folder.parents[1] / name
    private.mkdir()
    (private / "lock").touch()
    (private / "boot").write_text(f"boot of {name}\n")
    (lock := folder.with_name(f"{folder.name}.lock")).touch()
    mounts = f'mount --bind "{private}/boot" /proc/sys/kernel/random/boot_id'
    if not locks:
        mounts += f' && mount --bind "{private}/lock" "{lock}"'
    command = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c"]
    command += [f'{mounts} && exec "$@"', "sh", sys.executable, "-c", SCRIPT]
    command += [str(folder), name, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def digests(*machines):
    found = [each.communicate(timeout=60)[0] for each in machines]
    assert [each.returncode for each in machines] == [0] * len(machines)
    return found


def left(folder):
    return sorted(path.name for path in folder.parent.iterdir() if path.is_dir())


def makers(folder):
    return {path.name for path in folder.parent.glob("made-by-*")}


def test_where_locks_reach_it_is_made_once(shared):
    a, b = digests(machine(shared, "a", locks=True), machine(shared, "b", locks=True))
    assert a == b
    assert len(makers(shared)) == 1
    assert left(shared) == ["texts"]


def test_where_they_do_not_it_is_made_twice_and_never_half(shared):
    both = machine(shared, "a", locks=False), machine(shared, "b", locks=False)
    a, b = digests(*both)
    assert a == b
    assert makers(shared) == {"made-by-a", "made-by-b"}
    assert left(shared) == ["texts"]
    (again,) = digests(machine(shared, "c", locks=False))
    assert again == a
    assert "made-by-c" not in makers(shared)


def test_a_machine_that_comes_later_does_not_clear_what_the_first_makes(shared):
    first = machine(shared, "a", locks=False, seconds=0.2)
    until(lambda: len(list(shared.parent.glob("texts.part-*/*"))) == 2)
    second = machine(shared, "b", locks=False, seconds=0.0)
    (fast,) = digests(second)
    (slow,) = digests(first)
    assert fast == slow
    assert left(shared) == ["texts"]


def test_a_machine_that_dies_leaves_the_work_to_the_other(shared):
    dies = machine(shared, "a", locks=True, seconds=0.2)
    until(lambda: list(shared.parent.glob("texts.part-*/1.bin")))
    waits = machine(shared, "b", locks=True, seconds=0.0)
    dies.kill()
    dies.communicate()
    digests(waits)
    assert makers(shared) == {"made-by-a", "made-by-b"}
    assert left(shared)[0] == "texts"
    assert len(list(shared.parent.glob("texts.part-*"))) == 1  # of the dead machine


def test_without_locks_at_all(shared, monkeypatch):
    from rlhf_core.data.mapped import folder

    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(folder.fcntl, "flock", none)
    made = folder.made_once(shared, lambda path: (path / "whole").write_text("y"))
    assert (made / "whole").read_text() == "y"
    assert left(shared) == ["texts"]

"""A state comes back as it was saved, or not at all."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass

import pytest
import torch

from rlhf_core.errors import CheckpointError
from rlhf_core.training.checkpoint import Checkpoints
from rlhf_core.types import PromptBatch

RUN = {"seed": "0", "data": "a1b2"}


@dataclass(frozen=True)
class Turn:
    """A record with a record in it, as a roll-out is."""

    prompts: PromptBatch
    scores: torch.Tensor


def state(step):
    return {"step": step, "weights": torch.full((50,), float(step))}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "run")


@pytest.fixture
def two(checkpoints):
    """Two checkpoints, of steps 1 and 2."""
    for step in (1, 2):
        checkpoints.save(step, state(step), RUN)
    return checkpoints


@pytest.fixture
def newest(two):
    return two.directory / "step-00000002"


# --- there and back ---


def test_every_kind_of_value_comes_back_to_the_bit(tmp_path):
    ids, mask = torch.tensor([[1, 2]]), torch.tensor([[False, True]])
    shared = torch.randn(3)
    saved = {
        "plain": [None, True, 0, -1, 2**63 + 1, 0.1, -0.0, math.inf, "ä\n", (), (1, [2, {"x": 3}])],
        "nan": math.nan,
        "keys": {0: "int", "s": "str"},
        "tensors": [shared, shared, torch.randn(2).bfloat16(), torch.tensor([], dtype=torch.uint8)],
        "turn": Turn(PromptBatch(ids, mask), shared),
    }
    checkpoints = Checkpoints(tmp_path, records=[PromptBatch, Turn])
    checkpoints.save(7, saved, RUN)
    loaded = checkpoints.latest(RUN)
    assert repr(loaded["plain"]) == repr(saved["plain"])  # repr tells -0.0, True and tuples apart
    assert loaded["keys"] == saved["keys"]
    assert math.isnan(loaded["nan"])
    for one, other in zip(loaded["tensors"], saved["tensors"], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert loaded["tensors"][0].data_ptr() == loaded["tensors"][1].data_ptr()  # saved once
    assert torch.equal(loaded["turn"].prompts.mask, mask)
    assert torch.equal(loaded["turn"].scores, shared)


def test_nothing_saved_is_none(checkpoints):
    assert checkpoints.latest(RUN) is None


def test_manifest_says_what_an_independent_digest_says(two, newest):
    written = (newest / "state.pt").read_bytes()
    assert json.loads((newest / "manifest.json").read_text()) == {
        "format": 1,
        "step": 2,
        "size": len(written),
        "sha256": hashlib.sha256(written).hexdigest(),
        "identity": RUN,
    }
    assert names(newest) == ["manifest.json", "state.pt"]


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_are_kept(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for step in (8, 9, 10, 11, 1000):
        checkpoints.save(step, state(step), RUN)
    last = [f"step-{step:08d}" for step in (8, 9, 10, 11, 1000)[-keep:]]
    assert names(tmp_path) == last
    assert checkpoints.latest(RUN)["step"] == 1000


def test_what_killed_processes_left_is_removed(two, newest):
    shutil.copytree(newest, newest.with_suffix(".new"))
    shutil.copytree(newest, newest.with_name("step-00000001.old"))
    assert two.latest(RUN)["step"] == 2
    two.save(3, state(3), RUN)
    assert names(two.directory) == ["step-00000002", "step-00000003"]


def test_a_run_that_starts_anew_ends_the_one_before(two):
    Checkpoints(two.directory).save(1, state(11), RUN)
    assert names(two.directory) == ["step-00000001"]
    assert two.latest(RUN)["step"] == 11


def test_clear_leaves_nothing_but_what_is_not_its_own(two, newest):
    shutil.copytree(newest, newest.with_suffix(".new"))
    (two.directory / "note").touch()
    two.clear()
    assert names(two.directory) == ["note"]
    (two.directory / "note").unlink()
    two.clear()
    assert not two.directory.exists()
    two.clear()
    assert two.latest(RUN) is None


# --- damage ---


def truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def grow(file):
    file.write_bytes(file.read_bytes() + b"\0")


def flip(file, place=None):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    file.write_bytes(content)


def empty(file):
    os.truncate(file, 0)


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (truncate, "state.pt", "bytes"),
        (empty, "state.pt", "has 0 of"),
        (grow, "state.pt", "bytes"),
        (flip, "state.pt", "SHA-256"),
        (os.remove, "state.pt", "No such file.*state.pt"),
        (os.remove, "manifest.json", "No such file.*manifest.json"),
        (empty, "manifest.json", "JSONDecodeError"),
        (lambda file: os.truncate(file, 40), "manifest.json", "JSONDecodeError"),
        (lambda file: file.write_text("[]"), "manifest.json", "TypeError"),
        (lambda file: file.write_text("{}"), "manifest.json", "format"),
    ],
)
def test_the_one_before_a_damaged_one_is_used(two, newest, caplog, damage, file, reason):
    damage(newest / file)
    assert two.latest(RUN)["step"] == 1
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(newest) in record.getMessage()
    assert re.search(reason, record.getMessage())


def test_no_flipped_bit_of_a_state_goes_unseen(two, newest):
    file = newest / "state.pt"
    for place in range(0, file.stat().st_size, 7):
        flip(file, place)
        assert two.latest(RUN)["step"] == 1
        flip(file, place)
    assert two.latest(RUN)["step"] == 2


def test_no_flipped_bit_of_a_manifest_gives_another_state(two, newest):
    file = newest / "manifest.json"
    outcomes = set()
    for place in range(file.stat().st_size):
        flip(file, place)
        try:
            loaded = two.latest(RUN)
            assert torch.equal(loaded["weights"], state(loaded["step"])["weights"])
            outcomes.add(loaded["step"])
        except CheckpointError:
            outcomes.add("refused")
        flip(file, place)
    assert outcomes == {1, 2, "refused"}


def test_a_damaged_one_takes_no_place_among_the_kept(two, newest):
    # Steps 1 and 2, 2 damaged, so the run continues from 1 and saves at another moment.
    flip(newest / "state.pt")
    two.latest(RUN)
    two.save(3, state(3), RUN)
    assert names(two.directory) == ["step-00000001", "step-00000003"]


def test_a_damaged_one_is_replaced_by_the_same_step(two, newest):
    flip(newest / "state.pt")
    two.latest(RUN)
    two.save(2, state(2), RUN)
    assert two.latest(RUN)["step"] == 2
    assert names(two.directory) == ["step-00000001", "step-00000002"]


def test_all_damaged_is_not_a_fresh_start(two):
    for folder in two.directory.iterdir():
        flip(folder / "state.pt")
    with pytest.raises(CheckpointError, match=r"none of the 2 .* is intact; delete that folder"):
        two.latest(RUN)


def test_code_in_a_checkpoint_does_not_run(two, newest, tmp_path, caplog):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": Evil()}, newest / "state.pt")
    content = (newest / "state.pt").read_bytes()
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert two.latest(RUN)["step"] == 1
    assert "UnpicklingError" in caplog.text
    assert not (tmp_path / "ran").exists()


# --- of another run ---


def test_another_run_is_refused_with_all_that_differs(two):
    other = {"seed": "1", "data": "a1b2", "length": "9"}
    differing = r": length was missing and is now 9; seed was 0 and is now 1\. Undo .* delete"
    with pytest.raises(CheckpointError, match=differing):
        two.latest(other)
    with pytest.raises(CheckpointError, match=r": data was a1b2 and is now missing\. "):
        two.latest({"seed": "0"})
    assert two.latest(dict(reversed(RUN.items())))["step"] == 2


def test_another_format_is_refused(two, newest):
    file = newest / "manifest.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match=r"has format 2, but this version reads 1; .* delete"):
        two.latest(RUN)


# --- what cannot be saved ---


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (torch.tensor(1.0).numpy().sum(), "numpy"),
        (PromptBatch(torch.zeros(1), torch.zeros(1)), "PromptBatch"),
        (frozenset("a"), "frozenset"),
    ],
)
def test_what_could_not_be_loaded_is_refused_when_it_is_saved(two, value, name):
    with pytest.raises(TypeError, match=f"cannot contain .*{name}"):
        two.save(3, {"x": [value]}, RUN)
    assert names(two.directory) == ["step-00000001", "step-00000002"]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip(f"a small disk needs the right to mount one: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_leaves_what_was_there(small_disk):
    checkpoints = Checkpoints(small_disk / "run")
    page = 4096 // 4  # floats
    fits = {True: 0, False: 0}
    # Half of the disk is taken; the rest gets full within the state, in the manifest, or not.
    for floats in (1_000_000, *range(130 * page, 118 * page, -page // 2)):
        checkpoints.save(1, {"x": torch.zeros(128 * page)}, RUN)
        try:
            checkpoints.save(2, {"x": torch.ones(floats)}, RUN)
        except OSError as error:
            full = error.errno == errno.ENOSPC
        else:
            full = False
        found = names(checkpoints.directory)
        assert found == ["step-00000001", "step-00000002"][: 1 if full else 2]
        assert checkpoints.latest(RUN)["x"].sum() == (0 if full else floats)
        fits[not full] += 1
        checkpoints.clear()
    assert min(fits.values()) > 5


def test_a_save_that_is_interrupted_leaves_nothing(two):
    def interrupt():
        written = two.directory / "step-00000003.new" / "state.pt"
        while not (written.exists() and written.stat().st_size > 1e6):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        two.save(3, {str(i): torch.zeros(8_000_000) for i in range(8)}, RUN)
    watcher.join()
    assert names(two.directory) == ["step-00000001", "step-00000002"]

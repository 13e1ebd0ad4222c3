"""Every training stage, killed at any moment and run again, ends with the bits of one that was not.

Real processes and real SIGKILLs. `RLHF_KILLS=30 pytest -s test_resume.py` kills each stage at least
so often.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, MODEL, SAMPLING, World, change, digest, newest, run

from rlhf_core.data.prepared import read_table, write_table
from rlhf_core.errors import CheckpointError
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.rewards import ShapingSection
from rlhf_core.training.recovery import Recovery
from rlhf_core.training.session import Interrupted

KILLS = int(os.environ.get("RLHF_KILLS", "2"))  # of each stage, at least
FINISHED, STOPPED = 0, 75
SHAPED = {
    "rloo_sigmoid": change(CONFIGS["rloo"], shaping=ShapingSection(transform="sigmoid")),
    "grpo_whiten": change(CONFIGS["grpo"], shaping=ShapingSection(transform="whiten", clip=1.0)),
}
AWARE = {
    f"{name}_aware": change(CONFIGS[name], annotators="aware")
    for name in ("reward_model", "reward_model_members")
}
RESUMED = CONFIGS | SHAPED | AWARE

pytestmark = pytest.mark.timeout(600 + 60 * KILLS)


class StopsItself(MemoryLogger):
    """Sends a SIGTERM to its own process, a moment after a third of the work is done."""

    def progress(self, done, total, note=""):
        super().progress(done, total, note)
        if done == max(total // 3, 1):
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()


def attempt(config, world, folder, every_seconds, kind_of_logger=MemoryLogger):
    """One run of a stage, from its last checkpoint on; what it came to goes to `result.json`."""
    log, output = kind_of_logger(), folder / "output"
    recovery = Recovery()
    if every_seconds is not None:
        recovery = Recovery(folder / "checkpoints", every_seconds=every_seconds)
    report = run(config, world, output, logger=log, recovery=recovery)
    result = {"weights": digest(output), "history": log.history, "report": report.summary()}
    (folder / "result.new").write_text(json.dumps(result))
    (folder / "result.new").rename(folder / "result.json")


def nursery(pipe):
    """A process that has imported everything: each request is answered by a fork of it."""
    torch.set_num_threads(1)
    pipe.send("ready")
    with suppress(EOFError):
        while request := pipe.recv():
            if (child := os.fork()) == 0:
                code = 1
                try:
                    attempt(*request)
                    code = FINISHED
                except Interrupted:
                    code = STOPPED
                finally:
                    os._exit(code)
            pipe.send(child)
            pipe.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


class Runner:
    """Runs stages in processes of their own, and kills them."""

    def __init__(self, pipe):
        self.pipe = pipe

    def __call__(self, config, world, folder, *settings):
        """Run to the end; the exit code."""
        folder.mkdir(exist_ok=True)
        self.pipe.send((config, world, folder, *settings))
        self.pipe.recv()
        return self.pipe.recv()

    def killed(self, config, world, folder, *, after, in_write):
        """Kill a run after some seconds, or if asked when the next checkpoint is being written
        then; the exit code."""
        folder.mkdir(exist_ok=True)
        self.pipe.send((config, world, folder, 0))
        child = self.pipe.recv()
        done = self.pipe.poll(after)
        while in_write and not done and not list((folder / "checkpoints").glob("*.new")):
            done = self.pipe.poll(0.0002)
        if not done:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return self.pipe.recv()


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def runner():
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=nursery, args=(theirs,))
    process.start()
    assert ours.recv() == "ready"
    yield Runner(ours)
    ours.send(None)
    process.join()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.build(tmp_path_factory.mktemp("resume") / "world")


@pytest.fixture(scope="module")
def undisturbed(runner, world, tmp_path_factory):
    """What a stage comes to when nothing disturbs it and nothing is saved, and its seconds."""
    known = {}

    def find(stage):
        if stage not in known:
            start = time.monotonic()
            folder = tmp_path_factory.mktemp(stage)
            assert runner(RESUMED[stage], world, folder, None) == FINISHED
            known[stage] = result_of(folder), time.monotonic() - start
        return known[stage]

    return find


def step_in(checkpoints):
    return max((folder.name for folder in checkpoints.glob("step-????????")), default="")


def in_the_middle_of_an_iteration(checkpoints):
    iteration = newest(checkpoints)["positions"].get("iteration", {"rollout": None})
    return iteration["rollout"] is not None and len(iteration["used"]) > 0


@pytest.mark.parametrize("stage", RESUMED)
def test_killed_at_any_moment_and_run_again_gives_the_same_bits(
    runner, world, undisturbed, tmp_path, capsys, stage
):
    chance = random.Random(stage)
    expected, seconds = undisturbed(stage)
    count = Counter()
    while count["kills"] < KILLS:
        count["runs"] += 1
        folder = tmp_path / str(count["runs"])
        checkpoints = folder / "checkpoints"
        while True:
            before = step_in(checkpoints)
            moment = {"after": chance.uniform(0, seconds), "in_write": chance.random() < 0.5}
            code = runner.killed(RESUMED[stage], world, folder, **moment)
            if code == FINISHED:
                break
            assert code == -signal.SIGKILL
            count["kills"] += 1
            count["torn"] += any(checkpoints.glob("*.new"))
            if step_in(checkpoints) != before:
                count["trained"] += 1
                count["within"] += in_the_middle_of_an_iteration(checkpoints)
        assert result_of(folder) == expected
        assert len(list(checkpoints.iterdir())) <= 3  # two are kept, and one may be torn
        shutil.rmtree(folder)
    with capsys.disabled():
        print(
            f"\n{stage:13} {count['kills']:3} kills survived ({count['torn']} while a checkpoint "
            f"was written, {count['trained']} after more steps, {count['within']} of these within "
            f"an iteration), {count['runs']} runs: all bits the same"
        )


@pytest.mark.parametrize("stage", RESUMED)
def test_asked_to_stop_it_saves_where_it_is_and_goes_on_to_the_same_bits(
    runner, world, undisturbed, tmp_path, stage
):
    expected, _ = undisturbed(stage)
    config, folder, rarely = RESUMED[stage], tmp_path / "run", 3600  # only the signal saves
    assert runner(config, world, folder, rarely, StopsItself) == STOPPED
    assert len(list((folder / "checkpoints").iterdir())) == 1
    assert not (folder / "result.json").exists()
    assert runner(config, world, folder, rarely) == FINISHED
    assert result_of(folder) == expected


@pytest.fixture(scope="module")
def left_behind(world, tmp_path_factory):
    """A run of a stage with its checkpoints, once for all tests; to be copied."""
    known = {}

    def find(stage):
        if stage not in known:
            known[stage] = tmp_path_factory.mktemp(f"{stage}-done")
            attempt(CONFIGS[stage], world, known[stage], every_seconds=0)
        return known[stage]

    return find


@pytest.fixture
def again(world, left_behind, tmp_path):
    """Go on in a copy of what a run has left behind."""

    def go(stage, harm=lambda folder: None, *, world=world, config=None, **settings):
        folder = shutil.copytree(left_behind(stage), tmp_path / "again")
        harm(folder)
        recovery = Recovery(folder / "checkpoints", every_seconds=0)
        log = MemoryLogger()
        settings |= {"logger": log, "recovery": recovery}
        run(config or CONFIGS[stage], world, folder / "output", **settings)
        return {"weights": digest(folder / "output"), "history": log.history}

    return go


def torn(state):
    """Cut it in the middle."""
    os.truncate(state, state.stat().st_size // 2)


def flipped(state):
    """Change one bit of it."""
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)


@pytest.mark.parametrize("damage", [torn, flipped])
@pytest.mark.parametrize("stage", CONFIGS)
def test_where_the_newest_checkpoint_is_damaged_the_one_before_is_used(
    again, left_behind, caplog, stage, damage
):
    def harm(folder):
        if stage != "sft":
            shutil.rmtree(folder / "output")
        damage(max((folder / "checkpoints").glob("step-*")) / "state.pt")

    before = json.loads((left_behind(stage) / "result.json").read_text())
    result = json.loads(json.dumps(again(stage, harm)))
    assert "is not used" in caplog.text
    assert result == {name: before[name] for name in ("weights", "history")}


@pytest.mark.parametrize("stage", CONFIGS)
def test_another_run_is_refused_with_what_differs(again, stage):
    section = stage.removesuffix("_lora").removesuffix("_members")
    differs = rf"from another run: {section}\.weight_decay was 0\.0 and is now 0\.1\. Undo"
    with pytest.raises(CheckpointError, match=differs):
        again(stage, config=change(CONFIGS[stage], weight_decay=0.1))


def test_another_seed_is_refused(again):
    with pytest.raises(CheckpointError, match="another run: seed was 0 and is now 1"):
        again("rloo", seed=1)


def test_other_sampling_is_refused(again):
    other = change(SAMPLING, temperature=1.0)
    with pytest.raises(CheckpointError, match=r"sampling\.temperature was 0\.9 and is now 1\.0"):
        again("grpo", sampling=other)


def test_another_base_model_is_refused(again):
    fresh = change(MODEL.fresh, width=32)
    with pytest.raises(CheckpointError, match=r"model\.fresh\.width was 16 and is now 32"):
        again("sft", model=change(MODEL, fresh=fresh))


@pytest.mark.parametrize("stage", CONFIGS)
def test_other_data_are_refused(again, world, tmp_path, stage):
    data = shutil.copytree(world.data, tmp_path / "data")
    for kind in ("prompts", "demonstrations", "preferences"):
        write_table(read_table(data, kind, "train").iloc[1:], data, kind, "train")
    with pytest.raises(CheckpointError, match=r"another run: digest of data was .* and is now"):
        again(stage, world=change_world(world, data=data))


@pytest.mark.parametrize(
    ("stage", "model", "said"),
    [
        ("reward_model", "sft", "digest of sft"),
        ("dpo", "sft", "digest of sft"),
        ("rloo", "sft", "digest of sft"),
        ("ppo", "reward", "digest of reward"),
        ("ppo_lora", "reward_adapter", "digest of reward"),
        ("grpo", "reward", "digest of reward"),
    ],
)
def test_another_model_is_refused(again, world, left_behind, tmp_path, stage, model, said):
    other = (
        left_behind("dpo") / "output" if model == "sft" else left_behind("reward_model") / "output"
    )
    with pytest.raises(CheckpointError, match=f"another run: {said} was .* and is now"):
        again(stage, world=change_world(world, **{model: other}))


def test_without_its_best_weights_sft_does_not_go_on(again):
    with pytest.raises(CheckpointError, match="the best weights, of step 12, are no longer in"):
        again("sft", lambda folder: shutil.rmtree(folder / "output"))


def change_world(world: World, **parts: Path) -> World:
    return World(**vars(world) | parts)

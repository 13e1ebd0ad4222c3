"""Stages on a real Ray cluster of two nodes on this machine, and what is lost of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

sys.path += [str(Path(__file__).parents[1] / "stages"), str(Path(__file__).parent)]

import ray_nodes
import tiny

from rlhf_core.errors import ConfigError, UserError
from rlhf_core.launch import Job, launch, run
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.evaluation import EvaluationConfig
from rlhf_core.settings.judge import JudgeConfig
from rlhf_core.training.checkpoint import newest_step
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.recovery import Recovery
from rlhf_core.training.session import Interrupted
from rlhf_core.work import Work

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("RLHF_FAULTS"), reason="takes minutes: RLHF_FAULTS=1"),
    pytest.mark.skipif(not ray_nodes.RAY.exists(), reason="needs the extra `cluster`"),
    pytest.mark.timeout(900),
]
torch.set_num_threads(1)

SFT = tiny.change(tiny.CONFIGS["sft"], epochs=6, batch_size=7, micro_batch_size=2)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def environment():
    before = dict(os.environ)
    os.environ |= ray_nodes.ENVIRONMENT
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes. Ray's sockets want a short path."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        (inside := Path(folder) / "r").mkdir()
        made = ray_nodes.Nodes(inside)
        made.second = made.start()
        yield made
        made.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("world") / "data"
    tiny.write_tables(data)
    return data


def job_of(folder, stage="sft", config=SFT, inputs=None, outputs=("sft",), **settings):
    folder.mkdir(exist_ok=True)
    work = Work(
        inputs=inputs,
        outputs={kind: folder / kind for kind in outputs},
        sections={"model": tiny.MODEL, "sampling": tiny.SAMPLING, "judge": JudgeConfig()},
        recovery=Recovery(folder / "checkpoints", 0),
    )
    job = Job.of(stage, config, work, processes=2, strategy="ddp", folder=folder)
    return job.model_copy(update=settings)


class Acting(MemoryLogger):
    """Does something when a step is logged for the first time."""

    def __init__(self, step, act):
        super().__init__()
        self.step, self.act = step, act

    def metrics(self, values, step):
        super().metrics(values, step)
        if step == self.step:
            self.step = None
            self.act()


def ranks():
    """The processes of Ray that train."""
    found = []
    for process in psutil.process_iter(["cmdline", "name"]):
        with suppress(psutil.Error):
            if any("RayTrainWorker" in part for part in process.info["cmdline"] or ()):
                found.append(process)
    return found


def wait_for_no_rank(seconds=60):
    end = time.monotonic() + seconds
    while ranks() and time.monotonic() < end:
        time.sleep(0.5)
    assert ranks() == []


def values(logger):
    """The last value of each metric at each step: ranks that start again say them again."""
    return {(step, name): value for step, found in logger.history for name, value in found.items()}


@pytest.fixture(scope="module")
def elastic(data, tmp_path_factory):
    """The same stage on two processes of this machine."""
    folder = tmp_path_factory.mktemp("elastic") / "sft"
    logger = MemoryLogger()
    report = launch(job_of(folder, inputs={"data": data}), logger)
    return folder, values(logger), report


def test_equal_to_two_local_processes_to_the_bit(cluster, data, elastic, tmp_path):
    folder, history, report = elastic
    logger = MemoryLogger()
    found = launch(job_of(tmp_path / "a", inputs={"data": data}, cluster=cluster.address), logger)
    assert found.summary() == report.summary()
    assert values(logger) == history
    same(tmp_path / "a", folder)
    left = {path.name for path in (tmp_path / "a").iterdir()}
    assert left == {"checkpoints", "sft", "tokens"}
    wait_for_no_rank()


def same(one, other, kind="sft"):
    assert (one / kind / WEIGHTS).read_bytes() == (other / kind / WEIGHTS).read_bytes()


@pytest.mark.parametrize("stage", ["reward_model", "ppo"])
def test_every_training_is(cluster, data, elastic, tmp_path, stage):
    inputs = {"data": data, "sft": elastic[0] / "sft"}
    outputs = {"reward_model": ("reward",), "ppo": ("policy", "critic")}[stage]
    config = tiny.CONFIGS[stage]
    if stage == "ppo":
        made = job_of(tmp_path / "rm", "reward_model", tiny.CONFIGS["reward_model"], inputs,
                      ("reward",))  # fmt: skip
        launch(made, MemoryLogger())
        inputs |= {"reward": tmp_path / "rm" / "reward"}
    histories = []
    for name, address in (("here", ""), ("there", cluster.address)):
        logger = MemoryLogger()
        launch(job_of(tmp_path / name, stage, config, inputs, outputs, cluster=address), logger)
        histories.append({key: value for key, value in values(logger).items()
                          if "seconds" not in key[1] and "per_second" not in key[1]})  # fmt: skip
    assert histories[0] == histories[1]
    for kind in outputs:
        same(tmp_path / "here", tmp_path / "there", kind)


def test_a_rank_that_is_killed(cluster, data, elastic, tmp_path, caplog):
    logger = Acting(5, lambda: ranks()[0].kill())
    job = job_of(tmp_path / "a", inputs={"data": data}, cluster=cluster.address)
    report = launch(job, logger)
    assert report.summary() == elastic[2].summary()
    assert values(logger) == elastic[1]
    same(tmp_path / "a", elastic[0])
    assert "starting again after a lost rank (try 1 of 3)" in [what for what, *_ in logger.phases]


def test_a_node_that_is_lost_and_comes_back(cluster, data, elastic, tmp_path):
    def lose():
        cluster.kill(cluster.second)
        threading.Timer(10, lambda: setattr(cluster, "second", cluster.start())).start()

    logger = Acting(5, lose)
    job = job_of(tmp_path / "a", inputs={"data": data}, cluster=cluster.address)
    report = launch(job, logger)
    assert report.summary() == elastic[2].summary()
    same(tmp_path / "a", elastic[0])
    assert values(logger) == elastic[1]


def test_stopped_and_continued_by_one_process(cluster, data, tmp_path):
    logger = Acting(5, lambda: signal.raise_signal(signal.SIGTERM))
    long = tiny.change(SFT, epochs=60)
    job = job_of(tmp_path / "a", config=long, inputs={"data": data}, cluster=cluster.address)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM at step \d+; run again to resume"):
        launch(job, logger)
    wait_for_no_rank()
    stopped = newest_step(tmp_path / "a" / "checkpoints")
    assert 5 <= stopped < 240
    alone = MemoryLogger()
    assert run(job, alone, Ranks(), "cpu").summary()["steps"] == 240
    assert values(alone).items() >= values(logger).items()


def test_stopped_while_it_waits_for_a_place(cluster, data, tmp_path):
    job = job_of(tmp_path / "a", inputs={"data": data}, cluster=cluster.address, processes=3)
    threading.Timer(40, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        launch(job, MemoryLogger())
    assert time.monotonic() - begun < 100
    wait_for_no_rank()


SCRIPT = """
import sys
from rlhf_core.launch import Job, launch
from rlhf_core.metrics import MemoryLogger
class Loud(MemoryLogger):
    def metrics(self, values, step):
        print(step, flush=True)
launch(Job.model_validate_json(sys.argv[1]), Loud())
"""


def test_whoever_waits_is_killed(cluster, data, tmp_path):
    slow = tiny.change(SFT, epochs=400)
    job = job_of(tmp_path / "a", config=slow, inputs={"data": data}, cluster=cluster.address)
    command = [sys.executable, "-c", SCRIPT, job.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as flow:
        while int(flow.stdout.readline()) < 5:
            pass
        flow.kill()
    wait_for_no_rank(30)
    assert any((tmp_path / "a" / "checkpoints").glob("step-*"))


def test_an_error_of_the_user_is_told_once_under_its_name(cluster, data, tmp_path):
    bad = tmp_path / "data"
    shutil.copytree(data, bad)
    for table in bad.glob("demonstrations*"):
        table.unlink()
    job = job_of(tmp_path / "a", inputs={"data": bad}, cluster=cluster.address)
    logger = MemoryLogger()
    with pytest.raises(UserError, match="demonstrations"):
        launch(job, logger)
    assert not [what for what, *_ in logger.phases if "again" in what]


def test_a_bug_is_not_tried_again_and_again(cluster, data, tmp_path):
    job = job_of(tmp_path / "a", inputs={"data": data}, cluster=cluster.address,
                 cluster_retries=50)  # fmt: skip
    broken = job.model_dump(mode="json")
    broken["outputs"]["sft"] = "/proc/nowhere"
    logger = MemoryLogger()
    with pytest.raises(RuntimeError, match=r"(?s)the sft stage failed.*Traceback"):
        launch(Job.model_validate(broken), logger)
    tries = {what for what, *_ in logger.phases if "again" in what}
    # It trains before it fails, so the second try begins elsewhere; Ray may begin one more.
    assert len(tries) <= 3


def test_two_stages_at_once_take_turns(cluster, data, elastic, tmp_path):
    reports = {}

    def start(name):
        job = job_of(tmp_path / name, inputs={"data": data}, cluster=cluster.address)
        reports[name] = launch(job, MemoryLogger())

    threads = [threading.Thread(target=start, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {report.held_out_loss for report in reports.values()} == {elastic[2].held_out_loss}


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root")
def test_a_folder_that_is_not_shared(cluster, data, tmp_path):
    cluster.kill(cluster.second)
    hidden = tmp_path / "a"
    hidden.mkdir()
    hide = f'mount -t tmpfs none "{hidden}" && exec "$@"'
    alone = cluster.start(prefix=("unshare", "-m", "sh", "-c", hide, "sh"))
    try:
        job = job_of(hidden, inputs={"data": data}, cluster=cluster.address)
        with pytest.raises(ConfigError, match=r"does not see the folder .*/a; RLHF_HOME has to be"):
            launch(job, MemoryLogger())
    finally:
        cluster.kill(alone)
        cluster.second = cluster.start()


def test_one_process_and_an_evaluation(cluster, data, elastic, tmp_path):
    """What trains nothing is computed there too, by one process."""
    inputs = {"data": data, "sft": elastic[0] / "sft"}
    rewards = job_of(tmp_path / "rm", "reward_model", tiny.CONFIGS["reward_model"], inputs,
                     ("reward",), processes=1)  # fmt: skip
    run(rewards, MemoryLogger(), Ranks(), "cpu")
    inputs |= {"policy": elastic[0] / "sft", "reward": tmp_path / "rm" / "reward"}
    reports = []
    for address in ("", cluster.address):
        folder = tmp_path / ("there" if address else "here")
        job = job_of(folder, "evaluation", EvaluationConfig(prompts=4), inputs, (),
                     cluster=address, processes=1)  # fmt: skip
        report = launch(job, MemoryLogger()) if address else run(
            job, MemoryLogger(), Ranks(), "cpu")  # fmt: skip
        reports.append(json.dumps(report.summary(), sort_keys=True))
    assert reports[0] == reports[1]

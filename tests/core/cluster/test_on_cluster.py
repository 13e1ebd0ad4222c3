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
from pathlib import Path

import pytest
import torch

sys.path += [str(Path(__file__).parents[1] / "stages"), str(Path(__file__).parent)]

import ray_nodes
import tiny
from jobs import SFT, Acting, job_of, measured, same, until, values

from rlhf_core.errors import ConfigError, UserError
from rlhf_core.launch import Job, launch, run
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.evaluation import EvaluationConfig
from rlhf_core.training.checkpoint import newest_step
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.session import Interrupted

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not os.environ.get("RLHF_FAULTS"), reason="takes minutes: RLHF_FAULTS=1"),
    pytest.mark.skipif(not ray_nodes.RAY.exists(), reason="needs the extra `cluster`"),
    pytest.mark.timeout(900),
]
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def environment():
    before = dict(os.environ)
    os.environ |= ray_nodes.ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}
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
        made.wait()
        yield made
        made.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("world") / "data"
    tiny.write_tables(data)
    return data


def wait_for_no_rank(cluster, seconds=60):
    return until(lambda: not cluster.ranks(), seconds)[1]


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
    wait_for_no_rank(cluster)


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


def test_a_rank_that_is_killed(cluster, data, elastic, tmp_path):
    logger = Acting(5, lambda: cluster.ranks()[0].kill())
    job = job_of(tmp_path / "a", inputs={"data": data}, cluster=cluster.address)
    report = launch(job, logger)
    assert report.summary() == elastic[2].summary()
    assert values(logger) == elastic[1]
    same(tmp_path / "a", elastic[0])
    assert "starting again after a lost rank (try 1 of 3)" in [what for what, *_ in logger.phases]
    measured("a rank is killed", f"{logger.told()}; equal to the bit")


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
    measured("a node is lost, and one comes 10 s later", f"{logger.told()}; equal to the bit")


class Cancelling(Acting):
    """Cancels the stage once there are too few places."""

    said = 0.0

    def phase(self, what, done=0, total=0):
        super().phase(what, done, total)
        if what.startswith("waiting for 2 places") and not self.said:
            self.said = time.monotonic()
            signal.raise_signal(signal.SIGTERM)


def test_a_node_that_is_lost_for_good(cluster, data, elastic, tmp_path, caplog):
    """It is said, and the run that is cancelled goes on with the processes that are left."""
    logger = Cancelling(5, lambda: cluster.kill(cluster.second))
    job = job_of(tmp_path / "a", inputs={"data": data}, cluster=cluster.address)
    try:
        with pytest.raises(Interrupted, match="by SIGTERM while no rank was at work"):
            launch(job, logger)
        said, ended = logger.said - logger.acted, time.monotonic() - logger.said
        assert ("waiting for 2 places; the cluster has 1 place", 0, 0) in logger.phases
        assert (
            "waiting for 2 places; the cluster has 1 place. It goes on when a machine joins; or "
            "cancel, and resume with RLHF_PROCESSES=1" in caplog.messages
        )
        kept = newest_step(tmp_path / "a" / "checkpoints")
        assert 5 <= kept < 24
        fewer = MemoryLogger()
        report = launch(job.model_copy(update={"processes": 1}), fewer)
    finally:
        cluster.second = cluster.start()
    end = f"said after {said:.0f} s, ended {ended:.0f} s after it was cancelled"
    measured("a node is lost for good", f"{end}; goes on with one process, equal up to rounding")
    after, before = values(fewer), elastic[1]
    assert after.keys() == before.keys()
    assert {key: after[key] for key in after if key[0] <= kept} == {
        key: before[key] for key in before if key[0] <= kept
    }
    assert report.held_out_loss == pytest.approx(elastic[2].held_out_loss, rel=1e-4)


def test_stopped_and_continued_by_one_process(cluster, data, tmp_path):
    logger = Acting(5, lambda: signal.raise_signal(signal.SIGTERM))
    long = tiny.change(SFT, epochs=60)
    job = job_of(tmp_path / "a", config=long, inputs={"data": data}, cluster=cluster.address)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM at step \d+; run again to resume"):
        launch(job, logger)
    ended = time.monotonic() - logger.acted
    gone = ended + wait_for_no_rank(cluster)
    measured("cancelled", f"ended after {ended:.0f} s, no rank left after {gone:.0f} s")
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
    measured("cancelled while it waits", f"ended after {time.monotonic() - begun - 40:.0f} s")
    wait_for_no_rank(cluster)


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
    gone = wait_for_no_rank(cluster, 30)
    measured("the process of the flow is killed", f"no rank left after {gone:.0f} s")
    assert any((tmp_path / "a" / "checkpoints").glob("step-*"))


def test_an_error_of_the_user_is_told_once_under_its_name(cluster, data, tmp_path):
    bad = tmp_path / "data"
    shutil.copytree(data, bad)
    for table in bad.glob("demonstrations*"):
        table.unlink()
    job = job_of(tmp_path / "a", inputs={"data": bad}, cluster=cluster.address)
    logger = MemoryLogger()
    begun = time.monotonic()
    with pytest.raises(UserError, match="demonstrations"):
        launch(job, logger)
    measured("an error of the user", f"told {time.monotonic() - begun:.0f} s after the start, once")
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
    # It trains before it fails, so the second try begins elsewhere; the last step that was told may
    # be another in each try, and Ray may begin one more.
    assert len(tries) <= 5
    measured("a bug", f"given up after {len(tries) + 1} tries")


def test_two_stages_at_once_take_turns(cluster, data, elastic, tmp_path):
    reports = {}

    def start(name):
        job = job_of(tmp_path / name, inputs={"data": data}, cluster=cluster.address)
        reports[name] = launch(job, MemoryLogger())

    threads = [threading.Thread(target=start, args=(name,)) for name in ("a", "b")]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    measured("two stages at once", f"both done after {time.monotonic() - begun:.0f} s, in turn")
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
        begun = time.monotonic()
        with pytest.raises(ConfigError, match=r"does not see the folder .*/a; RLHF_HOME has to be"):
            launch(job, MemoryLogger())
        told = time.monotonic() - begun
        measured("a folder that is not shared", f"told {told:.0f} s after the start")
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


def test_the_head_is_lost_and_comes_back(data, elastic, tmp_path):
    """Ray does not outlive its head; the stage ends, and is resumed on the next one."""
    with ray_nodes.nodes() as first:
        logger = Acting(5, lambda: first.kill(first.head))
        job = job_of(tmp_path / "a", inputs={"data": data}, cluster=first.address)
        with pytest.raises(RuntimeError, match="the sft stage failed"):
            launch(job, logger)
        ended = time.monotonic() - logger.acted
        gone = ended + wait_for_no_rank(first)
    assert 5 <= newest_step(tmp_path / "a" / "checkpoints") < 24
    with ray_nodes.nodes() as second:
        report = launch(job.model_copy(update={"cluster": second.address}), logger)
    assert report.summary() == elastic[2].summary()
    assert values(logger) == elastic[1]
    same(tmp_path / "a", elastic[0])
    measured("the head is lost", f"the stage fails after {ended:.0f} s, no rank left after "
             f"{gone:.0f} s; resumed on another cluster equal to the bit")  # fmt: skip

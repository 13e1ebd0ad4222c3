"""What is said of a stage on a cluster, from the letters of its ranks; without a cluster."""

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_core.cluster.follow import Following
from rlhf_core.cluster.mailbox import Mailbox
from rlhf_core.cluster.places import places
from rlhf_core.cluster.sameness import Sameness
from rlhf_core.errors import CheckpointError, ConfigError, DataError, RefusedError
from rlhf_core.launch import Job, _forward, launch
from rlhf_core.metrics import MemoryLogger
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.session import Interrupted

JOB = Job(stage="sft", seed=0, processes=2, cluster="127.0.0.1:1", cluster_retries=2)

OF_RAY = (
    "A worker health check failed. Worker info: Worker( actor=Actor(RayTrainWorker, 0cd138f3), "
    "metadata=ActorMetadata( hostname='node-b', node_id='65884a99', node_ip='10.77.0.2', pid=7, "
    "accelerator_ids={'GPU': []}, ), ) The actor died unexpectedly before finishing this task. "
    "class_name: RayTrainWorker actor_id: 0cd138f3 The actor died because its node has died. Node "
    "Id: 65884a99 the actor's node was terminated unexpectedly: health check failed."
)


@pytest.fixture
def written():
    return []


@pytest.fixture
def following(written):
    return Following(JOB, written.append)


def outcome(following, *, over=False, error="", grace=60.0):
    return following.outcome(over, error, grace)


def test_letters_come_in_the_order_of_their_sender_and_once():
    box = Mailbox()
    box.tell({"step": 1})
    box.tell({"step": 2})
    assert box.take() == [{"step": 1}, {"step": 2}]
    assert box.take() == []
    assert not box.stopping()
    box.stop()
    assert box.stopping()


def test_what_a_logger_would_get_is_passed_on(following, written):
    waiting = written.pop()
    assert waiting["phase"] == "waiting for 2 free places on the cluster"
    letters = [{"metrics": {"loss": 1.0}, "step": 3}, {"done": 1, "total": 2, "note": ""}]
    for letter in ({"began": 0}, *letters):
        following.read(letter)
    assert written == letters
    assert outcome(following) is None
    following.read({"report": b"all"})
    assert outcome(following) == b"all"


def test_an_error_of_the_user_comes_before_what_it_caused(following):
    following.read({"began": 0})
    following.read({"failed": "Interrupted", "message": "the others stopped"})
    following.read({"failed": "DataError", "message": "row 3 is empty"})
    following.read({"failed": "ConfigError", "message": "later"})
    with pytest.raises(DataError, match="row 3 is empty"):
        outcome(following, over=True)


@pytest.mark.parametrize("kind", [RefusedError, CheckpointError])
def test_an_error_keeps_its_kind_also_a_kind_of_a_kind(following, kind):
    following.read({"failed": kind.__name__, "message": "no"})
    with pytest.raises(kind, match="no"):
        outcome(following, over=True)


def test_ranks_that_hang_after_a_failure_are_not_waited_for(following, monkeypatch):
    following.read({"failed": "DataError", "message": "row 3 is empty"})
    assert outcome(following) is None  # Ray may still end them
    monkeypatch.setattr("rlhf_core.cluster.follow.LAST_WORDS_SECONDS", 0.0)
    with pytest.raises(DataError):
        outcome(following)


def test_a_lost_rank_is_said_and_counted(following, written):
    following.read({"began": 0})
    following.read({"lost": {0: f"{'x' * 300}", 1: OF_RAY}})
    assert written[-2] == {
        "warning": f"lost on the cluster: rank 0 ({'x' * 200}), rank 1 (on node-b: The actor died "
        "because its node has died); starting again (try 1 of 2)"
    }
    assert written[-1]["phase"] == "starting again after a lost rank (try 1 of 2)"
    following.read({"began": 7})
    assert outcome(following) is None
    with pytest.raises(RuntimeError, match="failed on the cluster\n\nworkers died"):
        outcome(following, over=True, error="workers died")


def test_an_error_that_comes_again_without_progress_is_a_bug(following):
    text = "Traceback ...\nZeroDivisionError: division by zero\n"
    following.read({"began": 4})
    for _ in range(2):  # both ranks of a try
        following.read({"error": text})
    following.read({"lost": {0: "it raised", 1: "it raised"}})
    assert outcome(following) is None
    following.read({"began": 9})  # there was progress: perhaps a broken link
    following.read({"error": text})
    following.read({"lost": {0: "it raised"}})
    assert outcome(following) is None
    following.read({"began": 9})
    following.read({"error": text})
    with pytest.raises(RuntimeError, match=r"the sft stage failed\n\nTraceback(.|\n)*by zero"):
        outcome(following, over=True)


def test_stopped_while_no_rank_is_at_work(following):
    following.stop("SIGTERM")
    with pytest.raises(Interrupted, match="by SIGTERM while no rank was at work; run again"):
        outcome(following)


def test_stopped_ranks_get_time_for_a_checkpoint(following):
    following.read({"began": 0})
    following.stop("SIGINT")
    assert outcome(following) is None
    with pytest.raises(Interrupted, match="its ranks did not answer"):
        outcome(following, grace=0.0)
    following.read({"failed": "Interrupted", "message": "stopped by SIGTERM at step 7"})
    with pytest.raises(Interrupted, match="at step 7"):
        outcome(following, over=True)


def test_too_few_places_are_said_once_until_there_are_enough(following, written):
    following.room(2)
    assert len(written) == 1  # it waits, but not for a machine
    following.room(1)
    following.room(1)
    phase, warning = written[1:]
    assert phase["phase"] == "waiting for 2 places; the cluster has 1 place"
    assert warning["warning"] == (
        "waiting for 2 places; the cluster has 1 place. It goes on when a machine joins; "
        "or cancel, and resume with RLHF_PROCESSES=1"
    )
    following.room(3)
    assert written[3:] == written[:1]
    following.read({"began": 4})
    following.room(0)  # ranks that are at work will say so themselves
    following.read({"lost": {0: "its node has died"}})
    del written[:]
    following.room(0)
    assert written[0]["phase"] == "waiting for 2 places; the cluster has none"
    assert written[1]["warning"].endswith("has none. It goes on when a machine joins")
    following.stop("SIGTERM")
    following.room(2)
    assert len(written) == 2


def test_places_are_counted_by_machine():
    """A process is on one machine, with all that it takes: 3 + 0 + 1 of them."""
    machines = [
        {"Alive": True, "Resources": {"CPU": 7.0, "GPU": 8.0, "memory": 1e9}},
        {"Alive": True, "Resources": {"CPU": 64.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
        {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}},
    ]
    assert places(machines, {"CPU": 2.0, "GPU": 1.0}) == 4
    assert places(machines, {"CPU": 2.0}) == 3 + 32 + 1
    assert places([], {"CPU": 1.0}) == 0


def test_a_warning_of_the_ranks_is_one_of_the_flow(caplog):
    """So that Prefect, which hears of this process alone, shows it."""
    _forward(MemoryLogger(), {"warning": "rank 1: slow"})
    assert [(each.name, each.message) for each in caplog.records] == [
        ("rlhf_core.launch", "rank 1: slow")
    ]


def test_a_stop_that_comes_while_lost_ranks_are_started(following):
    following.read({"began": 0})
    following.read({"lost": {0: "gone"}})
    following.stop("SIGTERM")
    with pytest.raises(Interrupted, match="no rank was at work"):
        outcome(following)


def test_machines_have_to_be_the_same(tmp_path):
    with Sameness.of(tmp_path / "work") as sameness:
        assert sameness.fault() == ""
        sameness.require(Ranks())
        others = replace(sameness, releases={**sameness.releases, "torch": "2.12.0"})
        with pytest.raises(
            ConfigError, match=r"has torch .*, and the one that started .* 2\.12\.0"
        ):
            others.require(Ranks())
    assert list((tmp_path / "work").iterdir()) == []
    with pytest.raises(ConfigError, match=r"does not see the folder .*work; RLHF_HOME has to be"):
        sameness.require(Ranks())


def test_ray_is_not_imported_without_a_cluster():
    code = "import sys, rlhf_core.launch, tasks.record.stage; print('ray' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_no_cluster_is_said_at_once(tmp_path):
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError:
        said = r"RLHF_CLUSTER is set, but ray is not installed; pip install .*\[cluster\]"
    else:
        said = r"no Ray cluster answers at 127\.0\.0\.1:\d+ .*ray start --head"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        job = JOB.model_copy(update={"cluster": address, "folder": Path(tmp_path)})
        with pytest.raises(ConfigError, match=said):
            launch(job, MemoryLogger())

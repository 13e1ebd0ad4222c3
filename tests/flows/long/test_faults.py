"""What breaks while a pipeline runs, and what is there afterwards: one complete, single result.

Real servers, a real worker, real signals: minutes each, so they run with RLHF_FAULTS=1 alone.
docs/operations.md has the table; tests/tasks/record/test_training.py kills trainings in CI.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import histories
import pytest
import yaml
from servers import Servers, wait_until

TINY = Path(__file__).parents[1] / "tiny.yaml"
# Long enough to be hit in the middle.
LONGER = {
    "sft": {"epochs": 6, "max_length": 80},
    "reward_model": {"epochs": 6, "max_length": 80, "normalization_samples": 32},
    "ppo": {"iterations": 20, "rollout_size": 16, "batch_size": 8, "epochs": 2},
}
STAGES = ["sft", "reward_model", "ppo", "evaluation"]
pytestmark = [pytest.mark.integration, pytest.mark.faults, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def config():
    return {**yaml.safe_load(TINY.read_text()), **LONGER}


@pytest.fixture(scope="module")
def servers(tmp_path_factory, config):
    """Prefect, MLflow, a worker, and one deployment."""
    folder = tmp_path_factory.mktemp("faults")
    running = Servers(folder)
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny.yaml").write_text(yaml.safe_dump(config))
    try:
        for name in ("prefect", "mlflow"):
            running.start(name)
        running.rlhf("deploy", folder / "configs")
        running.start("worker")
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory, config):
    """The digests of the models, and the metric history, of runs that nothing disturbed."""
    known = {}

    def get(seed):
        if seed not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            (folder / "tiny.yaml").write_text(yaml.safe_dump({**config, "seed": seed}))
            home = {"RLHF_HOME": str(folder / "home")}
            done = subprocess.run(
                [sys.executable, "-m", "flows", "run", str(folder / "tiny.yaml")],
                env={**os.environ, **home},
                capture_output=True,
                text=True,
                timeout=400,
            )
            assert done.returncode == 0, done.stderr
            known[seed] = result(folder / "home", seed)
        return known[seed]

    return get


def result(home, seed):
    """Digests of the versions, and every value of every curve, of the pipeline of a seed."""
    return histories.digests(home, seed), histories.curves(home, seed)


def whole(servers, seed, expected):
    """Each stage once, nothing running, nothing doubled, and the very numbers."""
    runs = servers.rows(
        "select r.name, r.status from runs r join params p on p.run_uuid = r.run_uuid "
        f"where p.key = 'seed' and p.value = '{seed}'"
    )
    assert {status for _, status in runs} == {"FINISHED"}, runs
    names = sorted(name.partition("-seed")[0] for name, _ in runs if "-seed" in name)
    assert [n for n in names if n in STAGES] == sorted(STAGES)
    assert histories.doubled(servers.home) == []
    assert servers.rows("select name from runs where status = 'RUNNING'") == []
    digests, curves = result(servers.home, seed)
    assert [name for name, _ in digests] == [
        "tiny-critic",
        "tiny-policy",
        "tiny-reward",
        "tiny-sft",
    ]
    assert digests == expected[0]
    assert curves == expected[1]


def start(servers, config, seed):
    return servers.trigger("rlhf/tiny", {"config": {**config, "seed": seed}})


def name_of(servers, flow_run):
    return servers.rows(
        "select run_uuid from tags where key = 'prefect.flow_run_id' and "
        f"value = '{flow_run}' and run_uuid in "
        "(select run_uuid from tags where key = 'stage' and value = 'pipeline')"
    )[0][0]


def kill_in(servers, flow_run, stage):
    """SIGKILL to the process of a flow run in a stage; Prefect's worker reports the crash."""
    servers.in_stage(stage)
    process = servers.flow_process()
    process.send_signal(signal.SIGKILL)
    servers.until(flow_run, "Crashed")


def test_a_killed_flow_goes_on_when_it_is_resumed_at_once(servers, config, expected):
    flow_run = start(servers, config, 11)
    kill_in(servers, flow_run, "ppo")
    said = servers.rlhf("resume", name_of(servers, flow_run))
    assert "returned to the workers" in said
    servers.until(flow_run, "Completed")
    whole(servers, 11, expected(11))
    tasks = servers.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}})
    cached = {task["name"] for task in tasks if task["state_name"] == "Cached"}
    assert cached >= {"prepare data", "SFT", "reward model"}


def test_killed_in_each_stage(servers, config, expected):
    flow_run = start(servers, config, 12)
    for stage in STAGES:
        kill_in(servers, flow_run, stage)
        servers.rlhf("resume", name_of(servers, flow_run))
    servers.until(flow_run, "Completed")
    whole(servers, 12, expected(12))


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_worker_and_flow_are_killed_together(servers, config, expected, stage):
    seed = 13 + STAGES.index(stage)
    flow_run = start(servers, config, seed)
    servers.in_stage(stage)
    servers.kill("worker")
    assert servers.state(flow_run) == "Running"
    servers.until(flow_run, "Crashed", seconds=240)  # its heartbeats are missed
    servers.start("worker")
    servers.rlhf("resume", name_of(servers, flow_run))
    servers.until(flow_run, "Completed")
    whole(servers, seed, expected(seed))


@pytest.mark.parametrize("seconds", [5, 60])
def test_the_prefect_server_is_restarted(servers, config, expected, seconds):
    flow_run = start(servers, config, 20 + seconds)
    servers.in_stage("sft")
    servers.kill("prefect")
    time.sleep(seconds)
    servers.start("prefect")
    end = servers.until(flow_run, "Completed", "Crashed", "Failed", seconds=400)
    if end != "Completed":
        servers.rlhf("resume", name_of(servers, flow_run))
        servers.until(flow_run, "Completed")
    whole(servers, 20 + seconds, expected(20 + seconds))


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_mlflow_is_away_for_two_minutes(servers, config, expected, stage):
    seed = 30 + STAGES.index(stage)
    flow_run = start(servers, config, seed)
    servers.in_stage(stage)
    servers.kill("mlflow")
    time.sleep(120)
    servers.start("mlflow")
    servers.until(flow_run, "Completed", seconds=600)
    whole(servers, seed, expected(seed))


def test_the_same_is_triggered_twice_at_once(servers, config, expected):
    both = [start(servers, config, 40) for _ in "ab"]
    for flow_run in both:
        servers.until(flow_run, "Completed", seconds=600)
    assert result(servers.home, 40)[0] == expected(40)[0]  # each model once
    assert servers.rows("select name from runs where status = 'RUNNING'") == []


def test_cancelling_stops_within_seconds_and_can_go_on(servers, config, expected):
    flow_run = start(servers, config, 51)
    servers.in_stage("ppo")
    process = servers.flow_process()
    begun = time.monotonic()
    servers.ask(f"/flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING"}})
    wait_until(lambda: not process.is_running(), 30)
    assert time.monotonic() - begun < 20
    servers.until(flow_run, "Cancelled")
    run = name_of(servers, flow_run)
    killed = servers.rows(
        "select r.name from runs r join params p on p.run_uuid = r.run_uuid "
        "where r.status = 'KILLED' and p.key = 'seed' and p.value = '51'"
    )
    assert {name for (name,) in killed} == {"ppo-seed-51", servers.name(flow_run)}
    servers.rlhf("resume", run)
    servers.until(flow_run, "Completed")
    whole(servers, 51, expected(51))


def test_the_disk_is_full_while_checkpoints_are_written(servers, config, expected, tmp_path):
    """No file may grow beyond 100 kB for a while: smaller than a checkpoint, larger than a log."""
    flow_run = start(servers, config, 61)
    servers.in_stage("ppo")
    process = servers.flow_process()
    process.rlimit(1, (100_000, -1))  # RLIMIT_FSIZE, the soft limit
    time.sleep(3)
    process.rlimit(1, (-1, -1))
    end = servers.until(flow_run, "Completed", "Failed", "Crashed", seconds=400)
    if end != "Completed":
        servers.rlhf("resume", name_of(servers, flow_run))
        servers.until(flow_run, "Completed")
    whole(servers, 61, expected(61))

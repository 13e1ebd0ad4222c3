"""A deployment whose worker has RLHF_CLUSTER: real Prefect, MLflow, worker, and Ray."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import histories
import pytest
import ray_nodes
import yaml
from servers import Servers, wait_until

TINY = Path(__file__).parents[1] / "tiny.yaml"
LONGER = {  # long enough to be hit in the middle
    "sft": {"epochs": 4, "max_length": 80},
    "ppo": {"iterations": 30, "rollout_size": 16, "batch_size": 8, "epochs": 2},
}
SLOW = 900  # s; a stage on a cluster takes a minute to start on a busy machine
STAGES = ["sft", "reward_model", "ppo", "evaluation"]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.integration,
    pytest.mark.faults,
    pytest.mark.skipif(not ray_nodes.RAY.exists(), reason="needs the extra `cluster`"),
    pytest.mark.timeout(2400),
]


@pytest.fixture(scope="module")
def config():
    return {**yaml.safe_load(TINY.read_text()), **LONGER}


@pytest.fixture(scope="module")
def expected(tmp_path_factory, config):
    """Digests and curves of a pipeline by two processes of this machine, without a cluster."""

    def get(seed):
        folder = tmp_path_factory.mktemp("here")
        (folder / "tiny.yaml").write_text(yaml.safe_dump({**config, "seed": seed}))
        given = {"RLHF_HOME": str(folder / "home"), "RLHF_PROCESSES": "2", "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "-P", "-m", "flows", "run", str(folder / "tiny.yaml")],
            env={**os.environ, **given},
            capture_output=True,
            check=True,
        )
        return of(folder / "home", seed)

    return get


@pytest.fixture(scope="module")
def cluster():
    with ray_nodes.nodes() as made:
        yield made


@pytest.fixture(scope="module")
def servers(tmp_path_factory, config, cluster):
    """Prefect, MLflow, a worker that uses the cluster, and one deployment."""
    folder = tmp_path_factory.mktemp("there")
    running = Servers(
        folder,
        RLHF_CLUSTER=cluster.address,
        RLHF_PROCESSES="2",
        OMP_NUM_THREADS="1",
        **cluster.environment,
    )
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


def of(home, seed):
    """Digests and curves; those of a stage have its seed in the name of its run."""
    found = histories.curves(home, seed)
    return histories.digests(home, seed), {
        stage: [row[1:] for row in found if row[0].startswith(f"{stage}-seed-")] for stage in STAGES
    }


def start(servers, config, **changes):
    return servers.trigger("rlhf/tiny", {"config": {**config, **changes}})


def pipeline(servers, flow_run):
    return servers.rows(
        "select run_uuid from tags where key = 'prefect.flow_run_id' and "
        f"value = '{flow_run}' and run_uuid in "
        "(select run_uuid from tags where key = 'stage' and value = 'pipeline')"
    )[0][0]


def logs(servers, flow_run):
    wanted = {"logs": {"flow_run_id": {"any_": [flow_run]}}, "limit": 200}
    return [each["message"] for each in servers.ask("/logs/filter", wanted)]


def lose_a_rank(servers, cluster, flow_run, stage, times):
    """Kill a rank in a stage, and return when Prefect's log says that it starts again."""
    servers.in_stage(stage, SLOW)
    wait_until(lambda: servers.steps(stage) > 5, SLOW)
    cluster.ranks()[0].kill()
    killed, again = time.monotonic(), "starting again (try 1 of 3)"
    wait_until(lambda: sum(again in line for line in logs(servers, flow_run)) == times, SLOW)
    print(f"\n{stage}: a killed rank is in Prefect's log {time.monotonic() - killed:.0f} s later")


def equal(servers, seed, expected):
    """Models and metrics are those of two local processes to the bit, and none is there twice."""
    assert histories.doubled(servers.home) == []
    (digests, curves), before = of(servers.home, seed), expected(seed)
    assert [name for name, _ in digests] == [
        "tiny-critic",
        "tiny-policy",
        "tiny-reward",
        "tiny-sft",
    ]
    assert digests == before[0]
    for stage in STAGES:
        assert curves[stage] == before[1][stage]
        print(f"{stage}: {len(curves[stage])} values of metrics are equal to the bit")
        assert curves[stage]


def test_a_run_in_which_ranks_are_lost(servers, cluster, config, expected):
    """What ranks that start again say again is in MLflow once."""
    flow_run = start(servers, config)
    lose_a_rank(servers, cluster, flow_run, "sft", 1)
    lose_a_rank(servers, cluster, flow_run, "ppo", 2)
    servers.until(flow_run, "Completed", seconds=SLOW)
    equal(servers, 0, expected)


def test_cancelled_in_prefect_and_resumed(servers, cluster, config, expected):
    flow_run = start(servers, config, seed=1)
    servers.in_stage("ppo", SLOW)
    wait_until(lambda: servers.steps("ppo") > 5, SLOW)
    process, begun = servers.flow_process(), time.monotonic()
    servers.ask(f"/flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING"}})
    wait_until(lambda: not process.is_running(), 120)
    print(f"\ncancelled: the flow ended after {time.monotonic() - begun:.0f} s")
    wait_until(lambda: not cluster.ranks(), 60)
    print(f"cancelled: no rank is left after {time.monotonic() - begun:.0f} s")
    servers.until(flow_run, "Cancelled")
    (kept,) = servers.home.glob("work/ppo-*/checkpoints")
    assert list(kept.glob("step-*[0-9]"))
    servers.rlhf("resume", pipeline(servers, flow_run))
    servers.until(flow_run, "Completed", seconds=SLOW)
    equal(servers, 1, expected)


def test_a_node_lost_for_good_is_said_in_prefect_and_one_process_goes_on(servers, cluster, config):
    flow_run = start(servers, config, seed=2)
    servers.in_stage("sft", SLOW)
    cluster.kill(cluster.others.pop())
    lost = time.monotonic()
    said = "the cluster has 1 place. It goes on when a machine joins; or cancel, and resume with"
    wait_until(lambda: any(said in line for line in logs(servers, flow_run)), SLOW)
    print(f"\nlost for good: in Prefect's log after {time.monotonic() - lost:.0f} s")
    waits = "waiting for 2 places; the cluster has 1 place"
    wait_until(lambda: waits in str(servers.ask("/artifacts/latest/filter", {"limit": 200})), 60)
    servers.ask(f"/flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING"}})
    servers.until(flow_run, "Cancelled")
    os.kill(servers.running["worker"].pid, signal.SIGTERM)
    servers.running.pop("worker").wait(60)
    servers.clients["RLHF_PROCESSES"] = "1"
    servers.start("worker")
    servers.rlhf("resume", pipeline(servers, flow_run))
    servers.until(flow_run, "Completed", seconds=SLOW)
    assert histories.doubled(servers.home) == []
    assert len(histories.digests(servers.home, 2)) == 4

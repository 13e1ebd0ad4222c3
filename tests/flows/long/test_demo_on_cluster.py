"""The whole demonstration on a Ray cluster, and the same by two processes of this machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray_nodes
from histories import curves, digests, rows

ROOT = Path(__file__).parents[3]
SEED = 0
STAGES = ["prepare", "sft", "reward_model", "report_card", "ppo", "evaluation"]
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.faults,
    pytest.mark.skipif(not ray_nodes.RAY.exists(), reason="needs the extra `cluster`"),
    pytest.mark.timeout(3600),
]


def run(home, **variables):
    """What `rlhf run` says, with two processes for each training."""
    given = {"RLHF_HOME": str(home), "RLHF_PROCESSES": "2", "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "flows", "run", str(ROOT / "configs" / "demo.yaml")],
        env={**os.environ, **given, **variables},
        cwd=home.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"\n{home.name}: {time.monotonic() - begun:.0f} s for `rlhf run configs/demo.yaml`")
    took = "select name, (end_time - start_time) / 1000 from runs where name like '%-seed-%'"
    print(*(f"  {name}: {seconds} s\n" for name, seconds in rows(home, took)), sep="", end="")
    return done.stdout + done.stderr


def test_the_demonstration_is_the_same_on_a_cluster(tmp_path):
    run(here := tmp_path / "here")
    with ray_nodes.nodes() as cluster:
        said = run(there := tmp_path / "there", RLHF_CLUSTER=cluster.address)
    for stage in ("sft", "reward_model", "ppo"):
        assert f"{stage}: waiting for 2 free places on the cluster" in said
    for stage in ("report_card", "evaluation"):
        assert f"{stage}: waiting for 1 free place on the cluster" in said
    models = digests(there, SEED)
    assert [name for name, _ in models] == ["demo-critic", "demo-policy", "demo-reward", "demo-sft"]
    assert models == digests(here, SEED)
    expected = curves(here, SEED)
    for stage in STAGES[1:]:
        mine = [row for row in curves(there, SEED) if row[0].startswith(stage)]
        assert mine == [row for row in expected if row[0].startswith(stage)]
        print(f"{stage}: {len(mine)} values of metrics are equal to the bit")
        assert mine
    for home in (here, there):
        promoted = "select alias, name from registered_model_aliases"
        assert ("champion", "demo-policy") in rows(home, promoted)

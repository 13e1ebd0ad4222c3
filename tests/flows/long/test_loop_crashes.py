"""A round of the loop that is killed at every task and goes on (RLHF_FAULTS=1): nothing is doubled.

One flow run is killed at a place after the other, each time by SIGKILL in a process of its own, and
begun again as `rlhf resume` has it begun. In the end there is what an undisturbed round leaves.
"""

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from prefect.states import AwaitingRetry

from flows.retrain import RetrainConfig, retrain
from tasks.feedback.asking.starting import start_ready
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import Batch, BatchPair, Judgment, Pair, Response, Snapshot
from tasks.record import tags
from tests.flows.people import invited, label
from tests.flows.rounds import LENIENT, asked, cast, loop

DYING = Path(__file__).parents[1] / "dying.py"
STEPS = "tasks.steps"
# In the order in which a round comes by them.
PLACES = [
    ("flows.retrain:count_preferences", "before"),
    ("flows.retrain:count_preferences", "after"),
    (f"{STEPS}.data:pin", "before"),
    (f"{STEPS}.data:pin", "after"),  # the snapshot is pinned
    (f"{STEPS}.data:do_stage", "after"),
    (f"{STEPS}.sft:do_stage", "after"),
    (f"{STEPS}.reward_model:do_stage", "after"),
    (f"{STEPS}.report_card:do_stage", "after"),
    (f"{STEPS}.policy:do_stage", "after"),
    (f"{STEPS}.evaluation:do_stage", "before"),
    (f"{STEPS}.evaluation:do_stage", "after"),
    (f"{STEPS}.promotion:crown", "before"),
    (f"{STEPS}.promotion:crown", "after"),  # the alias is moved, and it was not noted
    ("flows.retrain:ask_again", "before"),  # promoted, and nobody asked
    ("tasks.feedback.asking.batches:keep", "after"),  # asked about the first few prompts
    ("tasks.feedback.asking.again:link_to", "before"),  # asked, and not told
    ("flows.retrain:ask_again", "after"),
]
pytestmark = [pytest.mark.integration, pytest.mark.faults, pytest.mark.timeout(6000)]


def test_a_round_that_is_killed_at_every_task_leaves_nothing_twice(
    shared_home, tiny, tmp_path, prefect_server
):
    content = loop(tiny, "torn", rounds=5)
    content["ask"]["prompts"] = 20  # two times a few
    content["pipeline"]["promotion"] = {**LENIENT, "min_win_rate_over_champion": 0.0}
    config = RetrainConfig.model_validate(content).model_dump(mode="json")
    store = Store.open(shared_home)
    project = store.project("torn", make=True)
    cast(project, range(80))
    with get_client(sync_client=True) as prefect:
        deployment = prefect.create_deployment(
            prefect.create_flow(retrain),
            "torn",
            entrypoint="flows.retrain:retrain",
            parameters={"config": config},
        )

        def begin(flow_run, *place):
            environment = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
            return subprocess.run(
                [sys.executable, "-P", str(DYING), flow_run, *place],
                env={**environment, "PYTHONPATH": str(Path(__file__).parents[3])},
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )

        first = str(prefect.create_flow_run_from_deployment(deployment).id)
        done = begin(first)
        assert done.returncode == 0, done.stderr
        label(project, invited(store, project))
        cast(project, range(80, 100))
        assert len(start_ready(store)) == 1
        second = next(run for _, _, run in asked(store, "torn") if run)
        died = []
        for place, when in PLACES:
            done = begin(second, place, when)
            assert done.returncode == -signal.SIGKILL, (place, when, done.stderr[-3000:])
            died.append(place)
            cast(project, [200 + len(died)])  # votes come in meanwhile
            prefect.set_flow_run_state(second, AwaitingRetry(), force=True)
        done = begin(second)
        assert done.returncode == 0, done.stderr
        assert prefect.read_flow_run(second).state.is_completed()
        assert start_ready(store) == []

    mlflow = MlflowClient(tracking_uri=shared_home.mlflow_uri)
    experiment = mlflow.get_experiment_by_name("torn").experiment_id
    runs = mlflow.search_runs([experiment], max_results=1000)
    mine = f"tags.`{tags.CALLER}` = '{second}'"
    (pipeline,) = mlflow.search_runs([experiment], mine)
    stages = Counter(
        run.data.tags[tags.STAGE]
        for run in runs
        if run.data.tags.get(tags.PARENT_RUN) == pipeline.info.run_id
        and run.info.status == "FINISHED"
    )
    assert stages == dict.fromkeys(
        ("prepare", "sft", "reward_model", "report_card", "ppo", "evaluation", "promotion"), 1
    )
    # A promotion that was killed is a run that says so; it is not resumed but done again.
    killed = [run.data.tags[tags.STAGE] for run in runs if run.info.status != "FINISHED"]
    assert killed == ["promotion", "promotion"]
    for kind in ("sft", "reward", "policy", "critic"):
        assert len(mlflow.search_model_versions(f"name = 'torn-{kind}'")) == 2
    # One promotion, of the second over the first, and one look at the first.
    champion = mlflow.get_model_version_by_alias("torn-policy", "champion")
    assert int(champion.version) == 2
    assert champion.tags[tags.REPLACED] == "models:/torn-policy/1"
    assert pipeline.data.tags[tags.COMPARED_WITH] == "models:/torn-policy/1"
    looks = tags.looks(mlflow.get_model_version("torn-policy", "1").tags)
    assert len(looks) == 1, looks

    with store.database.reading() as session:
        snapshots = session.query(Snapshot).order_by(Snapshot.id).all()
        assert len(snapshots) == 2
        assert pipeline.data.tags[tags.SNAPSHOT].endswith(snapshots[1].digest)
        one, two = session.query(Batch).filter_by(project_id=project.id, kind="ask").all()
        assert two.details["round"] == 2
        assert two.details["policy"] == "models:/torn-policy/2"
        assert two.details["asked"]
        pairs = [row.pair_id for row in session.query(BatchPair).filter_by(batch_id=two.id)]
        assert len(pairs) == len(set(pairs)) > 0
        texts = session.query(Response).filter_by(model="models:/torn-policy/2").count()
        assert 0 < texts <= 2 * content["ask"]["prompts"]
        fresh = session.query(Judgment.pair_id, Judgment.annotator_id)
        votes = fresh.filter(Judgment.kind != "repeat").all()
        assert len(votes) == len(set(votes))
        assert session.query(Pair).count() == 80 + 20 + len(PLACES) + len(pairs) + sum(
            1 for _ in session.query(BatchPair).filter_by(batch_id=one.id)
        )
    store.close()

"""Events reach the Prefect server with resource and payload, and never stand in the way."""

import logging
import os
import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from prefect import flow
from prefect.client.orchestration import get_client

from flows import logs
from rlhf_core.errors import NumericsError
from tasks import events
from tasks.model_store import ModelRef, PipelineRun
from tasks.stage import ensure_experiment

pytestmark = pytest.mark.integration


@pytest.fixture
def client(home, settings):
    return MlflowClient(tracking_uri=settings.mlflow_uri)


@pytest.fixture
def run(client, settings, request):
    """A pipeline's run, of a project that no other test has."""
    project = request.node.name.partition("[")[0].replace("_", "-")
    experiment = ensure_experiment(client, project, settings)
    run_id = client.create_run(experiment).info.run_id
    return PipelineRun(project=project, run_id=run_id, experiment_id=experiment, seed=0)


def sent(project, count):
    """The events of a project that the server has, the oldest first."""
    question = {"filter": {"event": {"prefix": ["rlhf."]}, "order": "ASC"}, "limit": 50}
    deadline = time.monotonic() + 30
    with get_client(sync_client=True) as prefect:
        while True:
            answer = prefect.request("POST", "/events/filter", json=question).json()["events"]
            mine = [event for event in answer if event["payload"]["project"] == project]
            if len(mine) >= count or time.monotonic() > deadline:
                return mine
            time.sleep(0.2)


def inside_a_flow(work):
    @flow(name="of-the-test-of-events")
    def around():
        work()

    try:
        around()
    finally:
        logs.deliver()


def stage_run(client, run, *, tags=None, metrics=None):
    made = client.create_run(run.experiment_id).info.run_id
    client.log_batch(
        made,
        metrics=[Metric(name, value, 0, 0) for name, value in (metrics or {}).items()],
        tags=[RunTag(name, value) for name, value in (tags or {}).items()],
    )
    return made


def test_a_stage_that_ends_well_is_told_with_its_versions(client, run, prefect_server):
    stage = stage_run(
        client,
        run,
        tags={"output.policy": "models:/a-policy/3", "output.critic": "models:/a-critic/2"},
        metrics={"summary/over_kl_budget": 0.0, "summary/kl": 3.0},
    )

    def work():
        with events.announced(client, run, "ppo", stage):
            pass

    inside_a_flow(work)
    (event,) = sent(run.project, 1)
    assert event["event"] == "rlhf.stage.finished"
    assert event["resource"]["prefect.resource.id"] == f"rlhf.stage.{run.project}.ppo"
    assert event["resource"]["rlhf.project"] == run.project
    assert event["payload"] == {
        "project": run.project,
        "stage": "ppo",
        "run_id": stage,
        "versions": {"policy": "models:/a-policy/3", "critic": "models:/a-critic/2"},
    }
    assert any(r["prefect.resource.id"].startswith("prefect.flow-run.") for r in event["related"])


def test_a_kl_over_its_budget_is_a_monitor_that_tripped(client, run, prefect_server):
    stage = stage_run(client, run, metrics={"summary/over_kl_budget": 1.0, "summary/kl": 31.25})

    def work():
        with events.announced(client, run, "ppo", stage):
            pass

    inside_a_flow(work)
    tripped, finished = sent(run.project, 2)
    assert (tripped["event"], finished["event"]) == ("rlhf.monitor.tripped", "rlhf.stage.finished")
    assert tripped["payload"]["monitor"] == "kl_budget"
    assert tripped["payload"]["said"] == "the KL to SFT came to 31.25 nats per sequence"


def test_numbers_that_are_not_finite_are_told_and_still_raised(client, run, prefect_server):
    def work():
        with events.announced(client, run, "sft", run.run_id):
            raise NumericsError("the loss is nan")

    with pytest.raises(NumericsError):
        inside_a_flow(work)
    (event,) = sent(run.project, 1)
    assert event["event"] == "rlhf.monitor.tripped"
    assert event["payload"]["monitor"] == "numerics"
    assert event["payload"]["said"] == "the loss is nan"


def test_champion_gate_and_preferences(run, prefect_server):
    old, new = (ModelRef(name=f"{run.project}-policy", version=number) for number in (1, 2))

    def work():
        events.champion_changed(run.project, None, old, how="promotion", by="")
        events.champion_changed(run.project, old, new, how="rollback", by="Ada")
        events.gate_refused(run.project, new, ["FAIL: KL"])
        events.preferences_ready(run.project, 250)

    inside_a_flow(work)
    first, second, refused, ready = sent(run.project, 4)
    assert first["payload"]["old"] == ""
    assert second["payload"] == {
        "project": run.project,
        "old": old.uri,
        "new": new.uri,
        "how": "rollback",
        "by": "Ada",
    }
    assert second["resource"]["prefect.resource.id"] == f"rlhf.model.{run.project}-policy"
    assert refused["event"] == "rlhf.gate.refused"
    assert refused["payload"]["reasons"] == ["FAIL: KL"]
    assert ready["event"] == "rlhf.preferences.ready"
    assert ready["resource"]["prefect.resource.id"] == f"rlhf.project.{run.project}"
    assert ready["payload"]["count"] == 250


def test_outside_prefect_nothing_happens(client, run, prefect_server):
    events.preferences_ready(run.project, 1)
    with events.announced(client, run, "sft", "no such run"):
        pass
    logs.deliver()
    assert sent(run.project, 0) == []


def test_what_cannot_be_sent_is_a_warning(client, run, prefect_server, caplog):
    """A stage without a run, and a payload that is too large."""

    def work():
        with events.announced(client, run, "sft", "f" * 32):
            pass
        events.gate_refused(run.project, ModelRef(name="a", version=1), ["x" * 2_000_000])

    with caplog.at_level(logging.WARNING, logger="tasks.events"):
        inside_a_flow(work)
    assert [record.getMessage() for record in caplog.records if record.name == "tasks.events"] == [
        "the event rlhf.stage.finished could not be sent",
        "the event rlhf.gate.refused could not be sent",
    ]


EMIT = """
from tasks import events

events.preferences_ready("gone", 1)
print("went on")
"""


def test_a_server_that_is_gone_stops_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", EMIT],
        env={**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", "RLHF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "went on\n"
    assert "event" in done.stderr  # Prefect's own warning

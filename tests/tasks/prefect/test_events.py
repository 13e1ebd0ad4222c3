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

from flows.cli import logs
from rlhf_core.errors import NumericsError
from rlhf_core.metrics import Alarm
from tasks.prefect import events
from tasks.record.describe import ensure_experiment
from tasks.registry.refs import ModelRef, PipelineRun

pytestmark = pytest.mark.integration

OLD, NEW = (ModelRef(name="a-policy", version=number) for number in (1, 2))
SECONDS = 120.0  # Prefect writes its events down every five, on a busy machine later


@pytest.fixture
def client(home, settings):
    return MlflowClient(tracking_uri=settings.mlflow_uri)


@pytest.fixture
def run(client, settings):
    """The MLflow run of a pipeline."""
    experiment = ensure_experiment(client, "told", settings)
    run_id = client.create_run(experiment).info.run_id
    return PipelineRun(project="told", run_id=run_id, experiment_id=experiment, seed=0)


def inside_a_flow(work):
    @flow(name="of-the-test-of-events")
    def around():
        work()

    logs.deliver()  # from here on by a connection of its own, whatever ran in this process before
    around()
    logs.deliver()


def sent(project, count):
    """The events of a project that the server has, the oldest first."""
    # The newest, as other tests have left theirs on the server.
    question = {"filter": {"event": {"prefix": ["rlhf."]}, "order": "DESC"}, "limit": 50}
    deadline = time.monotonic() + SECONDS
    with get_client(sync_client=True) as prefect:
        while True:
            answer = prefect.request("POST", "/events/filter", json=question).json()["events"]
            mine = [event for event in answer if event["payload"]["project"] == project][::-1]
            if len(mine) >= count:
                return mine
            if time.monotonic() > deadline:
                every = prefect.request("POST", "/events/filter", json={"limit": 20}).json()
                newest = [(event["event"], event["occurred"]) for event in every["events"]]
                pytest.fail(f"{len(mine)} of {count} have come; the newest of any kind: {newest}")
            time.sleep(0.2)


def stage_run(client, run, *, tags=None, metrics=None):
    made = client.create_run(run.experiment_id).info.run_id
    client.log_batch(
        made,
        metrics=[Metric(name, value, 0, 0) for name, value in (metrics or {}).items()],
        tags=[RunTag(name, value) for name, value in (tags or {}).items()],
    )
    return made


def test_inside_prefect_each_event_arrives_with_resource_and_payload(client, run, prefect_server):
    outputs = {"output.policy": "models:/a-policy/3", "output.data": "runs:/x/data"}
    well = stage_run(client, run, tags=outputs, metrics={"summary/over_kl_budget": 0.0})
    over = {"summary/over_kl_budget": 1.0, "summary/kl": 31.25}
    far = stage_run(client, run, metrics=over)
    broken = stage_run(client, run)

    def work():
        with events.announced(client, run, "ppo", well):
            pass
        with events.announced(client, run, "ppo", far):
            pass
        with pytest.raises(NumericsError), events.announced(client, run, "sft", broken):
            raise NumericsError("the loss is nan")
        events.champion_changed("told", None, OLD, how="promotion", by="")
        events.champion_changed("told", OLD, NEW, how="rollback", by="Ada")
        events.gate_refused("told", NEW, ["FAIL: KL"])
        events.preferences_ready("told", 250)
        alarm = Alarm("gap", 7, 1.5, 1.0, "stop", "the reward runs ahead")
        events.monitor_tripped("told", "rloo", "run-7", alarm)

    events.preferences_ready("nobody", 1)  # outside Prefect
    with events.announced(client, run, "sft", "no such run"):
        pass
    inside_a_flow(work)
    found = sent("told", 9)
    assert sent("nobody", 0) == []
    ppo, sft = ({"project": "told", "stage": stage} for stage in ("ppo", "sft"))
    a_policy = "rlhf.model.a-policy"
    said = "the KL to SFT reached 31.25 nats per sequence"
    change = {"project": "told", "new": NEW.uri, "old": OLD.uri, "how": "rollback", "by": "Ada"}
    first = {"project": "told", "new": OLD.uri, "old": "", "how": "promotion", "by": ""}
    assert [
        (event["event"], event["resource"]["prefect.resource.id"], event["payload"])
        for event in found
    ] == [
        (
            "rlhf.stage.finished",
            "rlhf.stage.told.ppo",
            {**ppo, "run_id": well, "versions": {"policy": "models:/a-policy/3"}},
        ),
        (
            "rlhf.monitor.tripped",
            "rlhf.stage.told.ppo",
            {**ppo, "run_id": far, "monitor": "kl_budget", "said": said},
        ),
        ("rlhf.stage.finished", "rlhf.stage.told.ppo", {**ppo, "run_id": far, "versions": {}}),
        (
            "rlhf.monitor.tripped",
            "rlhf.stage.told.sft",
            {**sft, "run_id": broken, "monitor": "numerics", "said": "the loss is nan"},
        ),
        ("rlhf.champion.changed", a_policy, first),
        ("rlhf.champion.changed", a_policy, change),
        (
            "rlhf.gate.refused",
            a_policy,
            {"project": "told", "candidate": NEW.uri, "reasons": ["FAIL: KL"]},
        ),
        ("rlhf.preferences.ready", "rlhf.project.told", {"project": "told", "count": 250}),
        (
            "rlhf.monitor.tripped",
            "rlhf.stage.told.rloo",
            {
                **{"project": "told", "stage": "rloo", "run_id": "run-7", "monitor": "gap"},
                "said": "monitor, iteration 7: the reward runs ahead. The run stops",
                **{"at_iteration": 7, "value": 1.5, "limit": 1.0, "action": "stop"},
            },
        ),
    ]
    for event in found:
        assert event["resource"]["rlhf.project"] == "told"
        related = [resource["prefect.resource.id"] for resource in event["related"]]
        assert any(resource.startswith("prefect.flow-run.") for resource in related)


def test_what_cannot_be_sent_is_a_warning(client, run, prefect_server, caplog):
    """A stage without a run, and a payload that is too large."""

    def work():
        with events.announced(client, run, "sft", "f" * 32):
            pass
        events.gate_refused(run.project, ModelRef(name="a", version=1), ["x" * 2_000_000])

    with caplog.at_level(logging.WARNING, logger="tasks.prefect.events"):
        inside_a_flow(work)
    assert [
        record.getMessage() for record in caplog.records if record.name == "tasks.prefect.events"
    ] == [
        "the event rlhf.stage.finished could not be sent",
        "the event rlhf.gate.refused could not be sent",
    ]


EMIT = """
from tasks.prefect import events

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

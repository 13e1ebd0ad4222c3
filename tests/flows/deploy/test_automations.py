"""The automations on a real server: made once, kept as people set them, and doing what they say."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from prefect.flow_runs import suspend_flow_run
from prefect.settings import PREFECT_API_URL

from flows.cli import logs
from flows.deploy import automations
from tasks.prefect import events
from tasks.registry.refs import ModelRef
from tasks.settings import Settings

pytestmark = pytest.mark.integration

ZOMBIE = "rlhf: a run whose process is gone has crashed"
SECONDS = 120.0  # of which a quiet machine needs a few

faults = pytest.mark.skipif(
    "RLHF_FAULTS" not in os.environ, reason="takes minutes: set RLHF_FAULTS=1"
)


@pytest.fixture(scope="module")
def prefect(prefect_server):
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(autouse=True)
def _none_is_left(prefect):
    yield
    for automation in prefect.read_automations():
        prefect.delete_automation(automation.id)


@pytest.fixture
def news():
    """What a server of somebody else is told: its address, and the texts so far."""
    texts = []

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["Content-Type"] == "application/json"
            texts.append(json.loads(body)["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", texts
        server.shutdown()


def until(condition, seconds=SECONDS):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"it did not happen within {seconds:.0f} s"
        time.sleep(0.2)
    return found


def tell(work):
    @flow(name="of-the-test-of-automations")
    def around():
        work()

    around()
    logs.deliver()


# ---- what is declared ----


def test_on_sqlite_one_is_made_and_said_why(prefect):
    made, why = automations.register(Settings())
    assert made == ZOMBIE
    assert why.startswith(
        "retrain and notify: not created, because Prefect on SQLite acts several times"
    )
    assert [automation.name for automation in prefect.read_automations()] == [ZOMBIE]


def test_a_run_is_given_up_after_three_heartbeats_unless_it_has_ended_or_waits(prefect):
    automations.register(Settings())
    (made,) = prefect.read_automations_by_name(ZOMBIE)
    ends = {"Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended"}
    assert made.trigger.within.total_seconds() == 90
    assert made.trigger.posture.value == "Proactive"
    assert made.trigger.after == {"prefect.flow-run.heartbeat"}
    assert made.trigger.expect == made.trigger.after | {f"prefect.flow-run.{end}" for end in ends}
    (action,) = made.actions  # and no requeue
    assert (action.type, action.state.value) == ("change-flow-run-state", "CRASHED")


def test_doing_it_again_mends_what_differs_and_keeps_what_is_switched_off(prefect):
    automations.register(Settings())
    (first,) = prefect.read_automations_by_name(ZOMBIE)
    spoilt = first.model_copy(deep=True)
    spoilt.trigger.within = first.trigger.within * 5
    automations.put(prefect, spoilt)
    prefect.pause_automation(first.id)
    automations.register(Settings())
    (second,) = prefect.read_automations()
    assert second.id == first.id
    assert second.trigger.within == first.trigger.within
    assert second.actions == first.actions
    assert not second.enabled


# ---- what they do ----


def test_ready_preferences_start_the_retraining_of_their_project(prefect):
    @flow(name="retrain")
    def retrain(config: dict):
        pass

    deployments = {
        project: prefect.create_deployment(
            prefect.create_flow(retrain),
            name=project,
            parameters={"config": {"pipeline": {"project": project}}},
            paused=False,
        )
        for project in ("here", "elsewhere")
    }
    for automation in automations.retraining(prefect):
        automations.put(prefect, automation)
    tell(lambda: events.preferences_ready("here", 250))

    def started():
        return [r for r in prefect.read_flow_runs() if r.deployment_id in deployments.values()]

    until(started)
    assert {run.deployment_id for run in started()} == {deployments["here"]}
    assert all(run.state.is_scheduled() for run in started())
    for deployment in deployments.values():
        prefect.delete_deployment(deployment)


def test_people_are_told_what_they_have_to_know(prefect, news):
    address, texts = news
    settings = Settings.model_validate(
        {"RLHF_NOTIFY_WEBHOOK": address, "RLHF_PREFECT_URL": "https://prefect.example.org"}
    )
    for automation in automations.notifications(settings):
        automations.put(prefect, automation)
    candidate = ModelRef(name="ready-policy", version=2)

    @flow(name="rlhf", flow_run_name="told/demo#1")
    def broken():
        raise ValueError("a 'quoted' <reason>")

    @flow(name="of-others", flow_run_name="others#1")
    def broken_too():
        raise ValueError("none of our business")

    tell(lambda: events.gate_refused("ready", candidate, ['FAIL: KL "to" SFT']))
    for failing in (broken_too, broken):
        with pytest.raises(ValueError, match=r"reason|business"):
            failing()
    logs.deliver()
    until(lambda: any("told/demo#1" in text for text in texts) and len(set(texts)) >= 2)
    refused = next(text for text in texts if text.startswith("rlhf.gate.refused "))
    said = json.loads(refused.partition(" ")[2])
    assert said["candidate"] == candidate.uri
    assert said["reasons"] == ['FAIL: KL "to" SFT']
    failed = next(text for text in texts if "told/demo#1" in text)
    assert failed.startswith("told/demo#1 is Failed: ")
    assert "a 'quoted' <reason>" in failed
    assert "https://prefect.example.org/runs/flow-run/" in failed
    assert not any("others#1" in text for text in texts)


SLEEPER = """
import sys, time
from prefect import flow

@flow(name="rlhf", flow_run_name=sys.argv[1])
def rlhf():
    time.sleep(float(sys.argv[2]))

rlhf()
"""


@faults
def test_a_run_whose_process_is_killed_crashes_and_no_other(prefect, tmp_path):
    @flow(name="rlhf")
    def waiting():
        suspend_flow_run(timeout=3600)

    automations.register(Settings())
    environment = {
        **os.environ,
        "PREFECT_API_URL": PREFECT_API_URL.value(),
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    }
    killed, busy, short = (
        subprocess.Popen([sys.executable, "-c", SLEEPER, name, seconds], env=environment)
        for name, seconds in (("killed", "600"), ("busy", "200"), ("short", "1"))
    )
    deployment = prefect.create_deployment(prefect.create_flow(waiting), name="waiting")
    suspended = prefect.create_flow_run_from_deployment(deployment)
    with pytest.raises(Pause):
        run_flow(waiting, flow_run=suspended)

    def state(name):
        found = [run for run in prefect.read_flow_runs() if run.name == name]
        return found[0].state.name if found else ""

    until(lambda: {state("killed"), state("busy")} == {"Running"}, 60)
    assert short.wait(timeout=120) == 0
    time.sleep(35)  # one heartbeat at least
    killed.kill()
    killed.wait()
    before = time.monotonic()
    until(lambda: state("killed") == "Crashed", 180)
    print(f"crashed {time.monotonic() - before:.0f} s after the kill")
    assert state("busy") == "Running"
    assert busy.wait(timeout=300) == 0
    time.sleep(100)
    assert state("killed") == "Crashed"
    assert (state("busy"), state("short")) == ("Completed", "Completed")
    assert prefect.read_flow_run(suspended.id).state.name == "Suspended"

"""A loop with real servers, two watchers and a worker, on SQLite (RLHF_FAULTS=1).

A schedule begins it. Then people vote, and that is all that anybody does: the first policy becomes
the champion, the next ones are refused with the reasons, and the loop ends by itself.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from servers import Servers, free_port, wait_until

from tasks.feedback.store.store import Store
from tests.flows.people import invited, label
from tests.flows.rounds import LENIENT, asked, cast

TINY = Path(__file__).parents[1] / "tiny.yaml"
NAME = "round"
pytestmark = [pytest.mark.integration, pytest.mark.faults, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    running = Servers(folder)
    configs = folder / "configs"
    (configs / "retrain").mkdir(parents=True)
    content = {
        **yaml.safe_load(TINY.read_text()),
        "project": NAME,
        "data": {"source": "files", "preferences": {"store": NAME}},
        "promotion": LENIENT,
    }
    content["evaluation"] = {**content["evaluation"], "true_reward": ""}
    (configs / f"{NAME}.yaml").write_text(yaml.safe_dump(content))
    ask = {"project": NAME, "prompts": 8, "enough": 0.5, "then": f"retrain/{NAME}"}
    plan = {"min_new_preferences": 2, "rounds": 2, "ask": ask}
    (configs / "retrain" / f"{NAME}.yaml").write_text(yaml.safe_dump(plan))
    pages = []
    try:
        for name in ("prefect", "mlflow"):
            running.start(name)
        running.rlhf("deploy", configs)
        running.start("worker")
        for _ in range(2):
            command = [sys.executable, "-P", "-m", "tasks.feedback.page.app"]
            with (running.logs / "label.log").open("a") as log:
                pages.append(
                    subprocess.Popen(
                        [*command, "--port", str(free_port())],
                        env=running.clients,
                        stdout=log,
                        stderr=log,
                    )
                )
        yield running
    finally:
        for page in pages:
            page.kill()
            page.wait()
        running.close()


def runs(servers):
    """The runs of the deployment that have begun, oldest first: name, state, who made it."""
    found = servers.ask(
        "/flow_runs/filter",
        {"deployments": {"name": {"any_": [NAME]}}, "flows": {"name": {"any_": ["retrain"]}}},
    )
    begun = [run for run in found if run["start_time"]]
    return sorted(begun, key=lambda run: run["start_time"])


def switch(servers, **changes):
    """Change the nightly schedule, as a person does on the page of the deployment."""
    deployment = servers.ask(f"/deployments/name/retrain/{NAME}")
    (schedule,) = deployment["schedules"]
    place = f"/deployments/{deployment['id']}/schedules/{schedule['id']}"
    servers.change(place, changes)


def test_from_a_schedule_to_a_champion_and_two_refusals_and_the_end(servers):
    store = Store.open(servers.settings)
    project = store.project(NAME, make=True)
    cast(project, range(80))

    # A schedule of seconds instead of every night.
    switch(servers, schedule={"interval": 20, "timezone": "UTC"}, active=True)
    (first, *_) = wait_until(lambda: runs(servers), 240, 0.5)
    switch(servers, active=False)
    assert first["auto_scheduled"]
    servers.until(first["id"], "Completed", "Skipped", seconds=900)
    wait_until(lambda: len(asked(store, NAME)) == 1, 60)

    for number in (1, 2):
        label(project, invited(store, project, f"Person {number}"))
        batch = asked(store, NAME)[-1][0]
        flow_run = wait_until(
            lambda name=batch: next(r for n, _, r in asked(store, NAME) if n == name), 120, 0.5
        )
        servers.until(flow_run, "Completed", seconds=900)
        if number == 1:
            wait_until(lambda: len(asked(store, NAME)) == 2, 60)

    # Each batch has started one run, and no schedule has asked beside it.
    tagged = [run["tags"] for run in runs(servers) if not run["auto_scheduled"]]
    assert len(tagged) == 2
    assert [about["round"] for _, about, _ in asked(store, NAME)] == [1, 2]
    (aliases,) = servers.rows("select count(*) from registered_model_aliases")
    assert aliases == (1,)
    promoted = servers.rows(
        "select t.value from tags t join tags s on s.run_uuid = t.run_uuid "
        "where t.key = 'promoted' and s.key = 'stage' and s.value = 'pipeline'"
    )
    assert sorted(value for (value,) in promoted) == ["false", "false", "true"]
    said = servers.rows("select value from tags where key = 'loop_next'")
    assert sum("round 2 was the last of 2" in value for (value,) in said) == 1
    shown = servers.rlhf("feedback", "loop", NAME)
    assert shown.count("started") == 2
    store.close()

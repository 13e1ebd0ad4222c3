"""A run that waits for people, with real servers and a real worker (RLHF_FAULTS=1).

Prefect, the page for annotators and the worker are killed while nobody needs them, and the run goes
on by itself when people have voted.
"""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from servers import Servers, free_port, wait_until

from tasks.feedback.store.store import Store
from tests.flows.people import invited, label

TINY = Path(__file__).parents[1] / "tiny.yaml"
pytestmark = [pytest.mark.integration, pytest.mark.faults, pytest.mark.timeout(1800)]
JUDGED = {
    "project": "panel",
    "judge": {"source": "people", "people": {"votes_per_pair": 2}},
    "evaluation": {"prompts": 4, "samples_per_prompt": 1, "best_of": 2, "base": False},
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    running = Servers(folder)
    (folder / "configs").mkdir()
    content = {**yaml.safe_load(TINY.read_text()), **JUDGED}
    (folder / "configs" / "tiny.yaml").write_text(yaml.safe_dump(content))
    try:
        for name in ("prefect", "mlflow"):
            running.start(name)
        running.rlhf("deploy", folder / "configs")
        running.start("worker")
        yield running
    finally:
        running.close()


@pytest.fixture
def page(servers):
    """A function that starts the page for annotators, which resumes what is answered."""
    started = []

    def start():
        command = [sys.executable, "-P", "-m", "tasks.feedback.page.app"]
        with (servers.logs / "label.log").open("a") as log:
            process = subprocess.Popen(
                [*command, "--port", str(free_port())], env=servers.clients, stdout=log, stderr=log
            )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_it_goes_on_by_itself_whatever_was_restarted_meanwhile(servers, page):
    first = page()
    run = servers.trigger("rlhf/tiny", {})
    servers.until(run, "Suspended", seconds=600)
    # Nobody computes: the worker has no child.
    wait_until(lambda: not _engines(servers), 60)
    waits = servers.rows("select value from tags where key = 'waits_for_people'")
    assert len(waits) == 2
    assert all("pairs wait for people at" in value for (value,) in waits)

    store = Store.open(servers.settings)
    project = store.project("panel")
    assert label(project, invited(store, project))
    assert servers.state(run) == "Suspended"  # two have to say it

    first.kill()
    servers.kill("worker")
    servers.kill("prefect")
    label(project, invited(store, project, "Bea"))
    page()  # before Prefect is there
    servers.start("prefect")
    servers.start("worker")
    servers.until(run, "Completed", seconds=600)

    assert servers.rows("select value from tags where key = 'waits_for_people'") == []
    (rate,) = servers.rows(
        "select m.value from metrics m join runs r on r.run_uuid = m.run_uuid "
        "where r.name like 'evaluation-%' and m.key = 'summary/win_rate/policy_over_sft'"
    )
    assert 0 <= rate[0] <= 1
    (agreement,) = servers.rows("select value from metrics where key = 'summary/judge/agreement'")
    assert agreement[0] == 1.0  # both go by length
    assert len(servers.rows("select 1 from runs where name like 'evaluation-%'")) == 1
    store.close()


def _engines(servers):
    """The processes of flow runs that the worker has started and that have not ended."""
    found = []
    for child in psutil.Process(servers.running["worker"].pid).children(recursive=True):
        with suppress(psutil.Error):  # one that ends meanwhile
            found += [child] if "prefect.engine" in child.cmdline() else []
    return found

"""What flow runs are called: by project and preset, unless a person has said otherwise."""

import subprocess
import sys
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.utilities.names import generate_slug
from pydantic import BaseModel

from flows.generated_names import is_generated
from flows.naming import name_flow_run
from tasks.prefect.ui import current_flow_run_name


class Config(BaseModel):
    project: str


@flow(name="rlhf", flow_run_name=name_flow_run)
def pipeline(config: Config) -> str:
    """What its run in MLflow would be called."""
    return current_flow_run_name()


@pytest.fixture
def start(prefect_server):
    """Runs the flow as a worker does: the run was made before, by whoever has sent this."""

    def send(**sent):
        with get_client(sync_client=True) as client:
            flow_id = client.create_flow(pipeline)
            parameters = {"config": {"project": "named"}}
            content = {"flow_id": str(flow_id), "parameters": parameters, **sent}
            made = client.request("POST", "/flow_runs/", json=content).json()
            known = client.read_flow_run(made["id"])
            told = run_flow(pipeline, flow_run=known, parameters=known.parameters)
            return told, client.read_flow_run(made["id"]).name

    return send


@pytest.mark.integration
def test_a_name_that_a_person_has_given_is_kept_and_mlflow_has_it_too(start):
    for name in ("beta-high", "longer responses, 2nd try", "demo/small#7", "x" * 200):
        assert start(name=name) == (name, name)


@pytest.mark.integration
def test_a_name_that_prefect_has_made_up_is_replaced(start):
    first, shown = start()
    assert first == shown == "named#1"
    assert start(name=generate_slug(2)) == ("named#2", "named#2")
    assert start(name="gamma5-draconis-void") == ("named#3", "named#3")  # from the form
    assert start(name=" ") == ("named#4", "named#4")


@pytest.mark.integration
def test_a_name_too_long_for_mlflow_is_cut_there(start):
    told, shown = start(name="long " * 100)
    assert shown == "long " * 100
    assert told == shown[:250]


def test_every_name_of_the_server_is_recognised():
    assert all(is_generated(generate_slug(2)) for _ in range(1000))


@pytest.mark.parametrize(
    "name",
    [
        # Taken from the form: a letter, most of them numbered, a place, and mostly a word.
        "alpha-risa",
        "beta3-draconis-void",
        "tau457-ursae-majoris",
        "mu42-canis-minoris-x",
        "chi101-barad-dur-shift",
        # And from that of the newer pages.
        "Rustic-Zebra",
        "Unbranded-Yak",
    ],
)
def test_every_name_of_the_forms_is_recognised(name):
    assert is_generated(name)


@pytest.mark.parametrize(
    "name",
    [
        *("beta-high", "beta0-draconis", "beta3", "beta3-demo", "alpha-void", "delta-draconis-run"),
        *("Small-Lora", "Rustic-Elephant", "rustic-zebra2", "Zebra-Rustic"),
        *("happy", "happy-otter-2", "Happy-Otter", "otter-happy", "first-try", "demo/small#3"),
    ],
)
def test_other_names_are_not(name):
    assert not is_generated(name)


def test_without_the_pages_of_prefect_a_name_is_kept():
    code = (
        "import prefect; prefect.__ui_static_path__ = prefect.__ui_v2_static_path__ = '/nowhere'\n"
        "from flows.generated_names import is_generated\n"
        "print(is_generated('beta3-draconis-void'), is_generated('happy-otter'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout == "False True\n"

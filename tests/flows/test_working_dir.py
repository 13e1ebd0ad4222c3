"""A flow of a deployment works in the folder that the deployment, or the run, names."""

import sys
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow

from flows.working_dir import in_working_dir
from rlhf_core.errors import UserError
from rlhf_core.rewards.functions import load_function

pytestmark = pytest.mark.integration


@flow(name="where")
@in_working_dir
def where() -> str:
    return str(Path.cwd())


@pytest.fixture
def start(prefect_server, tmp_path, monkeypatch):
    """A function that runs the flow from an empty folder, as a worker does."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    def run(of_deployment, of_run=None):
        with get_client(sync_client=True) as client:
            deployment = client.create_deployment(
                client.create_flow(where), name="of-the-test", job_variables=of_deployment
            )
            made = client.create_flow_run_from_deployment(deployment, job_variables=of_run)
        return run_flow(where, flow_run=made)

    return run


def test_it_goes_to_the_folder_of_the_deployment_or_to_that_of_the_run(start, tmp_path):
    for name in ("deployment", "run"):
        (tmp_path / name).mkdir()
    of_deployment = {"working_dir": str(tmp_path / "deployment")}
    assert start({}) == str(tmp_path / "empty")
    assert start(of_deployment) == str(tmp_path / "deployment")
    assert start(of_deployment, {"working_dir": str(tmp_path / "run")}) == str(tmp_path / "run")


def test_a_folder_that_this_machine_does_not_have_is_named(start):
    with pytest.raises(
        UserError, match=r"cannot change to .*/no/such/folder .*: create it, or change"
    ):
        start({"working_dir": "/no/such/folder"})


def test_outside_a_deployment_it_stays(prefect_server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert where() == str(tmp_path)


def test_a_function_of_the_folder_is_found_there_and_takes_no_packages_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    (tmp_path / "rules_of_test_working_dir.py").write_text("def polite(p, r): return [1.0]\n")
    (tmp_path / "colorsys.py").write_text("def hsv_to_rgb(*_): return 'theirs'\n")
    found = load_function("rules_of_test_working_dir:polite", setting="the reward")
    assert found([], []) == [1.0]
    standard = load_function("colorsys:hsv_to_rgb", setting="the reward")
    assert standard(0, 0, 0) == (0, 0, 0)

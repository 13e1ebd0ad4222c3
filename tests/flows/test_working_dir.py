"""A flow of a deployment works in the folder that the deployment, or the run, names."""

import sys
from pathlib import Path

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow

from flows.working_dir import in_working_dir
from rlhf_core.errors import UserError
from rlhf_core.rewards.functions import RewardPlaces, load_function
from tasks.reward_places import reward_places

pytestmark = pytest.mark.integration


@flow(name="where")
@in_working_dir
def where() -> str:
    return str(Path.cwd())


@task(name="trusted-places")
def trusted_places() -> RewardPlaces:
    return reward_places()


@flow(name="trusted")
@in_working_dir
def trusted() -> list[RewardPlaces]:
    return [reward_places(), trusted_places()]


@pytest.fixture
def start(prefect_server, tmp_path, monkeypatch):
    """A function that runs the flow from an empty folder, as a worker does."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    def run(of_deployment, of_run=None, what=where):
        with get_client(sync_client=True) as client:
            deployment = client.create_deployment(
                client.create_flow(what), name="of-the-test", job_variables=of_deployment
            )
            made = client.create_flow_run_from_deployment(deployment, job_variables=of_run)
        return run_flow(what, flow_run=made)

    return run


def test_a_run_of_a_deployment_trusts_what_its_worker_names_and_not_its_folder(
    start, tmp_path, monkeypatch
):
    (tmp_path / "chosen").mkdir()
    folder = {"working_dir": str(tmp_path / "chosen")}
    nothing = RewardPlaces()
    assert start(folder, folder, what=trusted) == [nothing, nothing]
    monkeypatch.setenv("RLHF_REWARD_PACKAGES", "rules, judges")
    monkeypatch.setenv("RLHF_CONFIG_FOLDER", "/srv/configs")
    named = RewardPlaces(("/srv/configs",), ("rules", "judges"))
    assert start(folder, what=trusted) == [named, named]


def test_a_program_that_calls_a_flow_trusts_its_own_modules(prefect_server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (first, second) = trusted()
    assert first == second
    assert first.folders[0] == str(tmp_path)
    assert str(Path(__file__).parents[2]) in first.folders
    assert not any("site-packages" in folder for folder in first.folders)
    assert str(Path(sys.executable).parents[1]) not in first.folders


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

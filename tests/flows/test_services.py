"""The local services: started together, found by other commands, and never left behind."""

import fcntl
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from flows import guard, services
from flows.config import PipelineConfig
from flows.loading import load_config
from flows.supervisor import Service, ServiceError, Supervisor
from rlhf_core.errors import UserError
from tasks.settings import Settings

TINY = Path(__file__).parent / "tiny.yaml"
PIPELINES = {"flows": {"name": {"any_": ["rlhf"]}}}
SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]
# Starts a child in a session of its own, waits for it, and writes down how it ended.
PARENT = """
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)"],
    start_new_session=True,
)
open(sys.argv[1], "w").write(str(child.wait()))
import time; time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def with_variable(text: str) -> list[int]:
    """Processes whose environment holds `text`; zombies hold nothing."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


# ---- the guard ----


def start_marked(mark: str, code: str, *arguments: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, guard.VARIABLE: mark},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"ready\n"
    return process


def test_the_guard_ends_children_first_wherever_they_went(tmp_path):
    process = start_marked("test:tree", PARENT, str(tmp_path / "status"))
    wait_until(lambda: len(guard.marked("test:tree")) == 2)
    guard.end(["test:tree"])
    assert guard.marked("test:tree") == set()
    # The parent was still there to see its child end, by SIGTERM.
    assert (tmp_path / "status").read_text() == str(-signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    process.stdout.close()


def test_the_guard_kills_what_does_not_listen(monkeypatch):
    monkeypatch.setattr(guard, "GRACE_SECONDS", 0.3)
    process = start_marked("test:stubborn", STUBBORN)
    guard.end(["test:stubborn"])
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


def test_the_guard_leaves_others_alone():
    process = start_marked("test:other", STUBBORN)
    guard.end(["test:mine", "test:oth"])
    assert process.poll() is None
    process.kill()
    process.wait()
    process.stdout.close()


# ---- the supervisor ----


def test_leaving_the_block_ends_everything(tmp_path):
    with Supervisor(tmp_path, ("a", "b")) as group:
        group.start(Service("a", SLEEPER, {"TEST_SUPERVISOR": str(tmp_path)}))
        group.start(Service("b", SLEEPER, {"TEST_SUPERVISOR": str(tmp_path)}))
        group.check()
        wait_until(lambda: len(with_variable(f"TEST_SUPERVISOR={tmp_path}")) == 2)
    assert with_variable(f"TEST_SUPERVISOR={tmp_path}") == []


def test_a_service_that_ends_is_reported_with_the_end_of_its_log(tmp_path):
    def run():
        with Supervisor(tmp_path, ("a", "b")) as group:
            group.start(Service("a", SLEEPER, {"TEST_SUPERVISOR": str(tmp_path)}))
            group.start(Service("b", talker, {}))
            while True:
                group.check()
                time.sleep(0.05)

    talker = [sys.executable, "-c", "print('first'); print('the reason'); raise SystemExit(3)"]
    with pytest.raises(ServiceError) as caught:
        run()
    assert str(caught.value).splitlines() == [
        f"b ended (exit status 3). The end of {tmp_path / 'b.log'}:",
        "first",
        "the reason",
    ]
    assert with_variable(f"TEST_SUPERVISOR={tmp_path}") == []


def test_a_step_that_fails_is_reported_and_one_that_succeeds_is_not(tmp_path):
    def run(code):
        with Supervisor(tmp_path, ("step",)) as group:
            group.run(Service("step", [sys.executable, "-c", code], {}))

    run("print('done')")
    with pytest.raises(ServiceError, match=r"step ended \(exit status 2\)\. .*\nno such thing"):
        run("print('no such thing'); raise SystemExit(2)")


def test_a_service_that_is_never_ready_is_reported(tmp_path, monkeypatch):
    def run():
        with Supervisor(tmp_path, ("a",)) as group:
            group.start(slow)
            group.until_ready(slow)

    monkeypatch.setattr("flows.supervisor.START_SECONDS", 0.3)
    slow = Service("a", SLEEPER, {}, lambda: "it is thinking")
    with pytest.raises(ServiceError, match=r"a was not ready within 0 s \(it is thinking\)"):
        run()


def test_a_killed_supervisor_leaves_nothing_behind(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from flows.supervisor import Service, Supervisor
with Supervisor(Path({str(tmp_path)!r}), ("a",)) as group:
    group.start(Service("a", {SLEEPER!r}, {{}}))
    print("ready", flush=True)
    time.sleep(600)
"""
    environment = {**os.environ, "TEST_SUPERVISOR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    # itself, guard, service
    wait_until(lambda: len(with_variable(f"TEST_SUPERVISOR={tmp_path}")) == 3)
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: not with_variable(f"TEST_SUPERVISOR={tmp_path}"), 10)


# ---- finding the servers ----


@pytest.fixture
def own_environment(monkeypatch):
    """A copy of the environment that may be changed, without the addresses of any server."""
    before = dict(os.environ)
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RLHF_HOME", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)
    yield
    os.environ.clear()
    os.environ.update(before)


def local(home: Path, **variables: str) -> Settings:
    return Settings.model_validate({"RLHF_HOME": home, **variables})


def test_without_any_server_files_under_the_home_are_used(tmp_path, own_environment):
    found = services.join(local(tmp_path / "home"), prefect=True)
    assert found.mlflow_uri == f"sqlite:///{tmp_path}/home/mlflow/mlflow.db"
    assert found.prefect_api_url == ""
    assert os.environ["PREFECT_HOME"] == f"{tmp_path}/home/prefect"
    assert (tmp_path / "home" / "mlflow").is_dir()


@pytest.mark.parametrize(
    ("variable", "name"), [("MLFLOW_TRACKING_URI", "MLflow"), ("PREFECT_API_URL", "Prefect")]
)
def test_a_server_that_does_not_answer_is_named_with_its_variable(
    tmp_path, own_environment, variable, name
):
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError) as caught:
        services.join(local(tmp_path, **{variable: address}), prefect=True)
    text = str(caught.value)
    assert f"The {name} server at {address} does not answer" in text
    assert f"set {variable} to where it runs" in text


def test_a_home_that_cannot_be_made_is_named(own_environment):
    with pytest.raises(UserError, match=r"/dev/null/x cannot be used .*: set RLHF_HOME to"):
        services.join(local(Path("/dev/null/x")))


def test_a_state_file_is_believed_only_while_its_writer_lives(tmp_path):
    settings = local(tmp_path)
    state = services.Services("http://127.0.0.1:1", "http://127.0.0.1:2", 7)
    with (tmp_path / "services.json").open("w") as file:
        json.dump(state._asdict(), file)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert services.running(settings) == state
        file.truncate(0)
        with pytest.raises(UserError, match="just starting"):
            services.running(settings)
    # The writer is gone without having cleaned up, as after SIGKILL.
    (tmp_path / "services.json").write_text(json.dumps(state._asdict()))
    assert services.running(settings) is None


# ---- rlhf up ----


def rlhf(*arguments: str, home: Path, **options) -> subprocess.Popen:
    names = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RLHF_MLFLOW_URL", "RLHF_PREFECT_URL")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    return subprocess.Popen(
        [sys.executable, "-m", "flows", *arguments],
        env={**environment, "RLHF_HOME": str(home), "COLUMNS": "200"},
        text=True,
        **options,
    )


def finish(process: subprocess.Popen, seconds: float = 60) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=seconds)
    return process.returncode, output, errors


def captured(*arguments: str, home: Path) -> tuple[int, str, str]:
    return finish(rlhf(*arguments, home=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE))


class Up:
    """A running `rlhf up` with free ports, a home and a folder of configs of its own."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.configs = folder / "configs"
        self.configs.mkdir(parents=True)
        shutil.copy(TINY, self.configs)
        self.prefect, self.mlflow = free_port(), free_port()
        self.output = folder / "output"
        with self.output.open("w") as output:
            self.process = rlhf(
                *("up", "--configs", str(self.configs)),
                *("--prefect-port", str(self.prefect), "--mlflow-port", str(self.mlflow)),
                home=self.home,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def ready(self) -> "Up":
        def check():
            assert self.process.poll() is None, self.output.read_text()
            return "Ctrl-C" in self.output.read_text()

        wait_until(check, 180)
        return self

    def processes(self) -> list[int]:
        return with_variable(f"RLHF_HOME={self.home}")

    def ask(self, path: str, question: object) -> list[dict]:
        request = Request(
            f"http://127.0.0.1:{self.prefect}/api{path}",
            data=json.dumps(question).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        wait_until(lambda: not self.processes(), 30)


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    running = Up(tmp_path_factory.mktemp("up"))
    try:
        yield running.ready()
    finally:
        running.kill()


@pytest.mark.integration
def test_up_shows_where_everything_is(up):
    output = up.output.read_text()
    assert f"http://127.0.0.1:{up.prefect}" in output
    assert f"http://127.0.0.1:{up.mlflow}" in output
    assert {log.name for log in (up.home / "logs").iterdir()} == {
        "prefect.log",
        "mlflow.log",
        "worker.log",
        "deploy.log",
    }


@pytest.mark.integration
def test_up_serves_on_the_loopback_address_alone(up):
    for port in (up.prefect, up.mlflow):
        listening = [
            line.split()
            for line in Path("/proc/net/tcp").read_text().splitlines()
            if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
        ]
        assert [fields[1].split(":")[0] for fields in listening] == ["0100007F"]


@pytest.mark.integration
def test_up_makes_a_deployment_of_each_config(up):
    (deployment,) = up.ask("/deployments/filter", PIPELINES)
    assert deployment["name"] == "tiny"
    assert deployment["entrypoint"] == "flows.rlhf:rlhf"
    assert not deployment["pull_steps"]
    assert deployment["path"] is None
    assert deployment["work_pool_name"] == "rlhf"
    assert deployment["description"].startswith("The whole pipeline in seconds.\nIt learns")
    assert deployment["tags"] == ["rlhf", "tiny", "owner:rlhf-team"]
    config = load_config(TINY, (), PipelineConfig).model_dump(mode="json")
    assert deployment["parameters"] == {"config": config}
    assert deployment["job_variables"] == {"working_dir": str(Path.cwd())}


@pytest.mark.integration
def test_other_commands_find_the_services_of_their_home(up, own_environment):
    found = services.join(local(up.home), prefect=True)
    assert found.tracking_uri == f"http://127.0.0.1:{up.mlflow}"
    assert found.prefect_api_url == f"http://127.0.0.1:{up.prefect}/api"
    assert found.mlflow_public_url == f"http://127.0.0.1:{up.mlflow}"
    assert found.prefect_public_url == f"http://127.0.0.1:{up.prefect}"


@pytest.mark.integration
def test_a_second_up_in_the_same_home_says_so(up):
    code, output, errors = captured("up", home=up.home)
    assert (code, output) == (2, "")
    assert "`rlhf up` already runs" in errors
    assert f"http://127.0.0.1:{up.prefect}" in errors
    assert "Traceback" not in errors


@pytest.mark.integration
@pytest.mark.parametrize("option", ["--prefect-port", "--mlflow-port"])
def test_a_port_in_use_is_named_with_its_option(up, tmp_path, option):
    other = {"--prefect-port": "--mlflow-port", "--mlflow-port": "--prefect-port"}[option]
    code, output, errors = captured(
        "up", option, str(up.prefect), other, str(free_port()), home=tmp_path
    )
    assert (code, output) == (2, "")
    sentence = f"Port {up.prefect} is already in use: free it, or choose another one with {option}."
    assert sentence in errors
    assert "Traceback" not in errors


@pytest.mark.integration
def test_both_ports_the_same(tmp_path):
    port = str(free_port())
    code, _, errors = captured("up", "--prefect-port", port, "--mlflow-port", port, home=tmp_path)
    assert code == 2
    assert "choose two different ones" in errors


@pytest.mark.integration
def test_a_folder_without_configs_is_named_at_once(tmp_path):
    code, _, errors = captured("up", "--configs", str(tmp_path), home=tmp_path / "home")
    assert code == 2
    assert f"{tmp_path} has no .yaml file: name the folder of the configs." in errors


@pytest.mark.integration
def test_what_the_server_stores_is_readable_without_it(up):
    """Artifacts have plain paths, so `rlhf run` can go on in the same files when `up` is gone."""
    code = f"""
from mlflow import MlflowClient
client = MlflowClient("http://127.0.0.1:{up.mlflow}")
run = client.create_run(client.create_experiment("shared"), run_name="bare")
client.log_text(run.info.run_id, "hello", "note.txt")
print(run.info.run_id)
"""
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    run_id = made.stdout.split()[-1]
    from mlflow import MlflowClient

    database = MlflowClient(f"sqlite:///{up.home / 'mlflow' / 'mlflow.db'}")
    location = database.get_run(run_id).info.artifact_uri
    assert (Path(location.removeprefix("file://")) / "note.txt").read_text() == "hello"


@pytest.mark.integration
def test_the_worker_runs_a_deployment_into_the_same_mlflow_and_home(up):
    (deployment,) = up.ask("/deployments/filter", PIPELINES)
    run = up.ask(f"/deployments/{deployment['id']}/create_flow_run", {})

    def state():
        (found,) = up.ask("/flow_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
        return found["state_type"] not in ("SCHEDULED", "PENDING", "RUNNING") and found["state"]

    final = wait_until(state, 240)
    assert final["type"] == "COMPLETED", final["message"]
    with sqlite3.connect(up.home / "mlflow" / "mlflow.db") as database:
        query = "select name, status from runs where name <> 'bare'"
        statuses = dict(database.execute(query))
        tagged = database.execute(
            "select count(*) from tags where key = 'prefect.flow_run_id' and value = ?", [run["id"]]
        ).fetchone()
    stages = {name.partition("-seed-")[0] for name in statuses}
    assert {"prepare", "sft", "reward_model", "ppo", "evaluation"} < stages
    assert set(statuses.values()) == {"FINISHED"}
    assert tagged[0] >= 6
    assert list((up.home / "work").iterdir()) == []  # every stage has cleared its folder


FAILING_FLOW = """
from prefect import flow, task
from flows.logs import quiet_terminal, shorten_user_errors
from rlhf_core.errors import DataError

@task
def read(error):
    raise error

@flow
def failing(kind: str):
    read(DataError("pairs.jsonl:3: chosen is empty: delete the row.") if kind == "user"
         else ZeroDivisionError("a defect"))

import sys
shorten_user_errors()
if sys.argv[2] == "quiet":
    quiet_terminal()
try:
    failing(sys.argv[1])
except Exception as error:
    print(type(error).__name__)
"""


def run_failing(up: Up, kind: str, terminal: str) -> tuple[str, str, list[str]]:
    """Output, errors, and what Prefect keeps of the log of a flow that fails."""
    before = {run["id"] for run in up.ask("/flow_runs/filter", {})}
    environment = {
        **os.environ,
        "PREFECT_API_URL": f"http://127.0.0.1:{up.prefect}/api",
        "PREFECT_HOME": str(up.home / "prefect"),
    }
    done = subprocess.run(
        [sys.executable, "-c", FAILING_FLOW, kind, terminal],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    (flow_run,) = {run["id"] for run in up.ask("/flow_runs/filter", {})} - before
    question = {"logs": {"flow_run_id": {"any_": [flow_run]}}}

    def messages():
        found = [log["message"] for log in up.ask("/logs/filter", question)]
        return found if any("Finished in state" in text for text in found) else []

    return done.stdout, done.stderr, wait_until(messages, 20)


@pytest.mark.integration
def test_prefect_keeps_the_sentence_of_a_user_error_without_a_traceback(up):
    output, errors, messages = run_failing(up, "user", "loud")
    assert output == "DataError\n"
    for text in (errors, "\n".join(messages)):
        assert "Traceback" not in text
        assert "pairs.jsonl:3: chosen is empty: delete the row." in text


@pytest.mark.integration
def test_prefect_keeps_the_traceback_of_a_defect_and_the_terminal_stays_quiet(up):
    output, errors, messages = run_failing(up, "defect", "quiet")
    assert (output, errors) == ("ZeroDivisionError\n", "")
    assert any("Traceback" in text and "a defect" in text for text in messages)


@pytest.mark.integration
def test_interrupt_stops_everything_and_says_so(up):
    """The last test with `up`: it stops it."""
    started = time.monotonic()
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(30) == 0
    assert time.monotonic() - started < 30
    assert up.processes() == []
    assert "All services have been stopped." in up.output.read_text()
    assert "Traceback" not in up.output.read_text()
    assert services.running(local(up.home)) is None


@pytest.mark.integration
def test_kill_leaves_no_orphan(tmp_path):
    running = Up(tmp_path)
    wait_until(lambda: (running.home / "logs" / "mlflow.log").exists())
    wait_until(lambda: len(running.processes()) >= 3)
    running.kill()  # waits until there is no process of this home, and fails if there stays one
    assert services.running(local(running.home)) is None

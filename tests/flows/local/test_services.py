"""The local services: started together, found by other commands, and never left behind."""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import chain, combinations
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from flows.cli.loading import load_config
from flows.config import PipelineConfig
from flows.local import find, reaper, serve
from flows.local.supervisor import Service, ServiceError, Supervisor
from rlhf_core.errors import UserError
from tasks.feedback.store.store import Store
from tasks.servers.client import ask
from tasks.settings import Settings

PORT_OPTIONS = ("--prefect-port", "--mlflow-port", "--label-port")
TINY = Path(__file__).parents[1] / "tiny.yaml"
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


# ---- the reaper ----


def start_marked(mark: str, code: str, *arguments: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, reaper.VARIABLE: mark},
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"ready\n"
    return process


def test_the_guard_ends_children_first_wherever_they_went(tmp_path):
    process = start_marked("test:tree", PARENT, str(tmp_path / "status"))
    wait_until(lambda: len(reaper.marked("test:tree")) == 2)
    reaper.end(["test:tree"])
    assert reaper.marked("test:tree") == set()
    # The parent was still there to see its child end, by SIGTERM.
    assert (tmp_path / "status").read_text() == str(-signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    process.stdout.close()


def test_the_guard_kills_what_does_not_listen(monkeypatch):
    monkeypatch.setattr(reaper, "GRACE_SECONDS", 0.3)
    process = start_marked("test:stubborn", STUBBORN)
    reaper.end(["test:stubborn"])
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


def test_the_guard_leaves_others_alone():
    process = start_marked("test:other", STUBBORN)
    reaper.end(["test:mine", "test:oth"])
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
        f"b ended (exit status 3). The end of {tmp_path / 'logs' / 'b.log'}:",
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

    monkeypatch.setattr("flows.local.supervisor.START_SECONDS", 0.3)
    slow = Service("a", SLEEPER, {}, lambda: "it is thinking")
    with pytest.raises(ServiceError, match=r"a was not ready within 0 s \(it is thinking\)"):
        run()


def test_a_killed_supervisor_leaves_nothing_behind(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from flows.local.supervisor import Service, Supervisor
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
    # itself, reaper, service
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
    found = find.join(local(tmp_path / "home"), prefect=True)
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
        find.join(local(tmp_path, **{variable: address}), prefect=True)
    text = str(caught.value)
    assert f"The {name} server at {address} does not respond" in text
    assert f"set {variable} to its address" in text


@pytest.mark.parametrize(
    ("variable", "name"), [("MLFLOW_TRACKING_URI", "MLflow"), ("PREFECT_API_URL", "Prefect")]
)
def test_a_page_is_not_taken_for_a_server(tmp_path, own_environment, variable, name):
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<!doctype html>\x1b[31m<title>It works!</title>")

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError) as caught:
            find.join(local(tmp_path, **{variable: address}), prefect=True)
        server.shutdown()
    said = str(caught.value)
    assert f"The {name} server at {address} does not respond (it answers '<!doctype html>" in said
    assert "where its version should be" in said
    assert "\x1b" not in said


def test_a_full_disk_is_told_before_a_server_starts_on_it(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "LEAST_SPACE", 2**62)
    with (
        pytest.raises(UserError, match=r"^The disk is full: \d+ MiB are free for "),
        serve.prefect_server(local(tmp_path)),
    ):
        pass


def test_a_home_that_cannot_be_made_is_named(own_environment):
    with pytest.raises(UserError, match=r"RLHF_HOME cannot be used: /dev/null/x .*; set it to"):
        find.join(local(Path("/dev/null/x")))


def test_a_state_file_is_believed_only_while_its_writer_lives(tmp_path):
    settings = local(tmp_path)
    state = find.Services("http://127.0.0.1:1", "http://127.0.0.1:2", 7)
    with (tmp_path / "services.json").open("w") as file:
        json.dump(state._asdict(), file)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert find.running(settings) == state
        file.truncate(0)
        with pytest.raises(UserError, match="still starting"):
            find.running(settings)
    # The writer is gone without having cleaned up, as after SIGKILL.
    (tmp_path / "services.json").write_text(json.dumps(state._asdict()))
    assert find.running(settings) is None


def test_what_a_server_logs_as_an_error_is_told_once(tmp_path):
    answers = {"prefect": ["scheduler: failed"], "mlflow": []}

    class Errors(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/errors"
            known = self.headers["Authorization"] == f"Basic {b64encode(b'rlhf:pw').decode()}"
            name = "prefect" if self.server.server_port == ports[0] else "mlflow"
            body = json.dumps(answers[name]).encode()
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    servers = [HTTPServer(("127.0.0.1", 0), Errors) for _ in range(2)]
    ports = [server.server_port for server in servers]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    addresses = [f"http://127.0.0.1:{port}" for port in ports]
    told = []
    settings = local(tmp_path, RLHF_PASSWORD="pw")
    reports = serve._ErrorReports(
        find.Services(*addresses, 1), settings, lambda *what: told.append(what)
    )
    reports.EVERY_SECONDS = 0
    reports.look()
    reports.look()
    answers["mlflow"] = ["uvicorn.error: broken"]
    answers["prefect"].append("scheduler: failed otherwise")
    reports.look()
    for server in servers:
        server.shutdown()
        server.server_close()
    reports.look()  # one that does not answer is asked again later
    logs = settings.home / "logs"
    assert told == [
        ("prefect", "scheduler: failed", logs / "prefect.log"),
        ("prefect", "scheduler: failed otherwise", logs / "prefect.log"),
        ("mlflow", "uvicorn.error: broken", logs / "mlflow.log"),
    ]


# ---- rlhf up ----


def rlhf(*arguments: str, home: Path, **options) -> subprocess.Popen:
    """The command as its script starts it: without the working folder among Python's folders."""
    names = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RLHF_MLFLOW_URL", "RLHF_PREFECT_URL")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "rlhf_command", *arguments],
        env={**environment, "RLHF_HOME": str(home), "COLUMNS": "200"},
        text=True,
        **options,
    )


def finish(process: subprocess.Popen, seconds: float = 60) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=seconds)
    return process.returncode, output, errors


def captured(*arguments: str, home: Path) -> tuple[int, str, str]:
    return finish(rlhf(*arguments, home=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE))


HOSTILE = {"tasks.py", "flows", "rlhf_core", ".env", "prefect.toml", "pyproject.toml", "my-configs"}


def make_hostile(folder: Path) -> None:
    """What a user's folder may hold: our names, and settings that Prefect would read there."""
    (folder / "tasks.py").write_text("raise SystemExit('the tasks.py of the user')")
    (folder / "flows").mkdir()
    (folder / "flows" / "__init__.py").write_text("raise SystemExit('the flows of the user')")
    (folder / "rlhf_core").mkdir()
    (folder / ".env").write_text("PREFECT_API_URL=http://127.0.0.1:9/api\n")
    (folder / "prefect.toml").write_text('[api]\nurl = "http://127.0.0.1:9/api"\n')
    (folder / "pyproject.toml").write_text('[project]\nname = "theirs"\nversion = "1"\n')


class Up:
    """A running `rlhf up` with free ports, in a folder of a user that has our names in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "user"
        self.home = folder / "home"
        self.configs = self.folder / "my-configs"
        self.configs.mkdir(parents=True)
        make_hostile(self.folder)
        shutil.copy(TINY, self.configs)
        self.prefect, self.mlflow, self.label = free_port(), free_port(), free_port()
        self.output = folder / "output"
        self._proof: dict[str, str] = {}
        with self.output.open("w") as output:
            self.process = rlhf(
                *("up", "--configs", "my-configs"),
                *("--prefect-port", str(self.prefect), "--mlflow-port", str(self.mlflow)),
                *("--label-port", str(self.label)),
                home=self.home,
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def ready(self) -> "Up":
        def check():
            assert self.process.poll() is None, self.output.read_text()
            return "prints new ones" in self.output.read_text()

        wait_until(check, 180)
        return self

    def processes(self) -> list[int]:
        return with_variable(f"RLHF_HOME={self.home}")

    @property
    def settings(self) -> Settings:
        password = (self.home / "password").read_text()
        return local(self.home, RLHF_PASSWORD=password)

    def ask(self, path: str, question: object = None, method: str = "") -> object:
        """What Prefect answers to somebody with the password and a token against CSRF."""
        api, account = f"http://127.0.0.1:{self.prefect}/api", self.settings.account
        if not self._proof:
            token = json.loads(ask(f"{api}/csrf-token?client=test", account=account))["token"]
            self._proof = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "test"}
        body = None if question is None else json.dumps(question).encode()
        credentials = b64encode(account.encode()).decode()
        request = Request(
            api + path,
            data=body,
            method=method or None,
            headers={
                "Authorization": f"Basic {credentials}",
                "Content-Type": "application/json",
                **self._proof,
            },
        )

        def answered():
            try:
                with urlopen(request, timeout=30) as answer:
                    return [json.loads(answer.read() or "null")]
            except HTTPError as error:
                if error.code != 503:  # its database is busy; Prefect's client asks again, too
                    raise
                return None

        return wait_until(answered, 60)[0]

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
        "label.log",
        "worker.log",
        "deploy.log",
    }


@pytest.mark.integration
def test_up_serves_on_the_loopback_address_alone(up):
    for port in (up.prefect, up.mlflow, up.label):
        listening = [
            line.split()
            for line in Path("/proc/net/tcp").read_text().splitlines()
            if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
        ]
        assert [fields[1].split(":")[0] for fields in listening] == ["0100007F"]


@pytest.mark.integration
def test_up_serves_the_page_for_annotators(up):
    """A link of `rlhf feedback invite` leads to it; secrets are in no log and no command line."""
    Store.open(up.settings).project("people", make=True)
    code, link, errors = captured("feedback", "invite", "people", home=up.home)
    assert (code, errors) == (0, "")
    assert link.startswith(f"http://127.0.0.1:{up.label}/enter/")
    assert b"Come in" in ask(link.strip())
    assert f"People label at http://127.0.0.1:{up.label}" in up.output.read_text()
    logs = "".join(log.read_text() for log in (up.home / "logs").iterdir())
    assert link.strip().rpartition("/")[2] not in logs
    code, _, errors = captured("label", "people", "--port", str(up.label), home=up.home)
    assert code == 2
    assert "`rlhf up` serves the page at" in errors
    code, _, errors = captured("label", "nobody", "--port", str(free_port()), home=up.home)
    assert (code, "there is no feedback project 'nobody'" in errors) == (2, True)


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
    assert deployment["job_variables"] == {"working_dir": str(up.configs)}


@pytest.mark.integration
def test_other_commands_find_the_services_of_their_home(up, own_environment):
    found = find.join(local(up.home), prefect=True)
    assert found.tracking_uri == f"http://127.0.0.1:{up.mlflow}"
    assert found.prefect_api_url == f"http://127.0.0.1:{up.prefect}/api"
    assert found.mlflow_public_url == f"http://127.0.0.1:{up.mlflow}"
    assert found.prefect_public_url == f"http://127.0.0.1:{up.prefect}"
    assert os.environ["PREFECT_API_AUTH_STRING"] == up.settings.account
    assert f"rlhf:{os.environ['MLFLOW_TRACKING_PASSWORD']}" == up.settings.account


@pytest.mark.integration
def test_the_password_goes_to_the_servers_of_the_home_and_to_no_other(up, own_environment):
    heard = []

    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        other = f"http://127.0.0.1:{server.server_port}"
        find.join(local(up.home, MLFLOW_TRACKING_URI=other), prefect=True)
        server.shutdown()
    assert heard == [None]
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ
    assert os.environ["PREFECT_API_AUTH_STRING"] == up.settings.account


# ---- what web pages and other users of the machine may do to it ----


def curl(*arguments: str) -> tuple[int, str, str]:
    """Status, headers and body of an answer, as a program of anybody gets it."""
    command = ["curl", "--silent", "--include", "--max-time", "30", "--header", "Expect:"]
    command += arguments
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    head, _, body = text.partition("\n\n" if "\r\n" not in text else "\r\n\r\n")
    return int(head.split()[1]), head, body


JSON = ("--header", "Content-Type: application/json")
EVIL = "https://evil.example"


def attack(up: Up, *headers: str) -> tuple[int, str]:
    """Start a run whose command is another one, knowing the id of a deployment."""
    deployment = up.ask("/deployments/name/rlhf/tiny")["id"]
    mark = up.folder.parent / "attacked"
    question = json.dumps({"job_variables": {"command": f"touch {mark}"}})
    url = f"http://127.0.0.1:{up.prefect}/api/deployments/{deployment}/create_flow_run"
    status, _, body = curl("--request", "POST", url, *JSON, "--data", question, *headers)
    time.sleep(8)  # the worker asks every three seconds
    assert not mark.exists()
    assert not up.ask(
        "/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
    )
    return status, body


@pytest.mark.integration
@pytest.mark.parametrize("server", ["prefect", "mlflow"])
def test_a_page_of_others_may_not_even_ask_whether_it_may_ask(up, server):
    path = {"prefect": "/api/deployments/filter", "mlflow": "/api/2.0/mlflow/runs/search"}[server]
    url = f"http://127.0.0.1:{getattr(up, server)}{path}"
    wants = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: content-type")
    headers = [word for text in (f"Origin: {EVIL}", *wants) for word in ("--header", text)]
    status, head, _ = curl("--request", "OPTIONS", url, *headers)
    assert status == 403
    assert "access-control-allow-origin" not in head.lower()
    for origin in (
        EVIL,
        "null",
        f"http://127.0.0.1:{free_port()}",
        "http://127.0.0.1.evil.example",
    ):
        status, head, _ = curl(url, "--request", "POST", *JSON, "--header", f"Origin: {origin}")
        assert (status, "access-control-allow-origin" in head.lower()) == (403, False), origin


@pytest.mark.integration
@pytest.mark.parametrize("host", ["evil.example", "10.evil.example", "127.0.0.1.evil.example"])
def test_a_name_that_somebody_lets_point_here_is_not_answered(up, host):
    password = up.settings.account
    for port, path in ((up.prefect, "/api/health"), (up.mlflow, "/version")):
        url = f"http://127.0.0.1:{port}{path}"
        for name in (host, f"{host}:{port}"):
            assert curl(url, "--user", password, "--header", f"Host: {name}")[0] == 403, name
        for name in ("127.0.0.1", "localhost"):
            header = f"Host: {name}:{port}"
            assert curl(url, "--user", password, "--header", header)[0] == 200, name


@pytest.mark.integration
def test_a_page_of_others_cannot_start_a_command(up):
    status, body = attack(up, "--header", f"Origin: {EVIL}")
    assert status == 403
    assert EVIL in body


@pytest.mark.integration
def test_another_user_of_the_machine_cannot_start_a_command(up):
    assert attack(up)[0] in (401, 403)
    wrong = ("--user", "rlhf:wrong")
    assert attack(up, *wrong)[0] in (401, 403)
    for page in (
        f"http://127.0.0.1:{up.prefect}/api/flow_runs/count",
        f"http://127.0.0.1:{up.prefect}/api/csrf-token?client=x",
        f"http://127.0.0.1:{up.prefect}/errors",
        f"http://127.0.0.1:{up.mlflow}/",
        f"http://127.0.0.1:{up.mlflow}/errors",
        f"http://127.0.0.1:{up.mlflow}/version",
        f"http://127.0.0.1:{up.mlflow}/api/2.0/mlflow/experiments/search?max_results=1",
        f"http://127.0.0.1:{up.mlflow}/ajax-api/2.0/mlflow/experiments/search?max_results=1",
        f"http://127.0.0.1:{up.mlflow}/api/2.0/mlflow-artifacts/artifacts",
    ):
        assert curl(page)[0] in (401, 403, 405), page
        assert curl(page, *wrong)[0] in (401, 403, 405), page


@pytest.mark.integration
@pytest.mark.parametrize(
    "variables",
    [{"command": "touch attacked"}, {"env": {"PYTHONPATH": "/tmp"}}, {"image": "theirs"}],
)
def test_job_variables_choose_neither_command_nor_environment(up, variables):
    """Not even of somebody with the password."""
    deployment = up.ask("/deployments/name/rlhf/tiny")["id"]
    question = {"job_variables": variables, "state": {"type": "SCHEDULED"}}
    with pytest.raises(HTTPError) as refused:
        up.ask(f"/deployments/{deployment}/create_flow_run", question)
    assert refused.value.code == 422
    assert f"'{next(iter(variables))}' was unexpected" in refused.value.read().decode()


@pytest.mark.integration
def test_what_is_sent_through_mlflow_lands_in_the_home(up):
    address = f"http://127.0.0.1:{up.mlflow}/api/2.0/mlflow-artifacts/artifacts/of/a/note.txt"
    user = ("--user", up.settings.account)
    assert curl("--upload-file", str(TINY), address, *user)[0] == 200
    assert (up.home / "mlflow/artifacts/of/a/note.txt").read_bytes() == TINY.read_bytes()


@pytest.mark.integration
def test_a_link_signs_in_one_browser_once(up):
    code, output, errors = captured("sign-in", home=up.home)
    assert (code, errors) == (0, "")
    links = [word for word in output.split() if "/sign-in?token=" in word]
    prefect, mlflow = links
    assert prefect.startswith(f"http://127.0.0.1:{up.prefect}/")
    assert mlflow.startswith(f"http://127.0.0.1:{up.mlflow}/")

    stored = b64encode(up.settings.account.encode()).decode()
    status, head, body = curl(prefect)
    assert (status, "no-store" in head.lower()) == (200, True)
    assert f'localStorage.setItem("prefect-password", "{stored}")' in body
    status, raw, body = curl(mlflow)
    (cookie,) = (line for line in raw.lower().splitlines() if line.startswith("set-cookie:"))
    assert (status, "httponly" in cookie, "samesite=lax" in cookie) == (303, True, True)
    session = re.search(r"(?i)set-cookie: ([^;]+)", raw)[1]
    page = f"http://127.0.0.1:{up.mlflow}/version"
    assert curl(page, "--cookie", session)[0] == 200
    assert curl(page, "--cookie", session[:-3] + "xyz")[0] == 401
    foreign = ("--header", f"Origin: {EVIL}")  # not even with the cookie
    assert curl(page, "--cookie", session, *foreign)[0] == 403
    for link in links:
        status, _, body = curl(link)
        assert (status, "`rlhf sign-in` prints a new one" in body) == (403, True)
        assert stored not in body


@pytest.mark.integration
def test_the_home_and_the_password_are_the_owners_alone(up):
    assert stat.S_IMODE(up.home.stat().st_mode) == 0o700
    assert stat.S_IMODE((up.home / "password").stat().st_mode) == 0o600
    assert len((up.home / "password").read_text()) >= 40


@pytest.mark.integration
def test_a_second_up_in_the_same_home_says_so(up):
    code, output, errors = captured("up", home=up.home)
    assert (code, output) == (2, "")
    assert "`rlhf up` is already running" in errors
    assert f"http://127.0.0.1:{up.prefect}" in errors
    assert "Traceback" not in errors


@pytest.mark.integration
@pytest.mark.parametrize("option", PORT_OPTIONS)
def test_a_port_in_use_is_named_with_its_option(up, tmp_path, option):
    ports = {name: str(free_port()) for name in PORT_OPTIONS} | {option: str(up.prefect)}
    code, output, errors = captured("up", *chain(*ports.items()), home=tmp_path)
    assert (code, output) == (2, "")
    sentence = (
        f"Port {up.prefect} is already in use: free it, or choose another port with {option}."
    )
    assert sentence in errors
    assert "Traceback" not in errors


@pytest.mark.integration
@pytest.mark.parametrize("options", list(combinations(PORT_OPTIONS, 2)))
def test_two_ports_the_same(tmp_path, options):
    port = str(free_port())
    code, _, errors = captured("up", *chain(*((name, port) for name in options)), home=tmp_path)
    assert code == 2
    assert f"{options[0]} and {options[1]} are both {port}" in errors
    assert "choose different ports" in errors


@pytest.mark.integration
def test_a_folder_without_configs_is_named_at_once(tmp_path):
    code, _, errors = captured("up", "--configs", str(tmp_path), home=tmp_path / "home")
    assert code == 2
    assert f"{tmp_path} has no .yaml file: pass the folder of the configs." in errors


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
        [sys.executable, "-c", code],
        env=os.environ | up.settings.mlflow_credentials(),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    run_id = made.stdout.split()[-1]
    from mlflow import MlflowClient

    database = MlflowClient(f"sqlite:///{up.home / 'mlflow' / 'mlflow.db'}")
    location = database.get_run(run_id).info.artifact_uri
    assert (Path(location.removeprefix("file://")) / "note.txt").read_text() == "hello"


@pytest.mark.integration
def test_a_schedule_retrains_from_nothing_to_a_new_version(up):
    """By itself, from a folder of a user that has a `tasks.py`, into the MLflow of this home."""
    deployment = up.ask("/deployments/name/retrain/tiny")
    (schedule,) = deployment["schedules"]
    assert not schedule["active"]
    place = f"/deployments/{deployment['id']}/schedules/{schedule['id']}"
    every_minute = {"cron": "* * * * *", "timezone": "UTC"}
    up.ask(place, {"active": True, "schedule": every_minute}, "PATCH")
    ours = {"flow_runs": {"deployment_id": {"any_": [deployment["id"]]}}}

    def upcoming():
        found = up.ask("/flow_runs/filter", ours)
        return [run for run in found if run["auto_scheduled"] and run["state_type"] == "SCHEDULED"]

    assert len(wait_until(upcoming, 60)) >= 2

    def first():
        started = [run for run in up.ask("/flow_runs/filter", ours) if run["start_time"]]
        return started[0] if started else None

    run = wait_until(first, 180)
    up.ask(place, {"active": False, "schedule": every_minute}, "PATCH")

    def final():
        found = up.ask(f"/flow_runs/{run['id']}")
        return found["state_type"] not in ("SCHEDULED", "PENDING", "RUNNING") and found["state"]

    state = wait_until(final, 240)
    assert state["type"] == "COMPLETED", state["message"]
    assert not upcoming()  # switched off is switched off
    with sqlite3.connect(up.home / "mlflow" / "mlflow.db") as database:
        query = "select name, status from runs where name <> 'bare'"
        statuses = dict(database.execute(query))
        versions = dict(
            database.execute("select name, max(version) from model_versions group by 1")
        )
    stages = {name.partition("-seed-")[0] for name in statuses}
    assert {"prepare", "sft", "reward_model", "ppo", "evaluation"} < stages
    assert set(statuses.values()) == {"FINISHED"}
    assert versions == dict.fromkeys(("tiny-sft", "tiny-reward", "tiny-policy", "tiny-critic"), 1)
    assert list((up.home / "work").iterdir()) == []  # every stage has cleared its folder
    assert {
        path.name for path in up.folder.iterdir()
    } == HOSTILE  # and nothing came into the user's


FAILING_FLOW = """
from prefect import flow, task
from flows.cli.logs import quiet_terminal, shorten_user_errors
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
        **up.settings.prefect_credentials(),
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
    assert find.running(local(up.home)) is None
    assert not (up.home / "password").exists()


@pytest.mark.integration
def test_kill_leaves_no_orphan(tmp_path):
    running = Up(tmp_path)
    wait_until(lambda: (running.home / "logs" / "mlflow.log").exists())
    wait_until(lambda: len(running.processes()) >= 3)
    running.kill()  # waits until there is no process of this home, and fails if there stays one
    assert find.running(local(running.home)) is None

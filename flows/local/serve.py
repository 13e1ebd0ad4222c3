"""`rlhf up`: Prefect, MLflow, the page for annotators and a worker; and the server of a single run.

All listen only on the loopback address. Other users and web pages can reach that address, so the
servers require a password, which is generated at each start and kept in a file that only the owner
of the home can read. The page for annotators has invitation links instead. They use the same data
as `rlhf run` without a server, so there is one history.
"""

import errno
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import IO
from uuid import uuid4

from flows.cli.loading import config_files, packaged_presets
from flows.local import allocator
from flows.local.find import (
    HOST,
    POOL,
    Services,
    make_home,
    password_file,
    read_state,
    require_space,
    state_file,
    with_password,
)
from flows.local.keeper import Keeper
from flows.local.supervisor import Service, Supervisor
from rlhf_core.errors import UserError
from tasks.servers import error_log
from tasks.servers.client import ask, unreachable
from tasks.settings import PASSWORD_LENGTH, Settings

# For a server that only one run speaks to: nobody can open its pages, and the list of Prefect's
# blocks, which `rlhf up` puts in the database too, is for them.
WITHOUT_PAGES = {
    "PREFECT_SERVER_UI_ENABLED": "false",
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
}


def up(
    settings: Settings,
    *,
    prefect_port: int,
    mlflow_port: int,
    label_port: int,
    configs: Path,
    on_ready: Callable[[Services, Settings], None],
    on_error: Callable[[str, str, Path], None],
    until: Callable[[], bool] = lambda: False,
) -> None:
    """Run Prefect, MLflow, the page for annotators, and a worker with a deployment for each config,
    until interrupted, or until `until()` is true.

    `on_ready` is called once with the addresses and the settings with the password; `on_error` for
    each error that a server logs, with its name, the error and its log. However this function ends,
    it leaves no process behind.

    Raises:
        UserError: a port is in use, there is no config, or `rlhf up` is running for this home.
        ServiceError: a service ended; the others have been stopped.
        KeyboardInterrupt: Ctrl-C or SIGTERM; all have been stopped.
    """
    if not Path("/proc/self/environ").exists():
        raise UserError(
            "`rlhf up` needs Linux; elsewhere run `prefect server start` and `mlflow server`, and "
            "set PREFECT_API_URL and MLFLOW_TRACKING_URI."
        )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    services = Services(
        f"http://{HOST}:{prefect_port}",
        f"http://{HOST}:{mlflow_port}",
        os.getpid(),
        label_address(settings, label_port),
    )
    with _claim(settings) as state, _password(settings) as settings:
        require_space(settings.home)
        config_files(configs)
        ports = {"prefect": prefect_port, "mlflow": mlflow_port, "label": label_port}
        check_ports({f"--{name}-port": port for name, port in ports.items()})
        with Supervisor(settings.home, ("worker", "deploy", "label", "mlflow", "prefect")) as group:
            servers = (
                _prefect(settings, services.prefect),
                _mlflow(settings, services.mlflow),
                _label(settings, services, label_port),
            )
            for server in servers:
                group.start(server)
            group.until_ready(*servers)
            clients = _client_environment(settings, services, configs)
            group.run(_deploy(configs, clients))
            worker = _worker(services, clients)
            group.start(worker)
            group.until_ready(worker)
            json.dump(services._asdict(), state)
            state.flush()
            on_ready(services, settings)
            reports = _ErrorReports(services, settings, on_error)
            while not until():
                group.check()
                reports.look()
                time.sleep(0.5)


class _ErrorReports:
    """Reports each error that the servers log, once; a part of a server may fail silently."""

    EVERY_SECONDS = 15.0

    def __init__(
        self, services: Services, settings: Settings, report: Callable[[str, str, Path], None]
    ) -> None:
        self._servers = {"prefect": services.prefect, "mlflow": services.mlflow}
        self._settings = settings
        self._report = report
        self._reported: set[tuple[str, str]] = set()
        self._next = 0.0

    def look(self) -> None:
        """Query both servers, at most every `EVERY_SECONDS`."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self.EVERY_SECONDS
        for name, address in self._servers.items():
            for error in _errors(address, self._settings.account):
                if (name, error) not in self._reported:
                    self._reported.add((name, error))
                    self._report(name, error, self._settings.home / "logs" / f"{name}.log")


def _errors(address: str, account: str) -> list[str]:
    """The errors that a server logged recently; empty if it is busy, as we ask again later."""
    try:
        return [str(line) for line in json.loads(ask(address + error_log.PATH, account=account))]
    except (OSError, ValueError):
        return []


@contextmanager
def _password(settings: Settings) -> Iterator[Settings]:
    """Settings with the password of this start, which other commands read from a file."""
    settings = with_password(settings, secrets.token_urlsafe(32))
    password = settings.password.get_secret_value()
    if len(password) < PASSWORD_LENGTH:
        raise UserError(
            f"RLHF_PASSWORD has {len(password)} characters: use {PASSWORD_LENGTH} or more, or "
            "unset it to have one generated at each start."
        )
    path = password_file(settings)
    path.unlink(missing_ok=True)  # a rewritten file would keep its permissions
    path.touch(0o600, exist_ok=False)
    path.write_text(password, encoding="utf-8")
    try:
        yield settings
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def prefect_server(
    settings: Settings, say: Callable[[str], None] = lambda text: None
) -> Iterator[Callable[[], None]]:
    """Run a Prefect server for the duration of the block, unless one is in use already.

    Unlike the server that Prefect itself starts on demand, this one is not reached by Ctrl-C in the
    terminal, so an interrupted run can still report its end; it always ends with this process; and
    it is restarted if it ends early.

    Args:
        say: receives a message when the server ends and when it is running again.

    Yields: a function that waits until the server is ready; call it before the first flow starts.

    Raises:
        ServiceError: the server ended and could not be restarted.
    """
    if settings.prefect_api_url:
        yield lambda: None
        return
    require_space(settings.home)
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        address = f"http://{HOST}:{probe.getsockname()[1]}"
    settings = with_password(settings, secrets.token_urlsafe(32))
    os.environ |= {
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_API_AUTH_STRING": settings.account,
    }
    server = _prefect(settings, address, name="prefect-of-run")
    server = server._replace(environment={**server.environment, **WITHOUT_PAGES})
    with Supervisor(settings.home, (server.name,)) as group:
        group.start(server)
        with Keeper(group, server, say) as keeper:

            def ready() -> None:
                group.until_ready(server)
                keeper.watch()

            yield ready


@contextmanager
def _claim(settings: Settings) -> Iterator[IO[str]]:
    """Open the state file of this home, empty and locked, so that only one `rlhf up` runs."""
    make_home(settings)
    path = state_file(settings)
    with path.open("a+") as file:
        for attempt in range(10):  # another command may be reading the file
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1 if attempt < 9 else 0)
        else:
            file.seek(0)
            there = read_state(file)
            raise UserError(
                f"`rlhf up` is already running for {settings.home} (process {there.pid}): Prefect "
                f"at {there.prefect}, MLflow at {there.mlflow}. Stop it with Ctrl-C in its "
                "terminal, or set RLHF_HOME to another folder."
            )
        file.truncate(0)
        try:
            yield file
        finally:
            file.truncate(0)


def check_ports(options: Mapping[str, int], host: str = HOST) -> None:
    """Raise UserError if a port is in use, or is the value of two options."""
    for (one, port), (other, again) in combinations(options.items(), 2):
        if port == again:
            raise UserError(f"{one} and {other} are both {port}: choose different ports.")
    for option, port in options.items():
        with socket.socket(_family(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                taken = error.errno == errno.EADDRINUSE
                reason = "is already in use" if taken else f"cannot be used ({error.strerror})"
                raise UserError(
                    f"Port {port} {reason}: free it, or choose another port with {option}."
                ) from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def label_address(settings: Settings, port: int) -> str:
    """The address of the page for annotators: the one that was set, else that of this machine."""
    is_set = "label_public_url" in settings.model_fields_set
    return settings.label_public_url if is_set else f"http://{HOST}:{port}"


def _label(settings: Settings, services: Services, port: int) -> Service:
    environment = {
        **settings.environment(),
        "RLHF_LABEL_URL": services.label,
        "PREFECT_API_URL": f"{services.prefect}/api",  # it resumes runs that wait for people
    }
    command = _python("tasks.feedback.page.app", "--port", str(port))
    return Service(
        "label", command, environment, partial(unreachable, f"http://{HOST}:{port}/health")
    )


def _prefect(settings: Settings, address: str, name: str = "prefect") -> Service:
    port = address.rpartition(":")[2]
    environment = {
        **settings.environment(),
        "RLHF_PREFECT_URL": address,
        # Without it, the pages of a server on another port request their data from port 4200.
        "PREFECT_SERVER_UI_API_URL": f"{address}/api",
        "PREFECT_SERVER_API_AUTH_STRING": settings.account,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{address},http://localhost:{port}",
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
    }
    command = _python("tasks.servers.prefect_app", "--port", port)
    return Service(name, command, environment, partial(unreachable, f"{address}/api/health"))


def _mlflow(settings: Settings, address: str) -> Service:
    local = settings.model_copy(update={"tracking_uri": ""})
    port = address.rpartition(":")[2]
    artifacts = str(local.artifact_root)
    command = _python(
        *("mlflow", "server", "--app-name", "rlhf", "--host", HOST, "--port", port, "-w", "1"),
        *("--backend-store-uri", local.mlflow_uri),
        # Experiments keep plain paths, so that they can be read without a server; uploads through
        # the server go there as well, not into its working folder.
        *("--default-artifact-root", artifacts),
        *("--serve-artifacts", "--artifacts-destination", artifacts),
    )
    environment = {
        **local.environment(),
        "RLHF_MLFLOW_URL": address,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"{HOST}:{port},localhost:{port}",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"{address},http://localhost:{port}",
    }
    return Service("mlflow", command, environment, partial(unreachable, f"{address}/health"))


def _client_environment(settings: Settings, services: Services, configs: Path) -> dict[str, str]:
    return {
        "RLHF_CONFIG_FOLDER": str(_folder_of(configs)),  # its modules may be rewards
        **settings.environment(),
        "PREFECT_API_URL": f"{services.prefect}/api",
        "MLFLOW_TRACKING_URI": services.mlflow,
        "RLHF_PREFECT_URL": services.prefect,
        "RLHF_MLFLOW_URL": services.mlflow,
        **({"RLHF_LABEL_URL": services.label} if services.label else {}),
        "PREFECT_WORKER_QUERY_SECONDS": "3",
    }


def _deploy(configs: Path, environment: Mapping[str, str]) -> Service:
    folder = str(_folder_of(configs))
    command = _python("flows", "deploy", str(configs.resolve()), "--working-dir", folder)
    return Service("deploy", command, environment)


def _folder_of(configs: Path) -> Path:
    """The folder that relative paths of the presets start from: their own, as in `rlhf run`; for
    those of the package, which lie in no folder of the user, the working folder."""
    return Path.cwd() if configs == packaged_presets() else configs.resolve()


def _worker(services: Services, environment: Mapping[str, str]) -> Service:
    name = f"{POOL}-{services.pid}"
    pool = ("--pool", POOL, "--type", "process", "--name", name)
    command = _python("prefect", "worker", "start", *pool)
    with_allocator = {**environment, **allocator.ENVIRONMENT}  # inherited by its flow runs
    account = environment.get("PREFECT_API_AUTH_STRING", "")
    return Service("worker", command, with_allocator, partial(_absent, services, name, account))


def _absent(services: Services, worker: str, account: str) -> str:
    """Empty once Prefect has received a heartbeat of the worker."""
    api = f"{services.prefect}/api"
    client = uuid4().hex  # a POST needs a CSRF token
    try:
        token = json.loads(ask(f"{api}/csrf-token?client={client}", account=account))["token"]
        proof = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": client}
        workers = f"{api}/work_pools/{POOL}/workers/filter"
        answer = ask(workers, {}, account=account, **proof)
    except OSError as error:
        return str(error)
    names = [known["name"] for known in json.loads(answer)]
    return "" if worker in names else "Prefect has received no heartbeat from it"


def _python(module: str, *arguments: str) -> list[str]:
    """The command line of a module; with -P a `tasks.py` in the working folder is ignored."""
    return [sys.executable, "-P", "-m", module, *arguments]

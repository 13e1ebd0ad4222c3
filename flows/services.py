"""The local services: how a command finds MLflow and Prefect, and `rlhf up`, which runs them.

All listen on the loopback address alone. They keep their data where `rlhf run` keeps it when no
server runs, so one history is seen either way.
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
from pathlib import Path
from typing import IO, NamedTuple

from flows import memory
from flows.loading import config_files
from flows.supervisor import Service, Supervisor, ask, unreachable
from rlhf_core.errors import UserError
from tasks.settings import PASSWORD_LENGTH, Settings, apply_environment, read_settings

HOST = "127.0.0.1"
POOL = "rlhf"
OWNER = "rlhf-team"  # who answers for the deployments, unless they are told otherwise


class Services(NamedTuple):
    """A running `rlhf up`."""

    prefect: str
    mlflow: str
    pid: int


# ---- finding them ----


def join(settings: Settings, *, prefect: bool = False) -> Settings:
    """Make this process use the MLflow, and on demand the Prefect, that serve this home.

    A variable that the user has set wins; then a live `rlhf up` of this home; else MLflow is a
    database under the home, and Prefect starts a server for the length of the run. To be called
    before MLflow or Prefect is imported: they read their environment at import.

    Returns: the settings as they are now.

    Raises:
        UserError: an address that does not answer, or a home that cannot be written.
    """
    for name, value in _addresses(settings, prefect).items():
        os.environ.setdefault(name, value)
    apply_environment(settings)
    make_home(settings)
    return read_settings()


def make_home(settings: Settings) -> None:
    """Create the folders under the home.

    Raises:
        UserError: they cannot be made.
    """
    try:
        for folder in ("mlflow/artifacts", "prefect", "logs"):
            (settings.home / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{settings.home} cannot be used to keep things in ({error.strerror}): set RLHF_HOME "
            "to a folder of yours."
        ) from None


def _addresses(settings: Settings, with_prefect: bool) -> dict[str, str]:
    """The variables that say where the servers are, once each has answered."""
    given = settings.tracking_uri and (settings.prefect_api_url or not with_prefect)
    services = None if given else running(settings)
    mlflow = settings.tracking_uri or (services.mlflow if services else "")
    prefect = settings.prefect_api_url or (f"{services.prefect}/api" if services else "")
    found: dict[str, str] = {}
    if mlflow.startswith(("http://", "https://")):
        _expect(settings, mlflow, "/version", "MLflow", "MLFLOW_TRACKING_URI")
        found |= {"MLFLOW_TRACKING_URI": mlflow, "RLHF_MLFLOW_URL": mlflow}
    if prefect and with_prefect:
        _expect(settings, prefect, "/admin/version", "Prefect", "PREFECT_API_URL")
        page = prefect.rstrip("/").removesuffix("/api")
        found |= {"PREFECT_API_URL": prefect, "RLHF_PREFECT_URL": page}
    return found


def running(settings: Settings) -> Services | None:
    """The `rlhf up` that serves this home, or None.

    Its state file is locked for as long as it lives and the kernel drops the lock with the
    process, so that a file which a killed one left behind is not believed.
    """
    path = _state_file(settings)
    if not path.exists():
        return None
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read_state(file)
    return None


def _read_state(file: IO[str]) -> Services:
    text = file.read()
    if not text:
        raise UserError(
            "`rlhf up` is just starting for this home: try again when it shows its addresses."
        )
    return Services(**json.loads(text))


def _state_file(settings: Settings) -> Path:
    return settings.home / "services.json"


def _expect(settings: Settings, address: str, path: str, name: str, variable: str) -> None:
    problem = unreachable(address.rstrip("/") + path, settings.account)
    if problem.startswith("it answers 401"):
        raise UserError(
            f"The {name} server at {address} asks for a password: set RLHF_PASSWORD to the one "
            "that it was started with."
        )
    if problem:
        raise UserError(
            f"The {name} server at {address} does not answer as one ({problem}): start it, or set "
            f"{variable} to where it runs; unset, {name} uses files under RLHF_HOME."
        )


# ---- running them ----


def up(
    settings: Settings,
    *,
    prefect_port: int,
    mlflow_port: int,
    configs: Path,
    on_ready: Callable[[Services, Path], None],
) -> None:
    """Run Prefect, MLflow and a worker with a deployment for each config, until interrupted.

    `on_ready` is called once with the addresses and the folder of the logs. Whichever way this
    ends, no process that it started is left.

    Raises:
        UserError: a port is taken, there is no config, or the services of this home run already.
        ServiceError: one of the services ended; the others have been stopped.
        KeyboardInterrupt: Ctrl-C or SIGTERM; all have been stopped.
    """
    if not Path("/proc/self/environ").exists():
        raise UserError(
            "`rlhf up` needs Linux; elsewhere start `prefect server start` and `mlflow server` and "
            "set PREFECT_API_URL and MLFLOW_TRACKING_URI."
        )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    services = Services(
        f"http://{HOST}:{prefect_port}", f"http://{HOST}:{mlflow_port}", os.getpid()
    )
    with _claim(settings) as state:
        config_files(configs)
        _check_ports(prefect_port, mlflow_port)
        with Supervisor(settings.home / "logs", ("worker", "deploy", "mlflow", "prefect")) as group:
            servers = _prefect(settings, services.prefect), _mlflow(settings, services.mlflow)
            for server in servers:
                group.start(server)
            group.until_ready(*servers)
            clients = _client_environment(settings, services)
            group.run(_deploy(configs, clients))
            worker = _worker(services, clients)
            group.start(worker)
            group.until_ready(worker)
            json.dump(services._asdict(), state)
            state.flush()
            on_ready(services, settings.home / "logs")
            while True:
                group.check()
                time.sleep(0.5)


@contextmanager
def prefect_server(settings: Settings) -> Iterator[Callable[[], None]]:
    """Prefect for the length of the block; nothing is started where a server is in use already.

    Unlike the server that Prefect itself starts on demand, this one is out of reach of Ctrl-C in
    the terminal, so that an interrupted run can still report its end; and it ends with this process
    however that ends.

    Yields: what waits until the server is ready, to be called before the first flow starts.
    """
    if settings.prefect_api_url:
        yield lambda: None
        return
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        address = f"http://{HOST}:{probe.getsockname()[1]}"
    os.environ["PREFECT_API_URL"] = f"{address}/api"
    server = _prefect(settings, address, name="prefect-of-run")
    with Supervisor(settings.home / "logs", (server.name,)) as group:
        group.start(server)
        yield partial(group.until_ready, server)


@contextmanager
def _claim(settings: Settings) -> Iterator[IO[str]]:
    """The state file of this home, emptied and locked: at most one `rlhf up` can have it."""
    make_home(settings)
    path = _state_file(settings)
    with path.open("a+") as file:
        for attempt in range(10):  # another command may look at the file at this very moment
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1 if attempt < 9 else 0)
        else:
            file.seek(0)
            there = _read_state(file)
            raise UserError(
                f"`rlhf up` already runs for {settings.home} (process {there.pid}): Prefect at "
                f"{there.prefect}, MLflow at {there.mlflow}. Stop it with Ctrl-C in its terminal, "
                "or set RLHF_HOME to another folder."
            )
        file.truncate(0)
        try:
            yield file
        finally:
            file.truncate(0)


def _check_ports(prefect_port: int, mlflow_port: int) -> None:
    options = (("--prefect-port", prefect_port), ("--mlflow-port", mlflow_port))
    if prefect_port == mlflow_port:
        raise UserError(
            f"--prefect-port and --mlflow-port are both {mlflow_port}: choose two different ones."
        )
    for option, port in options:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                taken = error.errno == errno.EADDRINUSE
                reason = "is already in use" if taken else f"cannot be used ({error.strerror})"
                raise UserError(
                    f"Port {port} {reason}: free it, or choose another one with {option}."
                ) from None


def _prefect(settings: Settings, address: str, name: str = "prefect") -> Service:
    port = address.rpartition(":")[2]
    # Without it, the pages of a server on another port ask port 4200 for their data.
    environment = {**settings.environment(), "PREFECT_SERVER_UI_API_URL": f"{address}/api"}
    if settings.account:
        environment["PREFECT_SERVER_API_AUTH_STRING"] = settings.account
    return Service(
        name,
        _python("prefect", "server", "start", "--host", HOST, "--port", port),
        environment,
        partial(unreachable, f"{address}/api/health"),
    )


def _mlflow(settings: Settings, address: str) -> Service:
    local = settings.model_copy(update={"tracking_uri": ""})
    command = _python(
        *("mlflow", "server", "--host", HOST, "--port", address.rpartition(":")[2], "-w", "1"),
        *("--backend-store-uri", local.mlflow_uri, "--serve-artifacts"),
        # Experiments keep their plain path, so that they can be read without a server too.
        *("--default-artifact-root", str(local.artifact_root)),
    )
    environment = {**local.environment(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    if settings.account:
        command += ["--app-name", "basic-auth"]
        environment |= _mlflow_account(settings)
    return Service("mlflow", command, environment, partial(unreachable, f"{address}/health"))


def _mlflow_account(settings: Settings) -> dict[str, str]:
    """One account, made anew at each start: MLflow would keep the password of the first."""
    user, _, password = settings.account.partition(":")
    if len(password) < PASSWORD_LENGTH:
        raise UserError(
            f"RLHF_PASSWORD has {len(password)} characters, and MLflow wants {PASSWORD_LENGTH} at "
            "least: take a longer one, or unset it to be asked for none."
        )
    accounts = settings.home / "mlflow" / "accounts.db"
    accounts.unlink(missing_ok=True)
    config = accounts.with_suffix(".ini")
    config.write_text(f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{accounts}\n")
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_USERNAME": user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(),
    }


def _client_environment(settings: Settings, services: Services) -> dict[str, str]:
    return {
        **settings.environment(),
        "PREFECT_API_URL": f"{services.prefect}/api",
        "MLFLOW_TRACKING_URI": services.mlflow,
        "RLHF_PREFECT_URL": services.prefect,
        "RLHF_MLFLOW_URL": services.mlflow,
        "PREFECT_WORKER_QUERY_SECONDS": "3",
    }


def _deploy(configs: Path, environment: Mapping[str, str]) -> Service:
    here = str(Path.cwd())
    command = _python("flows", "deploy", str(configs), "--working-dir", here)
    return Service("deploy", command, environment)


def _worker(services: Services, environment: Mapping[str, str]) -> Service:
    name = f"{POOL}-{services.pid}"
    pool = ("--pool", POOL, "--type", "process", "--name", name)
    command = _python("prefect", "worker", "start", *pool)
    keeping = {**environment, **memory.ENVIRONMENT}  # the processes of its runs inherit it
    account = environment.get("PREFECT_API_AUTH_STRING", "")
    return Service("worker", command, keeping, partial(_absent, services, name, account))


def _absent(services: Services, worker: str, account: str) -> str:
    """Empty once Prefect has heard from the worker."""
    workers = f"{services.prefect}/api/work_pools/{POOL}/workers/filter"
    try:
        answer = ask(workers, {}, account=account)
    except OSError as error:
        return str(error)
    names = [known["name"] for known in json.loads(answer)]
    return "" if worker in names else "Prefect has not heard from it"


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]

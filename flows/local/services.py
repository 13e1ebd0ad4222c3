"""The local services: how a command finds MLflow and Prefect, and `rlhf up`, which runs them.

All listen on the loopback address only, and ask for a password that is made at each start and kept
in a file of the home which its owner alone can read: other users and web pages reach that address
too. They keep their data where `rlhf run` keeps it when no server runs, so one history is seen
either way.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shutil import which
from typing import IO, NamedTuple, NoReturn
from uuid import uuid4

from pydantic import SecretStr

from flows.cli.loading import config_files
from flows.local import memory
from flows.local.keeper import Keeper
from flows.local.supervisor import Service, Supervisor
from rlhf_core.errors import UserError
from tasks.servers import error_log
from tasks.servers.client import ask, unreachable
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
    """Create the folders under the home, which is its owner's alone.

    Raises:
        UserError: they cannot be made.
    """
    home = settings.home
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if home.stat().st_uid == os.getuid():
            home.chmod(0o700)
        for folder in ("mlflow/artifacts", "prefect", "logs"):
            (home / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{settings.home} cannot be used to keep things in ({error.strerror}): set RLHF_HOME "
            "to a folder of yours."
        ) from None


def _addresses(settings: Settings, with_prefect: bool) -> dict[str, str]:
    """The variables that say where the servers are, once each has answered, and their password.

    The password of a running `rlhf up` goes to its own two addresses and nowhere else.
    """
    given = settings.tracking_uri and (settings.prefect_api_url or not with_prefect)
    services = None if given and settings.account else running(settings)
    mlflow = settings.tracking_uri or (services.mlflow if services else "")
    prefect = settings.prefect_api_url or (f"{services.prefect}/api" if services else "")
    found: dict[str, str] = {}
    if mlflow.startswith(("http://", "https://")):
        theirs = services is not None and _plain(mlflow) == services.mlflow
        known = _with_password(settings) if theirs else settings
        _expect(known, mlflow, "/version", "MLflow", "MLFLOW_TRACKING_URI")
        found |= {"MLFLOW_TRACKING_URI": mlflow, "RLHF_MLFLOW_URL": mlflow}
        found |= known.mlflow_credentials()
    if prefect and with_prefect:
        theirs = services is not None and _plain(prefect) == f"{services.prefect}/api"
        known = _with_password(settings) if theirs else settings
        _expect(known, prefect, "/admin/version", "Prefect", "PREFECT_API_URL")
        page = prefect.rstrip("/").removesuffix("/api")
        found |= {"PREFECT_API_URL": prefect, "RLHF_PREFECT_URL": page}
        found |= known.prefect_credentials()
    return found


def _plain(address: str) -> str:
    """An address as `rlhf up` writes its own."""
    return address.rstrip("/").replace("//localhost:", f"//{HOST}:")


def _with_password(settings: Settings, password: str = "") -> Settings:
    """The settings with a password: the user's own, else the given one, else that of the home."""
    if settings.account:
        return settings
    secret = SecretStr(password or _read_password(settings))
    return settings.model_copy(update={"password": secret})


def _read_password(settings: Settings) -> str:
    try:
        return _password_file(settings).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(
            f"`rlhf up` runs for {settings.home}, but its password cannot be read "
            f"({error.strerror}): be the user who started it, or set RLHF_PASSWORD."
        ) from None


def _password_file(settings: Settings) -> Path:
    return settings.home / "password"


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


def signed_in(settings: Settings) -> tuple[Services, Settings]:
    """The servers that a browser can sign in to, and the settings with their password.

    Those of the stack are known where its password is in the environment, else those of the running
    `rlhf up` of this home.

    Raises: UserError when there are none.
    """
    if settings.account and settings.prefect_api_url:
        return Services(settings.prefect_public_url, settings.mlflow_public_url, 0), settings
    services = running(settings)
    if services is None:
        raise UserError(f"No `rlhf up` runs for {settings.home}: start it, or set RLHF_HOME.")
    return services, _with_password(settings)


def become(program: str, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by a program of this environment, else of the PATH.

    Raises: UserError when there is none of this name.
    """
    here = str(Path(sys.executable).parent)
    found = which(program, path=f"{here}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise UserError(f"There is no program {program} here.")
    os.execv(found, [found, *arguments])  # Python looks for its packages beside its first word


# ---- running them ----


def up(
    settings: Settings,
    *,
    prefect_port: int,
    mlflow_port: int,
    configs: Path,
    on_ready: Callable[[Services, Settings], None],
    on_error: Callable[[str, str, Path], None],
) -> None:
    """Run Prefect, MLflow and a worker with a deployment for each config, until interrupted.

    `on_ready` is called once with the addresses and the settings that have the password; `on_error`
    with the name of a server, what it has logged as an error, and its log. Whichever way this ends,
    no process that it started is left.

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
    with _claim(settings) as state, _password(settings) as settings:
        config_files(configs)
        _check_ports(prefect_port, mlflow_port)
        with Supervisor(settings.home, ("worker", "deploy", "mlflow", "prefect")) as group:
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
            on_ready(services, settings)
            reports = _ErrorReports(services, settings, on_error)
            while True:
                group.check()
                reports.look()
                time.sleep(0.5)


class _ErrorReports:
    """Tells what the servers log as errors, each once: a service in them may fail and not end."""

    EVERY_SECONDS = 15.0

    def __init__(
        self, services: Services, settings: Settings, tell: Callable[[str, str, Path], None]
    ) -> None:
        self._servers = {"prefect": services.prefect, "mlflow": services.mlflow}
        self._settings = settings
        self._tell = tell
        self._told: set[tuple[str, str]] = set()
        self._next = 0.0

    def look(self) -> None:
        """Ask both servers, not more often than it is useful."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self.EVERY_SECONDS
        for name, address in self._servers.items():
            for error in _errors(address, self._settings.account):
                if (name, error) not in self._told:
                    self._told.add((name, error))
                    self._tell(name, error, self._settings.home / "logs" / f"{name}.log")


def _errors(address: str, account: str) -> list[str]:
    """What a server has logged as errors lately; a server that is busy is asked again later."""
    try:
        return [str(line) for line in json.loads(ask(address + error_log.PATH, account=account))]
    except (OSError, ValueError):
        return []


@contextmanager
def _password(settings: Settings) -> Iterator[Settings]:
    """The settings with the password of this start, which other commands find in a file."""
    settings = _with_password(settings, secrets.token_urlsafe(32))
    password = settings.password.get_secret_value()
    if len(password) < PASSWORD_LENGTH:
        raise UserError(
            f"RLHF_PASSWORD has {len(password)} characters: take {PASSWORD_LENGTH} or more, or "
            "unset it to have one made at each start."
        )
    path = _password_file(settings)
    path.unlink(missing_ok=True)  # one that others could read stays readable when written again
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
    """Prefect for the length of the block; nothing is started where a server is in use already.

    Unlike the server that Prefect itself starts on demand, this one is out of reach of Ctrl-C in
    the terminal, so that an interrupted run can still report its end; it ends with this process
    however that ends; and it is started again when it ends before.

    Args:
        say: hears that the server has ended and what is done about it.

    Yields: what waits until the server is ready, to be called before the first flow starts.

    Raises:
        ServiceError: the server has ended, and could not be started again.
    """
    if settings.prefect_api_url:
        yield lambda: None
        return
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        address = f"http://{HOST}:{probe.getsockname()[1]}"
    settings = _with_password(settings, secrets.token_urlsafe(32))
    os.environ |= {
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_API_AUTH_STRING": settings.account,
    }
    server = _prefect(settings, address, name="prefect-of-run")
    with Supervisor(settings.home, (server.name,)) as group:
        group.start(server)
        with Keeper(group, server, say) as keeper:

            def ready() -> None:
                group.until_ready(server)
                keeper.watch()

            yield ready


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
    environment = {
        **settings.environment(),
        "RLHF_PREFECT_URL": address,
        # Without it, the pages of a server on another port ask port 4200 for their data.
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
        # Experiments keep their plain path, so that they can be read without a server too; what a
        # client sends through the server lands there as well, and not in its working folder.
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
    command = _python("flows", "deploy", str(configs.resolve()), "--working-dir", here)
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
    api = f"{services.prefect}/api"
    client = uuid4().hex  # what changes something, or is a POST as here, needs a token against CSRF
    try:
        token = json.loads(ask(f"{api}/csrf-token?client={client}", account=account))["token"]
        proof = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": client}
        workers = f"{api}/work_pools/{POOL}/workers/filter"
        answer = ask(workers, {}, account=account, **proof)
    except OSError as error:
        return str(error)
    names = [known["name"] for known in json.loads(answer)]
    return "" if worker in names else "Prefect has not heard from it"


def _python(module: str, *arguments: str) -> list[str]:
    """A module as a program; -P: a `tasks.py` in the working folder is not ours."""
    return [sys.executable, "-P", "-m", module, *arguments]

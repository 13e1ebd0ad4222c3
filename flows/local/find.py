"""Finds the MLflow and Prefect servers of a home, and the credentials for them."""

import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from typing import IO, NamedTuple, NoReturn

from pydantic import SecretStr

from rlhf_core.errors import UserError
from tasks.servers.client import ask
from tasks.settings import Settings, apply_environment, read_settings, set_defaults

HOST = "127.0.0.1"
POOL = "rlhf"
LEAST_SPACE = 16 << 20  # bytes
OWNER = "rlhf-team"  # default owner of the deployments


class Services(NamedTuple):
    """A running `rlhf up`."""

    prefect: str
    mlflow: str
    pid: int
    label: str = ""


def join(settings: Settings, *, prefect: bool = False) -> Settings:
    """Make this process use the MLflow server of this home, and its Prefect server if asked to.

    A variable that the user set has priority, then a running `rlhf up` of this home; otherwise
    MLflow is a database under the home, and Prefect starts a server for the duration of the run.
    Call this before importing MLflow or Prefect, which read their environment at import.

    Returns: the updated settings.

    Raises:
        UserError: an address does not answer, or the home cannot be written.
    """
    set_defaults(_addresses(settings, prefect))
    apply_environment(settings)
    make_home(settings)
    return read_settings()


def make_home(settings: Settings) -> None:
    """Create the home, readable only by its owner, and its folders.

    Raises:
        UserError: they cannot be created.
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
            f"RLHF_HOME cannot be used: {settings.home} cannot be written ({error.strerror}); set "
            "it to a folder that you own."
        ) from None


def require_space(home: Path) -> None:
    """Raise UserError when the disk of a home is full: a server on it would just end."""
    free = shutil.disk_usage(home).free
    if free < LEAST_SPACE:
        raise UserError(
            f"The disk is full: {free >> 20} MiB are free for {home}, and the databases alone need "
            f"{LEAST_SPACE >> 20} MiB; free some space, or set RLHF_HOME to a folder on another "
            "disk."
        )


def _addresses(settings: Settings, with_prefect: bool) -> dict[str, str]:
    """Variables with the addresses of the servers, each of which has answered, and their password.

    The password of a running `rlhf up` is sent only to its own two addresses.
    """
    given = settings.tracking_uri and (settings.prefect_api_url or not with_prefect)
    services = None if given and settings.account else running(settings)
    mlflow = settings.tracking_uri or (services.mlflow if services else "")
    prefect = settings.prefect_api_url or (f"{services.prefect}/api" if services else "")
    found: dict[str, str] = {}
    if mlflow.startswith(("http://", "https://")):
        theirs = services is not None and _plain(mlflow) == services.mlflow
        known = with_password(settings) if theirs else settings
        _expect(known, mlflow, "/version", "MLflow", "MLFLOW_TRACKING_URI")
        found |= {"MLFLOW_TRACKING_URI": mlflow, "RLHF_MLFLOW_URL": mlflow}
        found |= known.mlflow_credentials()
    if prefect and with_prefect:
        theirs = services is not None and _plain(prefect) == f"{services.prefect}/api"
        known = with_password(settings) if theirs else settings
        _expect(known, prefect, "/admin/version", "Prefect", "PREFECT_API_URL")
        page = prefect.rstrip("/").removesuffix("/api")
        found |= {"PREFECT_API_URL": prefect, "RLHF_PREFECT_URL": page}
        found |= known.prefect_credentials()
    if services and services.label:
        found["RLHF_LABEL_URL"] = services.label
    return found


def _plain(address: str) -> str:
    """Normalise an address to the form that `rlhf up` uses."""
    return address.rstrip("/").replace("//localhost:", f"//{HOST}:")


def with_password(settings: Settings, password: str = "") -> Settings:
    """Settings with a password: the user's, else the argument, else that of the home."""
    if settings.account:
        return settings
    secret = SecretStr(password or _read_password(settings))
    return settings.model_copy(update={"password": secret})


def _read_password(settings: Settings) -> str:
    try:
        return password_file(settings).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(
            f"`rlhf up` is running for {settings.home}, but its password cannot be read "
            f"({error.strerror}): run this as the user who started it, or set RLHF_PASSWORD."
        ) from None


def password_file(settings: Settings) -> Path:
    """The file with the password of a running `rlhf up`."""
    return settings.home / "password"


def running(settings: Settings) -> Services | None:
    """The `rlhf up` that serves this home, or None.

    It holds a lock on its state file, which the kernel releases with the process, so a file that a
    killed process left behind is ignored.
    """
    path = state_file(settings)
    if not path.exists():
        return None
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return read_state(file)
    return None


def read_state(file: IO[str]) -> Services:
    """Parse the state file."""
    text = file.read()
    if not text:
        raise UserError(
            "`rlhf up` is still starting for this home: try again once it prints its addresses."
        )
    return Services(**json.loads(text))


def state_file(settings: Settings) -> Path:
    """The state file, which a running `rlhf up` keeps locked."""
    return settings.home / "services.json"


_VERSION = re.compile(r'"?\d+\.\d+')


def _expect(settings: Settings, address: str, path: str, name: str, variable: str) -> None:
    try:
        answer = ask(address.rstrip("/") + path, account=settings.account)
    except OSError as error:
        problem = str(error)
    else:
        said = answer[:40].decode("utf-8", errors="replace").strip()
        if said and not _VERSION.match(said):
            problem = f"it answers {said!r} where its version should be"
        else:
            problem = ""
    if problem.startswith("it answers 401"):
        raise UserError(
            f"The {name} server at {address} requires a password: set RLHF_PASSWORD to the one "
            "that it was started with."
        )
    if problem:
        raise UserError(
            f"The {name} server at {address} does not respond ({problem}): start it, or set "
            f"{variable} to its address; unset, {name} uses files under RLHF_HOME."
        )


def signed_in(settings: Settings) -> tuple[Services, Settings]:
    """The servers that a browser can sign in to, and the settings with their password.

    These are the servers of the stack if its password is in the environment, else those of the
    running `rlhf up` of this home.

    Raises: UserError if there are none.
    """
    if settings.account and settings.prefect_api_url:
        return Services(settings.prefect_public_url, settings.mlflow_public_url, 0), settings
    services = running(settings)
    if services is None:
        raise UserError(f"No `rlhf up` is running for {settings.home}: start it, or set RLHF_HOME.")
    return services, with_password(settings)


def become(program: str, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by a program of this Python environment, else of the PATH.

    Raises: UserError if there is no such program.
    """
    here = str(Path(sys.executable).parent)
    found = which(program, path=f"{here}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise UserError(
            f"There is no program {program} in this Python environment or on the PATH: check the "
            "name, or install it."
        )
    os.execv(found, [found, *arguments])  # Python finds its packages by the path in argv[0]

"""The connection to MLflow, tested once before it is used."""

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from rlhf_core.errors import UserError
from tasks.servers import fresh_database
from tasks.servers.client import NoAnswerError, ask
from tasks.settings import Settings

log = logging.getLogger(__name__)

PAUSE_SECONDS = 5.0


def connect(settings: Settings, *, patience: float = 0.0) -> MlflowClient:
    """A client of the tracking server, which has answered one request.

    Args:
        patience: seconds to wait for a server that does not respond.

    Raises: UserError if the server does not respond in time or refuses, or if the database cannot
        be opened.
    """
    uri = settings.mlflow_uri
    if urlsplit(uri).scheme in ("http", "https"):
        _wait_for(uri, time.monotonic() + patience)
    try:
        with _one_at_a_time(settings):
            if settings.artifact_root is not None:
                fresh_database.create("mlflow", uri)
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(
            f"MLflow at {uri} cannot be used ({first_line(error)}); check MLFLOW_TRACKING_URI"
        ) from error
    return client


@contextmanager
def _one_at_a_time(settings: Settings) -> Iterator[None]:
    """Lock a local database while this process may be creating its tables.

    MLflow takes no lock, and two processes that start on a new database at once break it.
    """
    if settings.artifact_root is None:
        yield
        return
    settings.artifact_root.mkdir(parents=True, exist_ok=True)
    with (settings.artifact_root.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _wait_for(uri: str, deadline: float) -> None:
    while True:
        try:
            return _probe(uri)
        except UserError as error:
            if time.monotonic() >= deadline:
                raise
            log.warning("%s; trying again", error)
            time.sleep(PAUSE_SECONDS)


def _probe(uri: str) -> None:
    fix = "start it with `rlhf up`, or set MLFLOW_TRACKING_URI to its address"
    try:
        # MLflow's own client checks the certificate, by settings of its own.
        ask(f"{uri.rstrip('/')}/health", verify=False)
    except NoAnswerError as error:
        if not error.status:
            raise UserError(
                f"the MLflow server at {uri} does not respond ({error}); {fix}"
            ) from error
        if error.status == 403 and "host" in error.text.lower():
            raise UserError(
                f"the MLflow server refuses the address {uri} (invalid Host header); start it with "
                f"MLFLOW_SERVER_ALLOWED_HOSTS='{urlsplit(uri).netloc.rpartition('@')[2]},localhost:*,127.0.0.1:*'"
            ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

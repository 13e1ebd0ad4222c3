"""The connection to MLflow, which has answered once before anybody works with it."""

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
from tasks.servers.client import NoAnswerError, ask
from tasks.settings import Settings

log = logging.getLogger(__name__)

PAUSE_SECONDS = 5.0


def connect(settings: Settings, *, patience: float = 0.0) -> MlflowClient:
    """A client of the tracking server, which has answered once.

    Args:
        patience: seconds to wait for a server that does not answer.

    Raises: UserError when the server does not answer in time or refuses, or when the database
        cannot be opened.
    """
    uri = settings.mlflow_uri
    if urlsplit(uri).scheme in ("http", "https"):
        _wait_for(uri, time.monotonic() + patience)
    try:
        with _one_at_a_time(settings):
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(
            f"MLflow at {uri} cannot be used ({first_line(error)}); check MLFLOW_TRACKING_URI"
        ) from error
    return client


@contextmanager
def _one_at_a_time(settings: Settings) -> Iterator[None]:
    """Keep other processes from a local database while this one may be making its tables.

    MLflow does not, and two that start together on a new database break it.
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
    way_out = "start it with `rlhf up`, or set MLFLOW_TRACKING_URI to where it runs"
    try:
        # Whom to trust is for MLflow's own client to judge, which has settings for it.
        ask(f"{uri.rstrip('/')}/health", verify=False)
    except NoAnswerError as error:
        if not error.status:
            raise UserError(
                f"the MLflow server at {uri} does not answer ({error}); {way_out}"
            ) from error
        if error.status == 403 and "host" in error.text.lower():
            raise UserError(
                f"the MLflow server refuses the address {uri} (invalid Host header); start it with "
                f"MLFLOW_SERVER_ALLOWED_HOSTS='{urlsplit(uri).netloc},localhost:*,127.0.0.1:*'"
            ) from error


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

"""Checks references to registered models before a run, without starting anything."""

from collections.abc import Sequence
from pathlib import Path

from rlhf_core.errors import ModelError, UserError
from tasks.record.record import Record
from tasks.registry.refs import require_address
from tasks.settings import Settings


def check_models(uris: Sequence[str], settings: Settings) -> str:
    """Look registered models up in the database of the home, or at the tracking server.

    Returns: a sentence about what could not be checked, because the server does not respond; empty
        if everything was.

    Raises: ModelError if there is no such model, version or alias.
    """
    for uri in uris:
        require_address(uri)
    if not uris:
        return ""
    database = settings.mlflow_uri.removeprefix("sqlite:///")
    if settings.artifact_root is not None and not Path(database).is_file():
        raise ModelError(
            f"there is no {uris[0]}: no model is registered in {settings.home} yet; train one, or "
            "set RLHF_HOME or MLFLOW_TRACKING_URI to where it is"
        )
    try:
        store = Record.open(settings).store
    except UserError as error:
        return f"Not checked: {', '.join(uris)}, because {error}."
    for uri in uris:
        store.resolve(uri)
    return ""

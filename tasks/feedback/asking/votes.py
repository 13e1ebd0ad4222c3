"""The votes of the preference store as files for a training, and a store that may be away."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rlhf_core.data.origins.of_votes import write_beside
from rlhf_core.errors import DataError
from rlhf_core.settings.data import LATEST, DataConfig
from tasks.registry.refs import SnapshotRef
from tasks.settings import Settings

if TYPE_CHECKING:
    from tasks.feedback.store.records import SnapshotInfo
    from tasks.feedback.store.store import FeedbackProject, Store

PAUSE_SECONDS = 5.0
T = TypeVar("T")
log = logging.getLogger(__name__)


@contextmanager
def opened(settings: Settings, *, make: bool = False) -> Iterator["Store"]:
    """The preference store, closed afterwards.

    Args:
        make: whether a SQLite file that is not there may be made.

    Raises: DataError when there is no such file; StoreError when the database cannot be used.
    """
    path = settings.feedback_uri.removeprefix("sqlite:///")
    if not make and path != settings.feedback_uri and not Path(path).is_file():
        raise DataError(
            f"there is no preference store in {settings.home} yet: `rlhf feedback import` makes "
            "one, or set RLHF_HOME or RLHF_FEEDBACK_DATABASE to where it is"
        )
    from tasks.feedback.store.store import Store  # its libraries take a second

    store = Store.open(settings)
    try:
        yield store
    finally:
        store.close()


def patiently(call: Callable[[], T], settings: Settings) -> T:
    """What `call` returns; a store that does not answer is waited for, as MLflow is.

    Raises: StoreError when it does not answer for RLHF_OUTAGE_SECONDS.
    """
    from tasks.feedback.store.database import StoreError

    deadline = time.monotonic() + settings.outage_seconds
    while True:
        try:
            return call()
        except StoreError as error:
            if time.monotonic() + PAUSE_SECONDS >= deadline:
                raise
            log.warning("%s; trying again", error)
            time.sleep(PAUSE_SECONDS)


def fetch_snapshot(ref: SnapshotRef, folder: Path, settings: Settings) -> Path:
    """Write the votes of a snapshot as JSON lines, and return the file; beside it lies what the
    store knows of where they come from.

    Raises: DataError when the store has no such snapshot; StoreError.
    """
    to = folder / f"{ref.project}-{ref.digest[:16]}.jsonl"
    if to.exists():
        return to
    folder.mkdir(parents=True, exist_ok=True)
    part = to.with_suffix(".part")

    from tasks.lineage.votes import licences_of, origins_of  # the database takes a second

    def write() -> None:
        with opened(settings) as store:
            project = store.project(ref.project)
            project.snapshots.write(ref.digest, part)
            write_beside(to, origins_of(project, ref.digest), licences_of(project))

    patiently(write, settings)
    part.replace(to)
    return to


@contextmanager
def votes_now(
    config: DataConfig, settings: Settings
) -> Iterator[tuple[Path | None, "SnapshotInfo | None"]]:
    """The votes that a run of this config would read if it began now, as a file for the block.

    Nothing is added to the store.

    Returns: the file and what is in it; None and None when the votes are not those of the store.

    Raises: DataError when there is no such project or snapshot, or no vote; StoreError.
    """
    wanted = config.preferences
    if config.source == "simulated" or not wanted.store:
        yield None, None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "votes.jsonl"
        with opened(settings) as store:
            found = _write_now(store.project(wanted.store), wanted.snapshot or LATEST, path)
        yield path, found


def _write_now(project: "FeedbackProject", which: str, path: Path) -> "SnapshotInfo":
    found = project.snapshots.look(which)
    if which == LATEST:
        project.snapshots.write_now(path)
    else:
        project.snapshots.write(found.digest, path)
    return found

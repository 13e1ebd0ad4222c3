"""The votes of the preference store as files for a training, and a store that may be away."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from rlhf_core.errors import DataError, UserError
from rlhf_core.stages.prepare import LATEST, DataConfig
from tasks.registry.refs import SnapshotRef
from tasks.settings import Settings

if TYPE_CHECKING:
    from tasks.feedback.store.records import SnapshotInfo
    from tasks.feedback.store.store import FeedbackProject, Store

PAUSE_SECONDS = 5.0
T = TypeVar("T")
log = logging.getLogger(__name__)


class StoreAwayError(UserError):
    """The database of the preference store does not answer."""


@contextmanager
def opened(settings: Settings, *, make: bool = False) -> Iterator["Store"]:
    """The preference store, closed afterwards.

    Args:
        make: whether a SQLite file that is not there may be made.

    Raises: DataError when there is no such file; StoreAwayError when the database does not answer.
    """
    path = settings.feedback_uri.removeprefix("sqlite:///")
    if not make and path != settings.feedback_uri and not Path(path).is_file():
        raise DataError(
            f"there is no preference store in {settings.home} yet: `rlhf feedback import` makes "
            "one, or set RLHF_HOME or RLHF_FEEDBACK_DATABASE to where it is"
        )
    from tasks.feedback.store.store import Store  # its libraries take a second

    store: Store | None = None
    try:
        store = Store.open(settings)
        yield store
    except SQLAlchemyError as error:
        raise _away(error) from error
    except UserError as error:
        if isinstance(error.__cause__, SQLAlchemyError) and store is None:
            raise StoreAwayError(str(error)) from error
        raise
    finally:
        if store is not None:
            store.close()


def _away(error: SQLAlchemyError) -> StoreAwayError:
    reason = error.orig if isinstance(error, DBAPIError) and error.orig else error
    first = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
    return StoreAwayError(
        f"the preference store cannot be used ({first}); check RLHF_FEEDBACK_DATABASE"
    )


def patiently(call: Callable[[], T], settings: Settings) -> T:
    """What `call` returns; a store that does not answer is waited for, as MLflow is.

    Raises: StoreAwayError when it does not answer for RLHF_OUTAGE_SECONDS.
    """
    deadline = time.monotonic() + settings.outage_seconds
    while True:
        try:
            return call()
        except StoreAwayError as error:
            if time.monotonic() + PAUSE_SECONDS >= deadline:
                raise
            log.warning("%s; trying again", error)
            time.sleep(PAUSE_SECONDS)


def fetch_snapshot(ref: SnapshotRef, folder: Path, settings: Settings) -> Path:
    """Write the votes of a snapshot as JSON lines, and return the file.

    Raises: DataError when the store has no such snapshot; StoreAwayError.
    """
    to = folder / f"{ref.project}-{ref.digest[:16]}.jsonl"
    if to.exists():
        return to
    folder.mkdir(parents=True, exist_ok=True)
    part = to.with_suffix(".part")

    def write() -> None:
        with opened(settings) as store:
            store.project(ref.project).snapshots.write(ref.digest, part)

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

    Raises: DataError when there is no such project or snapshot, or no vote; StoreAwayError.
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

"""Where a stage works: a folder that one process has to itself, and that may outlive it.

    RLHF_HOME/work/NAME/
    ├── lock           held by the process that works here, until it ends
    ├── run.json       the MLflow run that a later process may go on with
    ├── inputs/        what was fetched, and can be again
    ├── checkpoints/   what a training goes on from
    └── ...            what the stage writes

The name says what the work is, so whoever has the same work to do finds what is left of it. A
folder is renamed before it is removed: under its own name there is never half of one. Knows files;
nothing of MLflow or training.
"""

import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

INPUTS, CHECKPOINTS = "inputs", "checkpoints"
_LOCK, _RUN = "lock", "run.json"
DAY = 86_400.0
POLL_SECONDS = 0.5
log = logging.getLogger(__name__)


@contextmanager
def work_folder(path: Path, *, kept: bool) -> Iterator[Path]:
    """The folder at `path`, which nobody else uses until the block ends; then it is gone.

    With `kept`, a block that raises leaves it as it is, but for its inputs. Where another process
    works there, its end is waited for, however it ends.
    """
    with _claim(path):
        try:
            yield path
        except BaseException:
            if kept:
                shutil.rmtree(path / INPUTS, ignore_errors=True)
            else:
                _remove(path)
            raise
        _remove(path)


def abandoned_runs(root: Path) -> Iterator[str]:
    """The MLflow runs of folders that nobody uses: their processes have ended."""
    for folder in root.glob("*/"):
        if (run_id := remembered_run(folder)) is None:
            continue
        if (lock := _lock(folder, touch=False)) is not None:
            with lock:
                yield run_id


def sweep(root: Path, days: float) -> None:
    """Remove the folders under `root` that nobody uses, and that nobody has touched for so long."""
    since = time.time() - days * DAY
    for folder in root.glob("*/"):
        try:
            if _touched(folder) < since and (lock := _lock(folder, touch=False)) is not None:
                with lock:
                    _remove(folder)
        except OSError:
            continue  # removed meanwhile, or another user's


def empty(folder: Path) -> None:
    """Remove all that is in a folder of one's own."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def remember_run(folder: Path, run_id: str) -> None:
    """Write down which MLflow run works here."""
    part = folder / f"{_RUN}.part"
    part.write_text(json.dumps({"run_id": run_id}), encoding="utf-8")
    part.replace(folder / _RUN)


def remembered_run(folder: Path) -> str | None:
    """The MLflow run that has worked here, if any has and its note can be read."""
    try:
        return str(json.loads((folder / _RUN).read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, LookupError):
        return None


def _claim(path: Path) -> IO[bytes]:
    """The lock of a folder, as soon as nobody else has it."""
    said = False
    while (lock := _lock(path)) is None:
        if not said:
            log.warning("another process does this very work (%s); waiting for it", path.name)
            said = True
        time.sleep(POLL_SECONDS)
    return lock


def _lock(folder: Path, *, touch: bool = True) -> IO[bytes] | None:
    """The lock of a folder, which is made if need be; None when another process has it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / _LOCK).open("ab")
        except FileNotFoundError:
            continue  # whoever worked here has removed it just now
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if _is_still_there(file, folder / _LOCK):
            if touch:
                os.utime(folder)
            return file
        file.close()


def _is_still_there(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is the one that lies at `path` now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _touched(folder: Path) -> float:
    """When something was last added to a folder or to those in it."""
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


def _remove(folder: Path) -> None:
    gone = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.old")
    with suppress(FileNotFoundError):  # somebody has cleaned up already
        shutil.rmtree(folder.rename(gone), ignore_errors=True)

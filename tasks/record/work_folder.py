"""The working folder of a stage: used by one process at a time, and kept for resuming.

    RLHF_HOME/work/NAME/
    ├── lock           held by the process that works here, until it ends; says since when
    ├── run.json       the MLflow run that a later process may resume
    ├── inputs/        fetched inputs, which can be fetched again
    ├── checkpoints/   checkpoints that a training resumes from
    ├── tokens/        encoded texts, which all ranks map
    ├── answers/       what was sampled for people to judge
    ├── weights/       those that servers sample with
    └── ...            outputs of the stage

The name identifies the work, so a process with the same work finds the same folder. A folder is
renamed before it is removed, so under its own name it is never incomplete. This module knows files
and nothing of MLflow or training.
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

INPUTS, CHECKPOINTS, ANSWERS = "inputs", "checkpoints", "answers"
_LOCK, _RUN = "lock", "run.json"
_BOOT, _UPTIME = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/uptime")
DAY = 86_400.0
POLL_SECONDS = 0.5
log = logging.getLogger(__name__)


@contextmanager
def work_folder(path: Path, *, kept: bool) -> Iterator[Path]:
    """Lock the folder at `path` for the block, and remove it afterwards.

    With `kept`, a block that raises leaves the folder, without its inputs. If another process works
    there, we block until it exits.
    """
    with _claim(path) as lock:
        try:
            yield path
        except BaseException:
            if kept:
                _write_use(lock)
                shutil.rmtree(path / INPUTS, ignore_errors=True)
            else:
                _remove(path)
            raise
        _remove(path)


def abandoned_runs(root: Path) -> Iterator[str]:
    """The MLflow runs of folders that no process holds: their processes have ended."""
    for folder in root.glob("*/"):
        if (run_id := remembered_run(folder)) is None:
            continue
        if (lock := _lock(folder, touch=False)) is not None:
            with lock:
                yield run_id


def sweep(root: Path, days: float) -> None:
    """Remove the folders under `root` that are unlocked and were last used `days` ago.

    A clock that jumps makes everything look old, so a folder that was used since this machine was
    started is judged by the time that the machine has been running.
    """
    since = time.time() - days * DAY
    for folder in root.glob("*/"):
        try:
            old = _touched(folder) < since and not _used_since(folder, days)
            if old and (lock := _lock(folder, touch=False)) is not None:
                with lock:
                    _remove(folder)
                log.info("removed %s: not used for %g days", folder, days)
        except OSError:
            continue  # it has just been removed, or is another user's


def discard(folder: Path) -> bool:
    """Remove a folder, unless a process holds it; whether it was removed."""
    if (lock := _lock(folder, touch=False)) is None:
        return False
    with lock:
        _remove(folder)
    return True


def empty(folder: Path) -> None:
    """Empty a folder that this process holds, except for its lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def remember_run(folder: Path, run_id: str) -> None:
    """Write the id of the MLflow run that works here."""
    part = folder / f"{_RUN}.part"
    part.write_text(json.dumps({"run_id": run_id}), encoding="utf-8")
    part.replace(folder / _RUN)


def remembered_run(folder: Path) -> str | None:
    """The MLflow run that worked here; None if there is none or its note cannot be read."""
    try:
        return str(json.loads((folder / _RUN).read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, LookupError):
        return None


def _claim(path: Path) -> IO[bytes]:
    """The lock of a folder; blocks until no other process holds it."""
    warned = False
    while (lock := _lock(path)) is None:
        if not warned:
            log.warning("another process is running the same work (%s); waiting for it", path.name)
            warned = True
        time.sleep(POLL_SECONDS)
    return lock


def _lock(folder: Path, *, touch: bool = True) -> IO[bytes] | None:
    """The lock of a folder, created if needed; None if another process holds it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / _LOCK).open("ab")
        except FileNotFoundError:
            continue  # another process has just removed the folder
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if _is_still_there(file, folder / _LOCK):
            if touch:
                os.utime(folder)
                _write_use(file)
            return file
        file.close()


def _is_still_there(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _write_use(lock: IO[bytes]) -> None:
    """Note in the lock when it was taken, in seconds since the start of the machine."""
    with suppress(OSError):  # a full disk: then the clock decides
        lock.truncate(0)
        lock.write(json.dumps(_running()).encode())
        lock.flush()


def _used_since(folder: Path, days: float) -> bool:
    """Whether a folder was used in the last `days` for certain: without a look at the clock."""
    boot, now = _running()
    try:
        then = json.loads((folder / _LOCK).read_bytes())
        return bool(boot) and then[0] == boot and now - then[1] < days * DAY
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _running() -> tuple[str, float]:
    """The start of this machine by its id, and the seconds since then; no id if it has none."""
    try:
        boot = _BOOT.read_text(encoding="ascii").strip()
        return boot, float(_UPTIME.read_text(encoding="ascii").split()[0])
    except OSError:
        return "", 0.0


def _touched(folder: Path) -> float:
    """When a folder or one of its entries was last modified."""
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


def _remove(folder: Path) -> None:
    gone = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.old")
    with suppress(FileNotFoundError):  # another process has removed it already
        shutil.rmtree(folder.rename(gone), ignore_errors=True)

"""A folder that one process makes, while others that want the same wait for it."""

import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder; made, if it is not there, by one process of this machine.

    It is made under another name, synced and renamed, so under its own name it is complete, also
    after a kill or on a full disk.

    Raises: OSError when it cannot be written; what `make` raises.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, or the process ends
        if folder.is_dir():
            return folder
        for left in folder.parent.glob(f"{folder.name}.part-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        part = folder.with_name(f"{folder.name}.part-{uuid.uuid4().hex[:8]}")
        try:
            part.mkdir()
            make(part)
            for file in part.iterdir():
                _sync(file)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def opened_once(
    folder: Path | None, make: Callable[[Path], None], opened: Callable[[Path], T]
) -> T:
    """What `opened` makes of the files of a folder, as `made_once` makes it.

    Args:
        folder: None = files without a name, which are gone with the process. `opened` has to map
            them or to read them.
    """
    if folder is not None:
        return opened(made_once(folder, make))
    with tempfile.TemporaryDirectory(prefix="rlhf-") as name:
        make(Path(name))
        return opened(Path(name))


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

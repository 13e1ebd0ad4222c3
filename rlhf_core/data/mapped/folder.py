"""A folder that one process makes, while others that want the same wait for it.

On one machine the kernel lets one of them make it. Machines that share the disk may not hear of
each other's locks (NFS with `nolock`, or a file system without locks). Then each makes its own, and
the first to rename it has made the folder: work is done twice, and no file is ever half.
"""

import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder; made, if it is not there, by one process of this machine.

    It is made under another name, synced and renamed, so under its own name it is complete, also
    after a kill or on a full disk, and when another machine makes it at the same time.

    Raises: OSError when it cannot be written; what `make` raises.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(folder.with_name(f"{folder.name}.lock")) as alone:
        if folder.is_dir():
            return folder
        mine = f"{folder.name}.part-{_machine()}-"
        # By a process that was killed. Those of other machines may be at work.
        for left in folder.parent.glob(f"{mine}*") if alone else ():
            shutil.rmtree(left, ignore_errors=True)
        part = folder.with_name(f"{mine}{uuid.uuid4().hex[:8]}")
        try:
            part.mkdir()
            make(part)
            for file in part.iterdir():
                _sync(file)
            _rename(part, folder)
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


@contextmanager
def _only_one(path: Path) -> Iterator[bool]:
    """One process of this machine at a time; false where the file system has no locks."""
    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, or the process ends
        except OSError:
            yield False
        else:
            yield True


def _rename(part: Path, folder: Path) -> None:
    """Give a folder its name, which another machine may have taken first: with the same content."""
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _machine() -> str:
    """A name of this machine as long as it runs; containers of one machine may have several."""
    boot = _BOOT.read_text() if _BOOT.exists() else ""
    return hashlib.sha256(f"{socket.gethostname()} {boot}".encode()).hexdigest()[:8]


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Open a file that somebody else wrote: a regular one, and no more of it than can be used.

A device or a pipe never ends, and a small archive may unpack to terabytes. This module knows sizes,
not formats.
"""

import gzip
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

MIB = 2**20
# Text compresses to a tenth, templated text to a fiftieth, and one letter to a thousandth.
UNPACKED_RATIO, UNPACKED_ANYWAY = 200, 64 * MIB
_KINDS = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFCHR: "is a device, not a file",
    stat.S_IFBLK: "is a device, not a file",
    stat.S_IFIFO: "is a pipe, not a file",
    stat.S_IFSOCK: "is a socket, not a file",
}


class UnreadableError(ValueError):
    """A file cannot be opened or read to its end; the message continues its name."""


def expanded(text: str) -> Path:
    """A path with `~` replaced by a home folder.

    Raises: UnreadableError when it is no path: no such user, or a character that paths cannot have.
    """
    if "\0" in text:
        raise UnreadableError("has a null character, so it is not a path")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = text.partition("/")[0].removeprefix("~")
        raise UnreadableError(f"begins with a home, but there is no user '{user}'") from None


def exists(path: Path) -> bool:
    """Whether there is a file, folder or device; False for a name that no file can have."""
    try:
        return path.exists()
    except OSError:  # too long, or behind a folder that we may not enter
        return False


def file_size(path: Path) -> int:
    """The size of a regular file (bytes).

    Raises: UnreadableError when it is none; FileNotFoundError.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UnreadableError(_cannot(error)) from error
    if not stat.S_ISREG(found.st_mode):
        raise UnreadableError(_KINDS.get(stat.S_IFMT(found.st_mode), "is not a file"))
    return found.st_size


def read_whole(path: Path, most: int) -> bytes:
    """The bytes of a file, unpacked if its name ends with .gz; at most `most` of them.

    Raises: UnreadableError when it cannot be read or has more; FileNotFoundError.
    """
    with opened(path) as file:
        data = file.read(most + 1)
        if len(data) > most:
            size = f"{most // MIB:,} MiB" if most >= MIB else f"{most // 1024} KiB"
            raise UnreadableError(f"has more than {size}, which is too much to read")
        return data


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A regular file for reading, unpacked if its name ends with .gz.

    Raises: UnreadableError, also for what the block meets: a damaged disk, or an archive that is
    damaged or unpacks to far more than it is; FileNotFoundError.
    """
    size = file_size(path)
    packed = path.suffix.lower() == ".gz"
    try:
        with path.open("rb") as plain:
            if not packed:
                yield plain
                return
            with gzip.GzipFile(fileobj=plain) as file:
                yield _Unpacked(file, max(UNPACKED_ANYWAY, UNPACKED_RATIO * size))  # type: ignore[misc]
    except FileNotFoundError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableError(_cannot(error)) from error


class _Unpacked:
    """An archive from which at most `most` bytes can be read."""

    def __init__(self, file: gzip.GzipFile, most: int) -> None:
        self._file, self._most = file, most

    def read(self, size: int = -1) -> bytes:
        return self._checked(self._file.read(self._most + 1 if size < 0 else size))

    def readline(self, size: int = -1) -> bytes:
        return self._checked(self._file.readline(size))

    def _checked(self, data: bytes) -> bytes:
        if self._file.tell() > self._most:
            raise UnreadableError(
                f"unpacks to more than {self._most // MIB:,} MiB, {UNPACKED_RATIO} times its size; "
                "if that is right, unpack it and name the unpacked file"
            )
        return data


def _cannot(error: Exception) -> str:
    reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
    return f"cannot be read ({reason})"

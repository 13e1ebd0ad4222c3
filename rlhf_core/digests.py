"""SHA-256 of files, read in blocks, to identify copies, checkpoints and inputs."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

BLOCK = 1 << 20  # bytes


def content_digest(files: Iterable[Path]) -> str:
    """SHA-256 of the concatenated bytes of files; their names do not count."""
    sha = hashlib.sha256()
    for path in files:
        _feed(sha, path)
    return sha.hexdigest()


def tree_digest(directory: Path, pattern: str = "**/*", *, without: str = "") -> str:
    """SHA-256 of the files of a directory that match: their relative names, sizes and bytes.

    Args:
        without: relative name of a file that does not count.
    """
    sha = hashlib.sha256()
    for path in sorted(path for path in directory.glob(pattern) if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name == without:
            continue
        sha.update(f"{name} {path.stat().st_size}\n".encode())
        _feed(sha, path)
    return sha.hexdigest()


def _feed(sha: "hashlib._Hash", path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            sha.update(block)

"""Directories on their way into MLflow and out of it: whole or absent, compared, no pickles."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_core.digests import tree_digest
from rlhf_core.errors import ModelError

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})


def model_digest(directory: Path) -> str:
    """SHA-256 of all files under a directory: their names, sizes and bytes."""
    return tree_digest(directory)


def check_files(directory: Path) -> None:
    """Raise ModelError unless the directory holds safetensors, and neither pickles nor links."""
    files = sorted(path for path in directory.rglob("*") if not path.is_dir())
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(f"{directory} holds no safetensors weights; save the model there first")
    for path in files:
        if path.is_symlink() or path.suffix.lower() in PICKLES:
            what = "a link" if path.is_symlink() else "a file that can carry code when it is loaded"
            raise ModelError(f"{path} is {what}; a model directory holds plain safetensors files")


def check_copy(copy: Path, expected: str | None, what: str) -> str:
    """The digest of `copy`; raises ModelError when another one is expected."""
    found = model_digest(copy)
    if expected not in (None, found):
        raise ModelError(
            f"{what} is damaged: the digest of what the store gives back is {found} and should be "
            f"{expected}; publish the model again, and see to the disk of the store"
        )
    return found


@contextmanager
def staged(to: Path) -> Iterator[Path]:
    """A path beside `to` that becomes `to` when the block succeeds and goes away when it fails."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=to.parent) as scratch:
        part = Path(scratch) / to.name
        yield part
        part.rename(to)

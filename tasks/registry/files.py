"""Checks of directories that go to or come from MLflow: complete, verified, no pickles."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_core.digests import tree_digest
from rlhf_core.errors import ModelError

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})
MODEL_CARD = "README.md"  # is written after the evaluation, into a version that is there already


def model_digest(directory: Path) -> str:
    """SHA-256 of all files under a directory but its model card: names, sizes and bytes."""
    return tree_digest(directory, without=MODEL_CARD)


def check_files(directory: Path) -> None:
    """Raise ModelError unless the directory holds safetensors, and neither pickles nor links."""
    files = sorted(path for path in directory.rglob("*") if not path.is_dir())
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(f"{directory} has no safetensors weights; save the model there first")
    for path in files:
        if path.is_symlink() or path.suffix.lower() in PICKLES:
            what = "a link" if path.is_symlink() else "a file that can run code when it is loaded"
            raise ModelError(
                f"{path} is {what}; a model directory must hold plain safetensors files"
            )


def check_copy(copy: Path, expected: str | None, what: str) -> str:
    """The digest of `copy`.

    Raises: ModelError if another digest is expected.
    """
    found = model_digest(copy)
    # A model that had such a file when it was stored counts with it.
    if expected not in (None, found) and expected != tree_digest(copy):
        raise ModelError(
            f"{what} is damaged: the digest of the files in the store is {found} and should be "
            f"{expected}; publish the model again, and check the disk of the store"
        )
    return found


@contextmanager
def staged(to: Path) -> Iterator[Path]:
    """A temporary path next to `to`, renamed to `to` if the block succeeds, else removed."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=to.parent) as scratch:
        part = Path(scratch) / to.name
        yield part
        part.rename(to)

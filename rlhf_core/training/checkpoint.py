"""States of a training run on disk. A state is complete or absent; one of another run is refused.

    step-00000123/
    ├── state.pt         the state, by torch.save
    └── manifest.json    format, step, size and SHA-256 of state.pt, identity of the run

A folder is written under a temporary name, synced and renamed, and renamed before it is removed,
so a process killed at any moment leaves only complete checkpoints under their final names. The
digest detects later damage. This module knows files and tensors, nothing about training.
"""

import hashlib
import io
import json
import logging
import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from rlhf_core.digests import content_digest
from rlhf_core.errors import CheckpointError

FORMAT = 1
STATE, MANIFEST = "state.pt", "manifest.json"
# The errors of a damaged disk, damaged JSON, and a pickle that does not fit.
DAMAGE = (OSError, ValueError, LookupError, TypeError, RuntimeError, pickle.UnpicklingError)

log = logging.getLogger(__name__)


class Checkpoints:
    """The last `keep` states of a training run in a folder, each complete or absent.

    A state consists of dict, list, tuple, str, int, float, bool, None, tensors, and the dataclasses
    in `records`; loading it runs no code from the file. The identity defines the run (settings,
    seed, digests of its inputs): a state of another run is refused.
    """

    def __init__(self, directory: Path, *, keep: int = 2, records: Sequence[type] = ()) -> None:
        self.directory = directory
        self._keep = keep
        self._records: list[Any] = list(records)
        self._damaged: set[Path] = set()  # found by `latest`; not counted in `keep`

    def save(self, step: int, state: Mapping[str, Any], identity: Mapping[str, str]) -> None:
        """Save the state after `step`; delete all but the last `keep`, and any later than `step`.

        Raises: OSError when writing fails; TypeError when the state contains a type that could not
        be loaded again. In both cases the older checkpoints are not changed.
        """
        self._sweep()
        folder = self.directory / f"step-{step:08d}"
        new = folder.with_suffix(".new")
        new.mkdir(parents=True)
        try:
            self._write(new, step, state, identity)
            if folder.exists():  # damaged, or from a run that was not resumed
                _remove(folder)
            new.rename(folder)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        _sync(self.directory)
        self._damaged.discard(folder)
        usable = [f for f in self._folders() if f <= folder and f not in self._damaged]
        for other in self._folders():
            if other not in usable[-self._keep :]:
                _remove(other)

    def latest(self, identity: Mapping[str, str]) -> dict[str, Any] | None:
        """The newest intact state, on the CPU; None when nothing was saved.

        A damaged checkpoint is logged, and the one before it is used.

        Raises: CheckpointError when all are damaged, or when the newest intact one is from another
        run or has another format.
        """
        folders = self._folders()
        for folder in reversed(folders):
            try:
                return self._read(folder, identity)
            except DAMAGE as error:
                log.warning("checkpoint %s is not used: %s", folder, _line(error))
                self._damaged.add(folder)
        if folders:
            raise CheckpointError(
                f"none of the {len(folders)} checkpoints in {self.directory} is intact; delete "
                "that folder to start over"
            )
        return None

    def clear(self) -> None:
        """Remove all checkpoints, oldest first, and then the folder if it is empty."""
        self._sweep()
        for folder in self._folders():
            _remove(folder)
        with suppress(OSError):
            self.directory.rmdir()

    def _folders(self) -> list[Path]:
        return sorted(self.directory.glob("step-" + 8 * "[0-9]"))

    def _sweep(self) -> None:
        """Remove leftovers of a process that was killed while writing or removing."""
        for pattern in ("step-*.new", "step-*.old"):
            for leftover in self.directory.glob(pattern):
                shutil.rmtree(leftover)

    def _write(
        self, folder: Path, step: int, state: Mapping[str, Any], identity: Mapping[str, str]
    ) -> None:
        path = folder / STATE
        with _HashingWriter(path) as file:
            torch.save(dict(state), file)
            if file.error is not None:
                raise file.error
        with safe_globals(self._records):
            if unsafe := get_unsafe_globals_in_checkpoint(path):
                raise TypeError(f"a state cannot contain {', '.join(sorted(unsafe))}")
        manifest = {
            "format": FORMAT,
            "step": step,
            "size": file.size,
            "sha256": file.sha256.hexdigest(),
            "identity": dict(identity),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for target in (path, folder / MANIFEST, folder):
            _sync(target)

    def _read(self, folder: Path, identity: Mapping[str, str]) -> dict[str, Any]:
        path = folder / STATE
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {folder} has format {manifest['format']}, but this version reads "
                f"{FORMAT}; use the version that wrote it, or delete {self.directory} to start over"
            )
        if (size := path.stat().st_size) != manifest["size"]:
            raise ValueError(f"{STATE} has {size} of {manifest['size']} bytes")
        if content_digest([path]) != manifest["sha256"]:
            raise ValueError(f"the SHA-256 of {STATE} does not match the manifest")
        if differing := _differences(manifest["identity"], identity):
            raise CheckpointError(
                f"the checkpoints in {self.directory} are from another run: {'; '.join(differing)}"
                ". Undo the difference to resume it, or delete that folder to start over"
            )
        with safe_globals(self._records):
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint in a folder, intact or not; 0 if there is none."""
    return max((int(path.name[5:]) for path in directory.glob("step-" + 8 * "[0-9]")), default=0)


class _HashingWriter(io.BufferedWriter):
    """A new file that computes size and SHA-256 while it is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("wb", buffering=0))
        self.size = 0
        self.sha256 = hashlib.sha256()
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Write all data; after an error, write nothing.

        torch.save calls this from C++, where an exception would become a RuntimeError about an
        unexpected position, so the caller raises `error` afterwards.
        """
        if self.error is None:
            try:
                super().write(data)
                self.sha256.update(data)
            except BaseException as error:
                self.error = error
        self.size += len(data)
        return len(data)


def _differences(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    return [
        f"{key} was {saved.get(key, 'missing')} and is now {current.get(key, 'missing')}"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]


def _remove(folder: Path) -> None:
    shutil.rmtree(folder.rename(folder.with_suffix(".old")))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(error: Exception) -> str:
    text = str(error).strip() or "no reason given"
    return f"{type(error).__name__}: {text.splitlines()[0]}"

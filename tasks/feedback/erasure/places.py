"""Where a pseudonym is looked for: the files of the home and the databases of the servers."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.engine import make_url

from rlhf_core.errors import UserError
from tasks.feedback.erasure import backups, databases, documents
from tasks.feedback.erasure.documents import Look
from tasks.feedback.erasure.names import Name
from tasks.record.work_folder import discard
from tasks.settings import Settings, StoreSettings

DATABASES, SIDES = (".db", ".db3", ".sqlite", ".sqlite3"), ("-wal", "-shm", "-journal")
WORK = "work"
CERTIFICATES = "erasures"  # under the home
SHARED = "may be somebody of the same name in another project"
WEIGHTS = "of a model, whose digest it would change"


@dataclass
class Found:
    """What was found of a pseudonym, and what became of it. Paths are those under the home."""

    files: dict[str, str] = field(default_factory=dict)  # what was done, by path
    databases: dict[str, dict[str, int]] = field(default_factory=dict)  # cells, by table
    left: dict[str, str] = field(default_factory=dict)  # why, by path
    words: int = 0  # places with the same word that need not be the person
    searched: int = 0  # files

    def summary(self) -> dict[str, int]:
        """How many things of each kind."""
        counts: dict[str, int] = {}
        for outcome in self.files.values():
            counts[outcome] = counts.get(outcome, 0) + 1
        return dict(sorted(counts.items()))


class Places:
    """The files and databases of an installation."""

    def __init__(
        self, settings: Settings, stores: StoreSettings, *, own: Sequence[str] | None = None
    ) -> None:
        """
        Args:
            own: beginnings of the paths under the home that are of the person's project, if others
                have somebody of the same name; None if nobody has.
        """
        self._home = settings.home
        self._store = settings.feedback_uri.removeprefix("sqlite:///")
        self._servers = [
            make_url(address)
            for address in (stores.prefect_database, stores.mlflow_database)
            if address and not address.startswith("sqlite")
        ]
        self._own = own
        self._backups = [
            Path(folder)
            for folder in backups.folders(settings)
            if Path(folder).is_relative_to(self._home)
        ]

    def clean(self, name: Name) -> Found:
        """Take a pseudonym out of everything.

        Raises: UserError when something that has it is in use, or cannot be reached.
        """
        found = Found()
        self._drop_work(name, found)
        files = list(self._files())
        looks = databases.look_apart(self._databases(files), name)
        for path in files:
            found.searched += 1
            shown = path.relative_to(self._home).as_posix()
            try:
                self._clean_file(path, shown, name, found, looks)
            except FileNotFoundError:
                continue  # whoever wrote it has removed it
            except OSError as error:
                raise UserError(
                    f"{path} has to be changed and cannot be ({error.strerror}): check the rights "
                    "and the disk, then erase again to go on"
                ) from error
        for url in self._servers:
            if self._own is None:
                cleaned = databases.clean(url, name)
                found.words += cleaned.words
                if cleaned.cells:
                    found.databases[cleaned.place] = cleaned.cells
        return found

    def search(self, name: Name) -> list[str]:
        """The files that have the pseudonym, packed or not."""
        files = list(self._files())
        looks = databases.look_apart(self._databases(files), name)
        paths = [path for path in files if path not in looks and documents.has(path, name)]
        paths += [path for path, look in looks.items() if look.has]
        return sorted(path.relative_to(self._home).as_posix() for path in paths)

    def is_own(self, shown: str) -> bool:
        """Whether a path under the home is of the person's project, as far as one can tell."""
        return self._own is None or shown.startswith(tuple(self._own))

    def _clean_file(
        self, path: Path, shown: str, name: Name, found: Found, looks: Mapping[Path, Look]
    ) -> None:
        if path in looks and (looks[path].is_sqlite or str(path) == self._store):
            around = [looks[path], *(looks[side] for side in _sides(path) if side in looks)]
            if str(path) != self._store and any(look.may_have for look in around):
                if self._own is not None:
                    found.left[shown] = SHARED
                    return
                cleaned = databases.clean_file(path, name)
                found.words += cleaned.words
                if cleaned.cells:
                    found.databases[shown] = cleaned.cells
            return
        if not documents.has(path, name):
            return
        if not self.is_own(shown):
            found.left[shown] = SHARED
            return
        if name.telling and _is_of_model(path):
            found.left[shown] = WEIGHTS
            return
        outcome = documents.clean(path, name)
        if outcome == "common word":
            found.words += 1
        elif outcome:
            found.files[shown] = outcome

    def _databases(self, files: Sequence[Path]) -> list[Path]:
        """Of some files those that may be databases of SQLite, with what lies beside them."""
        found = [path for path in files if path.suffix in DATABASES or str(path) == self._store]
        return [*found, *(side for path in found for side in _sides(path) if side.is_file())]

    def _drop_work(self, name: Name, found: Found) -> None:
        """Remove the folders of stages that were stopped and have the pseudonym.

        Raises: UserError when a process works in one.
        """
        for folder in sorted((self._home / WORK).glob("*/")):
            shown = folder.relative_to(self._home).as_posix()
            files = [path for path in _walk(folder) if not path.is_symlink()]
            if not any(documents.has(path, name) for path in files):
                continue
            if not self.is_own(shown):
                continue
            if not discard(folder):
                raise UserError(
                    f"a process works in {folder}, which has votes of this person: stop it or let "
                    "it end, then erase again to go on"
                )
            found.files[shown] = "deleted"

    def _files(self) -> Iterator[Path]:
        for path in _walk(self._home):
            if any(path.is_relative_to(folder) for folder in self._backups):
                continue  # a back-up that is changed is damaged
            if not path.is_symlink() and not self._is_side(path):
                yield path

    def _is_side(self, path: Path) -> bool:
        """Whether a file belongs to a database beside it."""
        for end in SIDES:
            base = path.with_name(path.name.removesuffix(end))
            if base != path and (base.suffix in DATABASES or str(base) == self._store):
                return True
        return False


def _sides(path: Path) -> list[Path]:
    return [path.with_name(path.name + end) for end in SIDES]


def _walk(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        for name in sorted(names):
            path = Path(root) / name
            with suppress(OSError):
                if path.is_file():
                    yield path


def _is_of_model(path: Path) -> bool:
    """Whether a file is part of a model directory, but for its card, which has no digest."""
    if path.name.lower() == "readme.md":
        return False
    return any(path.parent.glob("*.safetensors"))

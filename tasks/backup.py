"""Back-up and restore of everything that is kept: databases first, then the files they refer to.

A row refers to files: a model version to its weights, a Prefect state to a stored result. The files
are written before the row. So we copy the databases first, those that refer to other databases
before the others. The files of a copied row then exist, and still do when they are copied, unless
`mlflow gc` runs concurrently. Files that were added later are copied but unreferenced.

    FOLDER/
    ├── manifest.json     what was backed up, and the SHA-256 of every file; written last
    ├── prefect.dump ...  the databases of the stack
    ├── home/             what RLHF_HOME holds, its SQLite files as they were at one moment
    └── objects/          the artifacts of the stack
"""

import json
import logging
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import URL, create_engine, inspect, make_url

from rlhf_core.digests import content_digest
from rlhf_core.errors import ConfigError, DataError, UserError
from tasks.settings import Settings, StoreSettings

T = TypeVar("T")
log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LEDGER = "backups.jsonl"  # under RLHF_HOME: where back-ups went, and when
STREAMS = 8  # objects of the S3 store that are copied in parallel
# Under RLHF_HOME: needed only by running processes, or available elsewhere.
EXCLUDED = frozenset({"work", "logs", "services.json", "password", "huggingface", LEDGER})


class Manifest(BaseModel):
    """The content of a back-up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["home", "stack"]
    home: Path  # MLflow and Prefect store absolute paths of their local files
    files: dict[str, str]  # path -> SHA-256


class Store(Protocol):
    """A store that is backed up into one file or folder of a back-up."""

    name: str

    def save(self, to: Path) -> None:
        """Write the current content."""

    def load(self, saved: Path) -> None:
        """Restore the content into an empty store."""

    def occupied(self) -> str:
        """What the store contains; an empty string if it is empty."""


def backup(settings: Settings, stores: StoreSettings, folder: Path) -> Manifest:
    """Back up all stores to a folder that does not exist yet.

    Servers and training may keep running.

    Raises: UserError if the folder exists, or a store cannot be reached.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already: pass a folder that does not exist yet.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder.parent) as scratch:
        whole = Path(scratch) / folder.name
        whole.mkdir()
        for store in _stores(settings, stores):
            store.save(whole / store.name)
        manifest = Manifest(kind=_kind(stores), home=settings.home, files=_digests(whole))
        (whole / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
        _note(settings, folder)
        whole.rename(folder)
    return manifest


def _note(settings: Settings, folder: Path) -> None:
    """Keep where a back-up is, for whoever asks what back-ups hold."""
    entry = {"folder": str(folder.resolve()), "at": datetime.now(UTC).isoformat()}
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        with (settings.home / LEDGER).open("a", encoding="utf-8") as ledger:
            ledger.write(json.dumps(entry) + "\n")
    except OSError as error:
        log.warning(
            "%s cannot be written (%s): no certificate of an erasure will name this back-up",
            *(settings.home / LEDGER, error.strerror),
        )


def restore(settings: Settings, stores: StoreSettings, folder: Path) -> Manifest:
    """Restore a back-up into empty stores.

    Raises: UserError if the back-up is damaged or of another kind, or a store is not empty. Nothing
        has been written then.
    """
    manifest = _read(folder)
    if manifest.kind != _kind(stores):
        raise UserError(
            f"{folder} is the back-up of a {manifest.kind}, but the environment is that of a "
            f"{_kind(stores)}: docs/operations.md explains how to restore each."
        )
    if manifest.home != settings.home:
        raise UserError(
            f"{folder} is the back-up of {manifest.home}, and its databases hold absolute paths: "
            f"set RLHF_HOME to {manifest.home}."
        )
    kept = _stores(settings, stores)
    for store in kept:
        if found := store.occupied():
            raise UserError(
                f"{found}: a back-up is restored only into empty stores; move the content away "
                "first."
            )
    for store in reversed(kept):  # files before the rows that refer to them
        store.load(folder / store.name)
    return manifest


# ---- the stores ----


def _kind(stores: StoreSettings) -> Literal["home", "stack"]:
    return "stack" if stores.mlflow_database else "home"


def _stores(settings: Settings, stores: StoreSettings) -> list[Store]:
    """The stores in the order in which they are saved."""
    if not stores.mlflow_database:
        if settings.tracking_uri:
            raise ConfigError(
                f"MLFLOW_TRACKING_URI is {settings.tracking_uri}: a back-up reads the database of "
                "a server, not the server; unset it to back up the files under RLHF_HOME, or in "
                "the stack run `docker compose run --rm tools`"
            )
        return [Home(settings.home)]
    referring = ("prefect", stores.prefect_database), ("feedback", stores.feedback_database)
    databases = *referring, ("mlflow", stores.mlflow_database)
    found: list[Store] = [Database(name, make_url(url)) for name, url in databases if url]
    return [*found, Home(settings.home), Bucket(stores.artifacts)]


class Home(Store):
    """The files under RLHF_HOME, without those in EXCLUDED."""

    name = "home"

    def __init__(self, home: Path) -> None:
        self._home = home

    def save(self, to: Path) -> None:
        """Copy databases by SQLite's online back-up, which blocks nobody; then the other files."""
        to.mkdir()
        databases = [path for path in self._files() if path.suffix == ".db"]
        for path in sorted(databases, key=lambda path: "mlflow" in path.parts):
            place = self._place(path, to)
            with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(place)) as copy:
                source.backup(copy)
            shutil.copymode(path, place)  # that of the votes holds names
        # Listed only now, so that the files in the copied databases exist.
        for path in self._files():
            if path.suffix != ".db":
                with suppress(FileNotFoundError):  # a process that has just ended removed it
                    shutil.copy2(path, self._place(path, to), follow_symlinks=False)

    def load(self, saved: Path) -> None:
        """Copy the files back."""
        shutil.copytree(saved, self._home, symlinks=True, dirs_exist_ok=True)

    def occupied(self) -> str:
        """Whether there are files."""
        return f"{self._home} is not empty" if any(self._files()) else ""

    def _place(self, path: Path, to: Path) -> Path:
        """The path of a file in the back-up."""
        place = to / path.relative_to(self._home)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def _files(self) -> Iterator[Path]:
        # The side files of a database belong to its connections.
        side_files = (".db-wal", ".db-shm", ".db-journal")
        for path in self._home.rglob("*"):
            excluded = path.relative_to(self._home).parts[0] in EXCLUDED
            if path.is_file() and not excluded and not path.name.endswith(side_files):
                yield path


class Database(Store):
    """A database of a Postgres server."""

    def __init__(self, name: str, url: URL) -> None:
        self.name = f"{name}.dump"
        self._url = url

    def save(self, to: Path) -> None:
        """Run `pg_dump`, which takes a consistent snapshot."""
        self._run("pg_dump", "--format=custom", "--no-owner", "--no-privileges", f"--file={to}")

    def load(self, saved: Path) -> None:
        """Run `pg_restore` in a single transaction."""
        options = ("--no-owner", "--no-privileges", "--single-transaction", "--exit-on-error")
        self._run("pg_restore", *options, f"--dbname={self._url.database}", str(saved))

    def occupied(self) -> str:
        """Whether there are tables."""
        engine = create_engine(self._url.set(drivername="postgresql+psycopg2"))
        tables = inspect(engine).get_table_names()
        engine.dispose()
        return f"the database {self._url.database} has {len(tables)} tables" if tables else ""

    def _run(self, program: str, *arguments: str) -> None:
        connection = {
            "PGHOST": self._url.host,
            "PGPORT": str(self._url.port or 5432),
            "PGUSER": self._url.username,
            "PGPASSWORD": self._url.password,
            "PGDATABASE": self._url.database,
        }
        environment = {name: value for name, value in connection.items() if value is not None}
        try:
            subprocess.run(
                [program, *arguments],
                env={**os.environ, **environment},
                check=True,
                capture_output=True,
                text=True,
            )
        except FileNotFoundError:
            raise UserError(
                f"{program} is not installed here: run this in the image of the stack, with "
                "`docker compose run --rm tools`."
            ) from None
        except subprocess.CalledProcessError as error:
            reason = error.stderr.strip() or f"exit status {error.returncode}"
            raise UserError(f"{program} failed for {self._url!r}: {reason}") from None


class Bucket(Store):
    """The objects under `s3://bucket/prefix`; boto3 reads endpoint and keys from its variables."""

    name = "objects"

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme != "s3":
            raise ConfigError(
                f"MLFLOW_ARTIFACTS_DESTINATION is '{address}'; it should be s3://NAME"
            )
        self._bucket, self._prefix = parts.netloc, parts.path.lstrip("/")

    def save(self, to: Path) -> None:
        """Download every object to the path in its key."""
        to.mkdir()

        def fetch(key: str) -> None:
            copy = to / key
            if not copy.resolve().is_relative_to(to.resolve()):
                raise DataError(
                    f"the bucket {self._bucket} has the key '{key}', which is outside the back-up"
                )
            copy.parent.mkdir(parents=True, exist_ok=True)
            self._client.download_file(self._bucket, key, str(copy), Config=_one_stream())

        _in_parallel(fetch, self._keys())

    def load(self, saved: Path) -> None:
        """Upload every file."""

        def send(path: Path) -> None:
            key = path.relative_to(saved).as_posix()
            self._client.upload_file(str(path), self._bucket, key, Config=_one_stream())

        _in_parallel(send, (path for path in saved.rglob("*") if path.is_file()))

    def occupied(self) -> str:
        """Whether there are objects."""
        return f"the bucket {self._bucket} is not empty" if any(self._keys()) else ""

    def _keys(self) -> Iterator[str]:
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
            yield from (item["Key"] for item in page.get("Contents", ()))

    @cached_property
    def _client(self) -> Any:
        import boto3

        return boto3.client("s3")


def _one_stream() -> Any:
    """Transfer an object without threads of boto3, since many objects are copied in parallel."""
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(use_threads=False)


def _in_parallel(move: Callable[[T], None], what: Iterable[T]) -> None:
    """Call `move` for each item, several in parallel; the first error is raised."""
    with ThreadPoolExecutor(STREAMS) as pool:
        for _ in pool.map(move, what):
            pass


# ---- the folder ----


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): content_digest([path]) for path in files}


def _read(folder: Path) -> Manifest:
    """The manifest of a back-up, whose files are checked against it."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{folder} is not a back-up: its {MANIFEST} cannot be read") from error
    found = _digests(folder)
    found.pop(MANIFEST)
    for name in sorted(manifest.files.keys() | found.keys()):
        if manifest.files.get(name) != found.get(name):
            raise DataError(
                f"the back-up is damaged: {folder / name} has changed since it was written; use "
                "another back-up"
            )
    return manifest

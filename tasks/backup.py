"""Back-up and restore of everything that is kept: databases first, then the files they point to.

A row points at files: a model version at its weights, a Prefect state at a stored result. The files
are written before the row. So the databases are copied first, those that point at others before
the others: what a copied row names was there then, and still is when its turn comes, unless
somebody deletes for good (`mlflow gc`) meanwhile. What was added since lies in the copy unused.

    FOLDER/
    ├── manifest.json     what was backed up, and the SHA-256 of every file; written last
    ├── prefect.dump ...  the databases of the stack
    ├── home/             what RLHF_HOME holds, its SQLite files as they were at one moment
    └── objects/          the artifacts of the stack
"""

import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
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

MANIFEST = "manifest.json"
STREAMS = 8  # objects of the S3 store that are moved at once
# Under RLHF_HOME: what is only of use to the processes that run now, or can be had again.
PASSING = frozenset({"work", "logs", "services.json", "password", "huggingface"})


class Manifest(BaseModel):
    """What a back-up holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["home", "stack"]
    home: Path  # MLflow and Prefect know their local files by whole paths
    files: dict[str, str]  # path -> SHA-256


class Store(Protocol):
    """Something that is kept, and that a file or a folder of a back-up holds."""

    name: str

    def save(self, to: Path) -> None:
        """Write what is there now."""

    def load(self, saved: Path) -> None:
        """Put it back; the place is empty."""

    def occupied(self) -> str:
        """What is there already; empty when it is nothing."""


def backup(settings: Settings, stores: StoreSettings, folder: Path) -> Manifest:
    """Write everything that is kept to a folder that does not exist yet.

    The servers may run meanwhile, and trainings go on.

    Raises: UserError when the folder is there, or a store cannot be reached.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already: name a folder that a back-up can make.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder.parent) as scratch:
        whole = Path(scratch) / folder.name
        whole.mkdir()
        for store in _stores(settings, stores):
            store.save(whole / store.name)
        manifest = Manifest(kind=_kind(stores), home=settings.home, files=_digests(whole))
        (whole / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
        whole.rename(folder)
    return manifest


def restore(settings: Settings, stores: StoreSettings, folder: Path) -> Manifest:
    """Put back what a back-up holds, into places that are empty.

    Raises: UserError when the back-up is damaged or of something else, or a place is not empty.
        Nothing has been written then.
    """
    manifest = _read(folder)
    if manifest.kind != _kind(stores):
        raise UserError(
            f"{folder} is the back-up of a {manifest.kind}, and what the environment names is a "
            f"{_kind(stores)}: docs/operations.md says how each is restored."
        )
    if manifest.home != settings.home:
        raise UserError(
            f"{folder} is the back-up of {manifest.home}, and files are known by their whole "
            f"paths: set RLHF_HOME to {manifest.home}."
        )
    kept = _stores(settings, stores)
    for store in kept:
        if found := store.occupied():
            raise UserError(
                f"{found}: a back-up is restored into empty places; move away what is there first."
            )
    for store in reversed(kept):  # files before the rows that point at them
        store.load(folder / store.name)
    return manifest


# ---- what there is ----


def _kind(stores: StoreSettings) -> Literal["home", "stack"]:
    return "stack" if stores.mlflow_database else "home"


def _stores(settings: Settings, stores: StoreSettings) -> list[Store]:
    """In the order in which they are saved."""
    if not stores.mlflow_database:
        if settings.tracking_uri:
            raise ConfigError(
                f"MLFLOW_TRACKING_URI is {settings.tracking_uri}: a back-up reads what is behind a "
                "server and not the server; unset it for the files under RLHF_HOME, or run this as "
                "`docker compose run --rm tools` in the stack"
            )
        return [Home(settings.home)]
    pointing = ("prefect", stores.prefect_database), ("feedback", stores.feedback_database)
    databases = *pointing, ("mlflow", stores.mlflow_database)
    found: list[Store] = [Database(name, make_url(url)) for name, url in databases if url]
    return [*found, Home(settings.home), Bucket(stores.artifacts)]


class Home(Store):
    """The files under RLHF_HOME, without those of PASSING."""

    name = "home"

    def __init__(self, home: Path) -> None:
        self._home = home

    def save(self, to: Path) -> None:
        """Databases by SQLite's own back-up, which nobody waits for; then copies of the rest."""
        to.mkdir()
        databases = [path for path in self._files() if path.suffix == ".db"]
        for path in sorted(databases, key=lambda path: "mlflow" in path.parts):
            place = self._place(path, to)
            with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(place)) as copy:
                source.backup(copy)
        # Looked for only now: what the databases name has been written.
        for path in self._files():
            if path.suffix != ".db":
                with suppress(FileNotFoundError):  # it was of a process that has ended just now
                    shutil.copy2(path, self._place(path, to), follow_symlinks=False)

    def load(self, saved: Path) -> None:
        """Copy them back."""
        shutil.copytree(saved, self._home, symlinks=True, dirs_exist_ok=True)

    def occupied(self) -> str:
        """Whether there is any file."""
        return f"{self._home} is not empty" if any(self._files()) else ""

    def _place(self, path: Path, to: Path) -> Path:
        """Where a file lies in the back-up."""
        place = to / path.relative_to(self._home)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def _files(self) -> Iterator[Path]:
        # What lies beside a database belongs to its connections.
        beside = (".db-wal", ".db-shm", ".db-journal")
        for path in self._home.rglob("*"):
            passing = path.relative_to(self._home).parts[0] in PASSING
            if path.is_file() and not passing and not path.name.endswith(beside):
                yield path


class Database(Store):
    """A database of a Postgres server."""

    def __init__(self, name: str, url: URL) -> None:
        self.name = f"{name}.dump"
        self._url = url

    def save(self, to: Path) -> None:
        """`pg_dump`: the database as it is at one moment."""
        self._run("pg_dump", "--format=custom", "--no-owner", "--no-privileges", f"--file={to}")

    def load(self, saved: Path) -> None:
        """`pg_restore`, all of it or nothing."""
        options = ("--no-owner", "--no-privileges", "--single-transaction", "--exit-on-error")
        self._run("pg_restore", *options, f"--dbname={self._url.database}", str(saved))

    def occupied(self) -> str:
        """Whether there is any table."""
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
                f"{program} is not installed here: run this in the image of the stack, as "
                "`docker compose run --rm tools`."
            ) from None
        except subprocess.CalledProcessError as error:
            reason = error.stderr.strip() or f"exit status {error.returncode}"
            raise UserError(f"{program} failed for {self._url!r}: {reason}") from None


class Bucket(Store):
    """The objects of an S3 store, `s3://bucket/prefix`; address and keys as boto3 reads them."""

    name = "objects"

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme != "s3":
            raise ConfigError(
                f"MLFLOW_ARTIFACTS_DESTINATION is '{address}'; it should be s3://NAME"
            )
        self._bucket, self._prefix = parts.netloc, parts.path.lstrip("/")

    def save(self, to: Path) -> None:
        """Download every object to the path that its key says."""
        to.mkdir()

        def fetch(key: str) -> None:
            copy = to / key
            if not copy.resolve().is_relative_to(to.resolve()):
                raise DataError(f"the bucket {self._bucket} has '{key}', which leads out of it")
            copy.parent.mkdir(parents=True, exist_ok=True)
            self._client.download_file(self._bucket, key, str(copy), Config=_one_stream())

        _at_once(fetch, self._keys())

    def load(self, saved: Path) -> None:
        """Upload every file."""

        def send(path: Path) -> None:
            key = path.relative_to(saved).as_posix()
            self._client.upload_file(str(path), self._bucket, key, Config=_one_stream())

        _at_once(send, (path for path in saved.rglob("*") if path.is_file()))

    def occupied(self) -> str:
        """Whether there is any object."""
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
    """How boto3 moves an object: not by threads of its own, as many are moved at once."""
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(use_threads=False)


def _at_once(move: Callable[[T], None], what: Iterable[T]) -> None:
    """Call `move` for each, several at a time; the first error is raised."""
    with ThreadPoolExecutor(STREAMS) as pool:
        for _ in pool.map(move, what):
            pass


# ---- the folder ----


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): content_digest([path]) for path in files}


def _read(folder: Path) -> Manifest:
    """The manifest of a back-up whose files are those that were written."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{folder} is no back-up: its {MANIFEST} cannot be read") from error
    found = _digests(folder)
    found.pop(MANIFEST)
    for name in sorted(manifest.files.keys() | found.keys()):
        if manifest.files.get(name) != found.get(name):
            raise DataError(
                f"the back-up is damaged: {folder / name} is not what was written; take another one"
            )
    return manifest

"""Where models and data live between stages: references, and the two stores that resolve them.

A stage hands on a `ModelRef` with an explicit version, never a path or an object.
`MlflowModelStore` keeps the bytes in MLflow; `DirectoryModelStore` does the same in a folder, for
tests and for work without a server. Both copy bytes and load nothing; files that could carry a
pickle are refused.
"""

import hashlib
import json
import re
import shutil
import tempfile
import uuid
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ConfigDict, Field

from rlhf_core.data import prepared
from rlhf_core.errors import DataError, ModelError

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_VERSION_URI = re.compile(rf"models:/({NAME})/([1-9]\d*)")
_ALIAS_URI = re.compile(rf"models:/({NAME})@([A-Za-z0-9_-]+)")
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})
DIGEST_TAG = "digest"
LOGGED_MODEL_TAG = "logged_model_id"
DATA_FOLDER = "data"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Ref(_Frozen):
    """What travels between stages: a pointer to something that MLflow keeps."""

    @property
    @abstractmethod
    def uri(self) -> str:
        """The address in MLflow's own notation."""


class ModelRef(Ref):
    """One version of a registered model."""

    name: str = Field(pattern=rf"^{NAME}$")
    version: int = Field(ge=1)

    @property
    def uri(self) -> str:
        """`models:/name/version`."""
        return f"models:/{self.name}/{self.version}"

    @classmethod
    def parse(cls, uri: str) -> "ModelRef":
        """The reference that `models:/name/version` names.

        Raises: ModelError for any other text.
        """
        match = _VERSION_URI.fullmatch(uri)
        if match is None:
            raise ModelError(f"'{uri}' is no version of a model; write models:/name/3")
        return cls(name=match[1], version=int(match[2]))


class DatasetRef(Ref):
    """The prepared data that a run has stored."""

    run_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    digest: str = Field(pattern=r"^[0-9a-f]{16}$")

    @property
    def uri(self) -> str:
        """`runs:/run_id/data`."""
        return f"runs:/{self.run_id}/{DATA_FOLDER}"


class PipelineRun(_Frozen):
    """The MLflow run of a whole pipeline, parent of its stages' runs."""

    project: str = Field(pattern=rf"^{NAME}$")
    run_id: str
    experiment_id: str
    seed: int
    force: tuple[str, ...] = ()  # stages to do again even if they were done before


class Upload(_Frozen):
    """A model whose bytes are stored and checked, and which has no version yet."""

    id: str
    name: str
    run_id: str
    digest: str


class ModelStore(Protocol):
    """What a stage needs of a model registry. A version that is not there raises ModelError."""

    @abstractmethod
    def upload(self, directory: Path, name: str, *, run_id: str) -> Upload:
        """Store a model directory and compare what was stored with it. Slow; registers nothing."""

    @abstractmethod
    def register(self, upload: Upload, *, tags: Mapping[str, str]) -> ModelRef:
        """Make an upload the next version of its model. Fast."""

    def publish(
        self, directory: Path, name: str, *, run_id: str, tags: Mapping[str, str]
    ) -> ModelRef:
        """Upload and register."""
        return self.register(self.upload(directory, name, run_id=run_id), tags=tags)

    @abstractmethod
    def fetch(self, ref: ModelRef, to: Path) -> Path:
        """Write the model directory to `to`, which must not exist yet; its digest is checked."""

    @abstractmethod
    def versions(self, name: str) -> list[int]:
        """The versions of a model, ascending; empty when there is no such model."""

    @abstractmethod
    def set_alias(self, ref: ModelRef, alias: str) -> None:
        """Point an alias at a version; it points nowhere else afterwards."""

    @abstractmethod
    def get_alias(self, name: str, alias: str) -> ModelRef | None:
        """The version that an alias points at."""

    @abstractmethod
    def names(self) -> list[str]:
        """The models that have a version, in alphabetical order."""

    @abstractmethod
    def tags(self, ref: ModelRef) -> dict[str, str]:
        """The tags of a version."""

    @abstractmethod
    def delete(self, ref: ModelRef) -> None:
        """Remove a version and the aliases that point at it. Its number is not used again."""

    @abstractmethod
    def delete_of_run(self, run_id: str) -> None:
        """Remove every version that a run has registered."""

    def exists(self, ref: ModelRef) -> bool:
        """Whether the version is there."""
        return ref.version in self.versions(ref.name)

    def resolve(self, uri: str) -> ModelRef:
        """The version that `models:/name/3` or `models:/name@alias` means now.

        Raises: ModelError that lists what there is when it means nothing.
        """
        if match := _ALIAS_URI.fullmatch(uri):
            ref = self.get_alias(match[1], match[2])
            if ref is None:
                raise ModelError(f"'{uri}' points at no version; {self._what_there_is(match[1])}")
            return ref
        if not _VERSION_URI.fullmatch(uri):
            raise ModelError(
                f"'{uri}' is no reference to a model; write models:/name/3 or models:/name@champion"
            )
        ref = ModelRef.parse(uri)
        self.require(ref)
        return ref

    def require(self, ref: ModelRef) -> None:
        """Raise ModelError that lists what there is unless the version is there."""
        if not self.exists(ref):
            raise ModelError(f"there is no {ref.uri}; {self._what_there_is(ref.name)}")

    def _what_there_is(self, name: str) -> str:
        if versions := self.versions(name):
            return f"'{name}' has the versions {', '.join(map(str, versions))}"
        names = self.names()
        known = f"the models here are {', '.join(names)}" if names else "no model is registered yet"
        return f"there is no model '{name}'; {known}"


class MlflowModelStore(ModelStore):
    """Versions are LoggedModels of MLflow that hold a plain model directory.

    `mlflow.transformers` is not used: with transformers 5 it loses adapter weights in silence.
    """

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def upload(self, directory: Path, name: str, *, run_id: str) -> Upload:
        """Create a LoggedModel of the run, READY once its bytes are checked, else FAILED."""
        check_files(directory)
        experiment = self._client.get_run(run_id).info.experiment_id
        model = self._client.create_logged_model(experiment, name=name, source_run_id=run_id)
        try:
            self._client.log_model_artifacts(model.model_id, str(directory))
            with tempfile.TemporaryDirectory() as scratch:
                stored = self._download(model.artifact_location, Path(scratch) / "model")
                found = _check_copy(stored, model_digest(directory), f"the copy of {directory}")
        except BaseException:
            self._client.finalize_logged_model(model.model_id, "FAILED")
            raise
        self._client.finalize_logged_model(model.model_id, "READY")
        return Upload(id=model.model_id, name=name, run_id=run_id, digest=found)

    def register(self, upload: Upload, *, tags: Mapping[str, str]) -> ModelRef:
        """Create the version with its tags in one call, and name it on the LoggedModel."""
        self._ensure_model(upload.name)
        # The location and not `models:/m-...`: MLflow resolves the latter with its global client.
        location = self._client.get_logged_model(upload.id).artifact_location
        made = self._client.create_model_version(
            upload.name,
            location,
            run_id=upload.run_id,
            model_id=upload.id,
            await_creation_for=0,
            tags={**tags, DIGEST_TAG: upload.digest, LOGGED_MODEL_TAG: upload.id},
        )
        link = [{"name": made.name, "version": str(made.version)}]
        self._client.set_logged_model_tags(upload.id, {"mlflow.modelVersions": json.dumps(link)})
        return ModelRef(name=made.name, version=int(made.version))

    def fetch(self, ref: ModelRef, to: Path) -> Path:
        """Download the version's files."""
        self.require(ref)
        location = self._client.get_model_version_download_uri(ref.name, str(ref.version))
        with _staged(to) as part:
            try:
                stored = self._download(location, part)
            except MlflowException as error:
                raise ModelError(
                    f"the files of {ref.uri} cannot be fetched ({error}); see that {location} can "
                    "be reached and holds a model"
                ) from error
            _check_copy(stored, self.tags(ref).get(DIGEST_TAG), ref.uri)
            check_files(stored)
        return to

    def versions(self, name: str) -> list[int]:
        """Ask the registry."""
        return sorted(int(version.version) for version in self._search(f"name='{name}'"))

    def names(self) -> list[str]:
        """Ask the registry for all versions: a model may be left without one."""
        return sorted({version.name for version in self._search("")})

    def set_alias(self, ref: ModelRef, alias: str) -> None:
        """Set the alias in the registry."""
        self.require(ref)
        self._client.set_registered_model_alias(ref.name, alias, str(ref.version))

    def get_alias(self, name: str, alias: str) -> ModelRef | None:
        """Ask the registry; MLflow reports an unknown alias as an invalid parameter."""
        try:
            found = self._client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return ModelRef(name=name, version=int(found.version))

    def tags(self, ref: ModelRef) -> dict[str, str]:
        """Ask the registry."""
        return dict(self._version(ref).tags)

    def delete(self, ref: ModelRef) -> None:
        """Delete the version and its LoggedModel; `mlflow gc` frees the bytes."""
        logged_model = self.tags(ref).get(LOGGED_MODEL_TAG)
        self._client.delete_model_version(ref.name, str(ref.version))
        if logged_model:
            self._client.delete_logged_model(logged_model)

    def delete_of_run(self, run_id: str) -> None:
        """Ask the registry which versions the run has made, and delete them."""
        for made in self._search(f"run_id='{run_id}'"):
            self.delete(ModelRef(name=made.name, version=int(made.version)))

    def _search(self, condition: str) -> list[ModelVersion]:
        found, token = list[ModelVersion](), None
        while True:
            page = self._client.search_model_versions(condition, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _ensure_model(self, name: str) -> None:
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _version(self, ref: ModelRef) -> ModelVersion:
        self.require(ref)
        return self._client.get_model_version(ref.name, str(ref.version))

    def _download(self, location: str, to: Path) -> Path:
        with tempfile.TemporaryDirectory(dir=to.parent) as scratch:
            got = mlflow.artifacts.download_artifacts(
                location, dst_path=scratch, tracking_uri=self._client.tracking_uri
            )
            return Path(shutil.move(got, to))


class DirectoryModelStore(ModelStore):
    """The same in a folder, for tests, notebooks and machines without a server.

        root/uploads/ID/                        bytes without a version
        root/models/NAME/VERSION/model/         the model directory
        root/models/NAME/VERSION/version.json   tags, run and digest; written last, so a version
                                                is there whole or not at all
        root/models/NAME/aliases.json           alias -> version

    Several processes may publish at once: creating the folder VERSION claims the number. A deleted
    version leaves its folder empty, so the number stays taken.
    """

    def __init__(self, root: Path) -> None:
        self._models = root / "models"
        self._uploads = root / "uploads"

    def upload(self, directory: Path, name: str, *, run_id: str) -> Upload:
        """Copy the directory to `uploads`."""
        check_files(directory)
        identifier = uuid.uuid4().hex
        with _staged(self._uploads / identifier) as part:
            shutil.copytree(directory, part)
            found = _check_copy(part, model_digest(directory), f"the copy of {directory}")
        return Upload(id=identifier, name=name, run_id=run_id, digest=found)

    def register(self, upload: Upload, *, tags: Mapping[str, str]) -> ModelRef:
        """Claim the next number, move the bytes there, write `version.json`."""
        ref = self._claim(upload.name)
        home = self._folder(ref)
        (self._uploads / upload.id).rename(home / "model")
        facts = {**tags, DIGEST_TAG: upload.digest, "run_id": upload.run_id}
        _write_json(home / "version.json", facts)
        return ref

    def fetch(self, ref: ModelRef, to: Path) -> Path:
        """Copy the version's files."""
        expected = self.tags(ref)[DIGEST_TAG]
        with _staged(to) as part:
            shutil.copytree(self._folder(ref) / "model", part)
            _check_copy(part, expected, ref.uri)
            check_files(part)
        return to

    def versions(self, name: str) -> list[int]:
        """List the folders that hold a whole version."""
        found = (self._models / name).glob("*/version.json")
        return sorted(int(path.parent.name) for path in found)

    def names(self) -> list[str]:
        """List the folders that hold a version."""
        return sorted(path.name for path in self._models.glob("*") if self.versions(path.name))

    def set_alias(self, ref: ModelRef, alias: str) -> None:
        """Write `aliases.json` anew."""
        self.require(ref)
        self._write_aliases(ref.name, {**self._aliases(ref.name), alias: ref.version})

    def get_alias(self, name: str, alias: str) -> ModelRef | None:
        """Read `aliases.json`."""
        version = self._aliases(name).get(alias)
        return None if version is None else ModelRef(name=name, version=version)

    def tags(self, ref: ModelRef) -> dict[str, str]:
        """Read `version.json`."""
        self.require(ref)
        return dict(json.loads((self._folder(ref) / "version.json").read_text(encoding="utf-8")))

    def delete(self, ref: ModelRef) -> None:
        """Empty the version's folder."""
        self.require(ref)
        aliases = self._aliases(ref.name)
        self._write_aliases(ref.name, {a: v for a, v in aliases.items() if v != ref.version})
        (self._folder(ref) / "version.json").unlink()
        shutil.rmtree(self._folder(ref) / "model")

    def delete_of_run(self, run_id: str) -> None:
        """Look through all versions."""
        refs = [ModelRef(name=n, version=v) for n in self.names() for v in self.versions(n)]
        for ref in refs:
            if self.tags(ref)["run_id"] == run_id:
                self.delete(ref)

    def _folder(self, ref: ModelRef) -> Path:
        return self._models / ref.name / str(ref.version)

    def _claim(self, name: str) -> ModelRef:
        home = self._models / ModelRef(name=name, version=1).name
        home.mkdir(parents=True, exist_ok=True)
        while True:
            taken = [int(path.name) for path in home.iterdir() if path.name.isdigit()]
            ref = ModelRef(name=name, version=max(taken, default=0) + 1)
            try:
                self._folder(ref).mkdir()
            except FileExistsError:
                continue  # another process was faster
            return ref

    def _aliases(self, name: str) -> dict[str, int]:
        path = self._models / name / "aliases.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def _write_aliases(self, name: str, aliases: Mapping[str, int]) -> None:
        _write_json(self._models / name / "aliases.json", aliases)


def store_dataset(client: MlflowClient, run_id: str, directory: Path) -> DatasetRef:
    """Store prepared data with a run, and compare what was stored with it."""
    client.log_artifacts(run_id, str(directory), DATA_FOLDER)
    ref = DatasetRef(run_id=run_id, digest=prepared.digest(directory))
    with tempfile.TemporaryDirectory() as scratch:
        fetch_dataset(client, ref, Path(scratch) / DATA_FOLDER)
    return ref


def fetch_dataset(client: MlflowClient, ref: DatasetRef, to: Path) -> Path:
    """Write the prepared data to `to`, which must not exist yet.

    Raises: DataError when the run or its data is not there, or is not what the digest says.
    """
    with _staged(to) as part, tempfile.TemporaryDirectory(dir=part.parent) as scratch:
        try:
            shutil.move(client.download_artifacts(ref.run_id, DATA_FOLDER, scratch), part)
        except (MlflowException, OSError) as error:
            raise DataError(
                f"there is no prepared data at {ref.uri} ({error}); run the prepare stage again"
            ) from error
        if (found := prepared.digest(part)) != ref.digest:
            raise DataError(
                f"the data at {ref.uri} is not what was stored: its digest is {found} and should "
                f"be {ref.digest}; run the prepare stage again"
            )
    return to


def model_digest(directory: Path) -> str:
    """SHA-256 of all files under a directory: their names, sizes and bytes."""
    sha = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        sha.update(f"{path.relative_to(directory).as_posix()} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                sha.update(block)
    return sha.hexdigest()


def check_files(directory: Path) -> None:
    """Raise ModelError unless the directory holds safetensors, and neither pickles nor links."""
    files = sorted(path for path in directory.rglob("*") if not path.is_dir())
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelError(f"{directory} holds no safetensors weights; save the model there first")
    for path in files:
        if path.is_symlink() or path.suffix.lower() in PICKLES:
            what = "a link" if path.is_symlink() else "a file that can carry code when it is loaded"
            raise ModelError(f"{path} is {what}; a model directory holds plain safetensors files")


def _check_copy(copy: Path, expected: str | None, what: str) -> str:
    """The digest of `copy`; raises ModelError when another one is expected."""
    found = model_digest(copy)
    if expected not in (None, found):
        raise ModelError(
            f"{what} is damaged: the digest of what the store gives back is {found} and should be "
            f"{expected}; publish the model again, and see to the disk of the store"
        )
    return found


@contextmanager
def _staged(to: Path) -> Iterator[Path]:
    """A path beside `to` that becomes `to` when the block succeeds and goes away when it fails."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=to.parent) as scratch:
        part = Path(scratch) / to.name
        yield part
        part.rename(to)


def _write_json(path: Path, content: Mapping[str, str] | Mapping[str, int]) -> None:
    part = path.with_suffix(f".{uuid.uuid4().hex}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(path)

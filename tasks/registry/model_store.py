"""The model store: versions in MLflow's registry, each a plain directory of files.

It copies bytes and loads nothing; it refuses files that could contain a pickle.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from pydantic import BaseModel, ConfigDict

from rlhf_core.errors import ModelError
from tasks.record.tags import DIGEST, LOGGED_MODEL, MODEL_VERSIONS
from tasks.registry.files import MODEL_CARD, check_copy, check_files, model_digest, staged
from tasks.registry.refs import ModelRef, name_and_alias, place_of, require_address

DESCRIPTION_LENGTH = 5000  # MLflow's limit for the description of a version


class Upload(BaseModel):
    """A stored and verified model that has no version yet."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    name: str
    run_id: str
    digest: str


class MlflowModelStore:
    """Stores versions as LoggedModels of MLflow that hold a plain model directory.

    A version that does not exist raises ModelError, which lists those that do. We do not use
    `mlflow.transformers`, because with transformers 5 it silently loses adapter weights.
    """

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def upload(self, directory: Path, name: str, *, run_id: str) -> Upload:
        """Store a model directory and verify the copy. This is slow and registers nothing.

        The copy is a LoggedModel of the run: READY once it is verified, else FAILED.
        """
        check_files(directory)
        experiment = self._client.get_run(run_id).info.experiment_id
        model = self._client.create_logged_model(experiment, name=name, source_run_id=run_id)
        try:
            self._client.log_model_artifacts(model.model_id, str(directory))
            with tempfile.TemporaryDirectory() as scratch:
                stored = self._download(model.artifact_location, Path(scratch) / "model")
                found = check_copy(stored, model_digest(directory), f"the copy of {directory}")
        except BaseException:
            self._client.finalize_logged_model(model.model_id, "FAILED")
            raise
        self._client.finalize_logged_model(model.model_id, "READY")
        return Upload(id=model.model_id, name=name, run_id=run_id, digest=found)

    def register(self, upload: Upload, *, tags: Mapping[str, str]) -> ModelRef:
        """Make an upload the next version of its model, with its tags, in one fast call."""
        self._ensure_model(upload.name)
        # The location and not `models:/m-...`: MLflow resolves the latter with its global client.
        location = self._client.get_logged_model(upload.id).artifact_location
        made = self._client.create_model_version(
            upload.name,
            location,
            run_id=upload.run_id,
            model_id=upload.id,
            await_creation_for=0,
            tags={**tags, DIGEST: upload.digest, LOGGED_MODEL: upload.id},
        )
        link = [{"name": made.name, "version": str(made.version)}]
        self._client.set_logged_model_tags(upload.id, {MODEL_VERSIONS: json.dumps(link)})
        return ModelRef(name=made.name, version=int(made.version))

    def publish(
        self, directory: Path, name: str, *, run_id: str, tags: Mapping[str, str]
    ) -> ModelRef:
        """Upload and register."""
        return self.register(self.upload(directory, name, run_id=run_id), tags=tags)

    def fetch(self, ref: ModelRef, to: Path) -> Path:
        """Write the model directory to `to`, which must not exist yet, and verify its digest."""
        self.require(ref)
        location = self._client.get_model_version_download_uri(ref.name, str(ref.version))
        with staged(to) as part:
            try:
                stored = self._download(location, part)
            except MlflowException as error:
                raise ModelError(
                    f"the files of {ref.uri} cannot be fetched ({error}); check that {location} "
                    "can be reached and holds a model"
                ) from error
            check_copy(stored, self.tags(ref).get(DIGEST), ref.uri)
            check_files(stored)
        return to

    def describe(self, ref: ModelRef, card: str, description: str) -> None:
        """Write the model card of a version, or replace it, and its description in the registry.

        The card is one more file of the LoggedModel, which the digest of the version leaves out.

        Raises: ModelError if the version does not exist, or has no LoggedModel.
        """
        logged_model = self.tags(ref).get(LOGGED_MODEL)
        if logged_model is None:
            raise ModelError(f"{ref.uri} holds no model of this pipeline, and gets no model card")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / MODEL_CARD
            path.write_text(card, encoding="utf-8")
            self._client.log_model_artifact(logged_model, str(path))
        text = description
        if len(text) > DESCRIPTION_LENGTH:
            text = text[: DESCRIPTION_LENGTH - 1] + "…"
        self._client.update_model_version(ref.name, str(ref.version), description=text)

    def versions(self, name: str) -> list[int]:
        """The versions of a model, ascending; empty if there is no such model."""
        return sorted(int(version.version) for version in self._search(f"name='{name}'"))

    def names(self) -> list[str]:
        """The models that have a version, in alphabetical order."""
        return sorted({version.name for version in self._search("")})

    def every_version(self) -> list[ModelVersion]:
        """The versions of all models, as MLflow has them; without their aliases."""
        return self._search("")

    def every_alias(self) -> dict[str, tuple[str, ...]]:
        """The aliases of all versions, by the address of the version."""
        found: dict[str, list[str]] = {}
        token = None
        while True:
            page = self._client.search_registered_models(page_token=token)
            for model in page:
                for alias, version in model.aliases.items():
                    found.setdefault(f"models:/{model.name}/{version}", []).append(alias)
            token = page.token
            if not token:
                return {uri: tuple(sorted(names)) for uri, names in found.items()}

    def set_alias(self, ref: ModelRef, alias: str) -> None:
        """Move an alias to a version."""
        self.require(ref)
        self._client.set_registered_model_alias(ref.name, alias, str(ref.version))

    def get_alias(self, name: str, alias: str) -> ModelRef | None:
        """The version that an alias points to, if any."""
        try:
            found = self._client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            # MLflow reports an unknown alias as an invalid parameter.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return ModelRef(name=name, version=int(found.version))

    def aliases(self, ref: ModelRef) -> list[str]:
        """The aliases that point to a version, in alphabetical order."""
        found = self._client.get_registered_model(ref.name).aliases
        return sorted(name for name, version in found.items() if str(version) == str(ref.version))

    def remove_alias(self, name: str, alias: str) -> None:
        """Have an alias point to no version."""
        self._client.delete_registered_model_alias(name, alias)

    def remove_files(self, ref: ModelRef) -> None:
        """Delete the files of a version for good; the version stays, and says what it was."""
        location = self._client.get_model_version_download_uri(ref.name, str(ref.version))
        get_artifact_repository(location, tracking_uri=self._client.tracking_uri).delete_artifacts()

    def tags(self, ref: ModelRef) -> dict[str, str]:
        """The tags of a version."""
        return dict(self._version(ref).tags)

    def add_tags(self, ref: ModelRef, tags: Mapping[str, str]) -> None:
        """Add tags to a version, one after the other."""
        for name, value in tags.items():
            self._client.set_model_version_tag(ref.name, str(ref.version), name, value)

    def remove_tag(self, ref: ModelRef, name: str) -> None:
        """Delete a tag of a version that has it."""
        self._client.delete_model_version_tag(ref.name, str(ref.version), name)

    def model_tags(self, name: str) -> dict[str, str]:
        """The tags of a registered model itself, which all its versions share."""
        return dict(self._client.get_registered_model(name).tags)

    def add_model_tag(self, name: str, tag: str, value: str) -> None:
        """Add a tag to a registered model itself."""
        self._client.set_registered_model_tag(name, tag, value)

    def delete(self, ref: ModelRef) -> None:
        """Delete a version, its LoggedModel, and the aliases that point to it.

        Its number is never used again; `mlflow gc` frees the storage.
        """
        logged_model = self.tags(ref).get(LOGGED_MODEL)
        self._client.delete_model_version(ref.name, str(ref.version))
        if logged_model:
            self._client.delete_logged_model(logged_model)

    def delete_of_run(self, run_id: str) -> None:
        """Delete every version that a run registered."""
        for made in self._search(f"run_id='{run_id}'"):
            self.delete(ModelRef(name=made.name, version=int(made.version)))

    def exists(self, ref: ModelRef) -> bool:
        """Whether the version exists."""
        return ref.version in self.versions(ref.name)

    def require(self, ref: ModelRef) -> None:
        """Raise ModelError, which lists the existing versions, unless this version exists."""
        if not self.exists(ref):
            raise ModelError(f"there is no {ref.uri}; {self._existing(ref.name)}")

    def resolve(self, uri: str) -> ModelRef:
        """The version that `models:/name/3` or `models:/name@alias` currently refers to.

        Raises: ModelError, which lists the existing versions, if there is none.
        """
        require_address(uri)
        if found := name_and_alias(uri):
            ref = self.get_alias(*found)
            if ref is None:
                raise ModelError(f"'{uri}' points to no version; {self._existing(found[0])}")
            return ref
        ref = ModelRef.parse(uri)
        self.require(ref)
        return ref

    def _existing(self, name: str) -> str:
        """What there is instead of a model or version, and where we looked."""
        place = place_of(self._client.tracking_uri)
        if versions := self.versions(name):
            return f"'{name}' has the versions {', '.join(map(str, versions))}, in {place}"
        names = self.names()
        known = (
            f"the registered models are {', '.join(names)}"
            if names
            else "no model is registered yet"
        )
        return f"there is no model '{name}'; {known}, in {place}"

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

"""References to models, data and votes, which stages pass on instead of paths or objects."""

import re
from abc import abstractmethod
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from rlhf_core.errors import DataError, ModelError

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,249}"
SHOWN = 200  # characters of a bad reference in a message
DATA_FOLDER = "data"  # artifact folder of the run that prepared them
_VERSION_URI = re.compile(rf"models:/({NAME})/([1-9]\d{{0,8}})")
_ALIAS_URI = re.compile(rf"models:/({NAME})@([A-Za-z0-9_-]+)")
_SNAPSHOT_URI = re.compile(rf"feedback:/({NAME})/([0-9a-f]{{64}})")
_DATA_URI = re.compile(rf"runs:/([0-9a-f]{{32}})/{DATA_FOLDER}")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Ref(_Frozen):
    """A reference to something stored in MLflow, or in the preference store."""

    @property
    @abstractmethod
    def uri(self) -> str:
        """The address, in MLflow's own notation if MLflow has it."""


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
        """Parse `models:/name/version`.

        Raises: ModelError for any other text.
        """
        match = _VERSION_URI.fullmatch(uri)
        if match is None:
            raise ModelError(f"'{uri}' is not a version of a model; write models:/name/3")
        return cls(name=match[1], version=int(match[2]))


class DatasetRef(Ref):
    """The prepared data that a run stored."""

    run_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    digest: str = Field(pattern=r"^[0-9a-f]{16}$")

    @property
    def uri(self) -> str:
        """`runs:/run_id/data`."""
        return f"runs:/{self.run_id}/{DATA_FOLDER}"


class SnapshotRef(Ref):
    """Votes of the preference store: an immutable snapshot, which is not in MLflow itself."""

    project: str = Field(pattern=rf"^{NAME}$")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")

    @property
    def uri(self) -> str:
        """`feedback:/project/digest`."""
        return f"feedback:/{self.project}/{self.digest}"

    @classmethod
    def parse(cls, uri: str) -> "SnapshotRef":
        """Parse `feedback:/project/digest`.

        Raises: DataError for any other text.
        """
        match = _SNAPSHOT_URI.fullmatch(uri)
        if match is None:
            raise DataError(f"'{uri[:SHOWN]}' is no snapshot; write feedback:/PROJECT/DIGEST")
        return cls(project=match[1], digest=match[2])


class PipelineRun(_Frozen):
    """The MLflow run of a whole pipeline, parent of its stages' runs."""

    project: str = Field(pattern=rf"^{NAME}$")
    run_id: str
    experiment_id: str
    seed: int
    force: tuple[str, ...] = ()  # stages to run again even if a result can be reused


def require_name(name: str, what: str) -> None:
    """Raise ModelError unless MLflow can have a model of this name; `what` is the user's word."""
    if not re.fullmatch(NAME, name):
        raise ModelError(
            f"{what[:SHOWN]}: there can be none of this name, which has letters, digits, dots, "
            "dashes and underscores, 250 at most; check the name"
        )


def require_address(uri: str) -> None:
    """Raise ModelError unless a text is `models:/name/version` or `models:/name@alias`."""
    if not is_version(uri) and name_and_alias(uri) is None:
        shown = uri if len(uri) <= SHOWN else f"{uri[:SHOWN]}…"
        raise ModelError(
            f"'{shown}' is not a model reference; write models:/name/3 or models:/name@champion"
        )


def is_version(uri: str) -> bool:
    """Whether a text is `models:/name/version`."""
    return _VERSION_URI.fullmatch(uri) is not None


def name_and_alias(uri: str) -> tuple[str, str] | None:
    """The two parts of `models:/name@alias`; None for any other text."""
    match = _ALIAS_URI.fullmatch(uri)
    return (match[1], match[2]) if match else None


def run_of_data(uri: str) -> str | None:
    """The run in `runs:/run_id/data`; None for any other text."""
    match = _DATA_URI.fullmatch(uri)
    return match[1] if match else None


def place_of(tracking_uri: str) -> str:
    """Where MLflow keeps things, for a message that something is not there: home or server."""
    database = tracking_uri.removeprefix("sqlite:///")
    if database == tracking_uri:
        return f"the MLflow at {tracking_uri}"
    path = Path(database)
    ours = path.parts[-2:] == ("mlflow", "mlflow.db")
    return f"the home {path.parents[1]}" if ours else f"the database {path}"

"""References to models and data in MLflow, which stages pass on instead of paths or objects."""

import re
from abc import abstractmethod

from pydantic import BaseModel, ConfigDict, Field

from rlhf_core.errors import ModelError

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
DATA_FOLDER = "data"  # artifact folder of the run that prepared them
_VERSION_URI = re.compile(rf"models:/({NAME})/([1-9]\d*)")
_ALIAS_URI = re.compile(rf"models:/({NAME})@([A-Za-z0-9_-]+)")
_DATA_URI = re.compile(rf"runs:/([0-9a-f]{{32}})/{DATA_FOLDER}")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Ref(_Frozen):
    """A reference to something stored in MLflow."""

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


class PipelineRun(_Frozen):
    """The MLflow run of a whole pipeline, parent of its stages' runs."""

    project: str = Field(pattern=rf"^{NAME}$")
    run_id: str
    experiment_id: str
    seed: int
    force: tuple[str, ...] = ()  # stages to run again even if a result can be reused


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

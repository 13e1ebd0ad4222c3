"""The base of every config section: frozen after parsing, no unknown keys."""

from collections.abc import Mapping
from typing import Annotated, Any, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict

from rlhf_core.redaction import without_forms


class PathMark:
    """Marks a field as the path of a file or folder, if it is no hub id and no address.

    Whoever loads a config from a file makes such a path absolute.
    """


class Later:
    """Marks a setting that came after runs without it: at its default it changes nothing, and so is
    no part of what identifies a run."""


def _without_secrets(text: str) -> str:
    if (shown := without_forms(text)) != text:
        raise ValueError(
            f"'{shown}' holds a password or a token, and MLflow and Prefect keep the config; "
            "remove it, and give a local copy of the file, or HF_TOKEN for the hub"
        )
    return text


FileOrHub: TypeAlias = Annotated[str, AfterValidator(_without_secrets), PathMark]


def identifying(section: BaseModel, exclude: Any = None) -> dict[str, Any]:
    """The settings as JSON values, without those marked `Later` that have their default."""
    found = section.model_dump(mode="json", exclude=exclude)
    fields: Mapping[str, Any] = type(section).model_fields
    for name, field in fields.items():
        if Later in field.metadata and getattr(section, name) == field.default:
            found.pop(name, None)
    return found


class Section(BaseModel):
    """A group of settings. A misspelt key raises; a parsed value never changes.

    One schema serves the YAML file, the form in the Prefect UI and the MLflow parameters, so every
    field has a description with its unit, and bounds.
    """

    # The form labels a field with the name that it has in YAML and in error messages.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        field_title_generator=lambda name, info: name,
    )

    @classmethod
    def part_of(cls, section: "Section") -> Self:
        """The settings of this class, taken from a section that has more."""
        if type(section) is cls:
            return section
        return cls.model_validate({name: getattr(section, name) for name in cls.model_fields})

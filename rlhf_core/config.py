"""The base of every config section: frozen after parsing, no unknown keys."""

from typing import Annotated, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict

from rlhf_core.redaction import without_forms


class PathMark:
    """Marks a field as the path of a file or folder, if it is no hub id and no address.

    Whoever loads a config from a file makes such a path absolute.
    """


def _without_secrets(text: str) -> str:
    if (shown := without_forms(text)) != text:
        raise ValueError(
            f"'{shown}' holds a password or a token, and MLflow and Prefect keep the config; "
            "remove it, and give a local copy of the file, or HF_TOKEN for the hub"
        )
    return text


FileOrHub: TypeAlias = Annotated[str, AfterValidator(_without_secrets), PathMark]


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

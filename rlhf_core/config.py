"""The base of every config section: frozen after parsing, no unknown keys."""

from typing import Self

from pydantic import BaseModel, ConfigDict


class FileOrHub:
    """Marks a text as the path of a file or folder, if it is no hub id and no address.

    Put into the type of a field, `Annotated[str, FileOrHub]`: whoever loads a config from a file
    makes such a path absolute.
    """


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

"""Relative paths of a config: they start from the folder of its file, those of `--set` from here.

A path is made absolute when the config is loaded, so that a run may be resumed, swept or repeated
from any folder, and MLflow shows which files it read.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf_core.config import PathMark
from rlhf_core.errors import ConfigError

SUFFIXES = frozenset({".jsonl", ".json", ".csv", ".parquet", ".gz", ".gguf"})


def folder_of(config: Path) -> Path:
    """The folder that the paths of a config file start from.

    For standard input, a pipe or a device it is the working folder.
    """
    path = Path(os.path.normpath(config.absolute()))
    try:
        other = path.exists() and not path.is_file()
    except (OSError, ValueError):  # a name that cannot be one: whoever reads it says so
        other = False
    return Path.cwd() if other or path.parts[1:2] in (("dev",), ("proc",)) else path.parent


def anchored(data: Mapping[str, Any], schema: type[BaseModel], folder: Path) -> dict[str, Any]:
    """The content of a config with its paths absolute; hub ids and addresses stay as they are.

    Raises: ConfigError for a path that is not in `folder` but is in the working folder.
    """
    return _anchored(data, schema, folder, "")


def _anchored(
    data: Mapping[str, Any], schema: type[BaseModel], folder: Path, prefix: str
) -> dict[str, Any]:
    made = dict(data)
    for name, field in schema.model_fields.items():
        value = made.get(name)
        if isinstance(value, Mapping) and (inner := _section(field)):
            made[name] = _anchored(value, inner, folder, f"{prefix}{name}.")
        elif isinstance(value, str) and PathMark in field.metadata:
            made[name] = _absolute(value, folder, prefix + name)
    return made


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _absolute(text: str, folder: Path, setting: str) -> str:
    """A path below `folder`, if that is what the text means."""
    if not text.strip() or ":" in text.partition("/")[0] or "\0" in text or text[0] == "~":
        return text  # package:NAME/FILE, an address, or a home
    path, here = Path(os.path.normpath(folder / text)), Path(os.path.normpath(Path.cwd() / text))
    try:
        if path.exists():
            return str(path)
        if here.exists():
            better = os.path.relpath(here, folder)
            raise ConfigError(
                f"{setting} is '{text}', which is in the working folder but not in {folder}: paths "
                f"start from the folder of the config; write {better}, or an absolute path"
            )
    except OSError:  # a name that is too long: whoever reads it says so
        return text
    named = text.startswith(".") or Path(text).suffix.lower() in SUFFIXES or text.count("/") > 1
    return str(path) if named else text

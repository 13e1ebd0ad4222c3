"""Reads a config from a YAML file and `--set key=value`; reports every error with its place.

The schema is an argument, so this module knows no particular config.
"""

import difflib
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from flows.cli.paths import anchored, folder_of
from flows.cli.plain_yaml import parse_yaml
from rlhf_core.config import Section
from rlhf_core.errors import ConfigError, UserError
from rlhf_core.reading import MIB, UnreadableError, exists, read_whole
from rlhf_core.redaction import masked

LARGEST = MIB // 4  # of a config file; YAML is read at some hundred KiB a second
MOST_ERRORS = 50  # that are told
Config = TypeVar("Config", bound=Section)
Location = tuple[str | int, ...]


class Override(NamedTuple):
    """One `--set key=value`, as typed and as parsed."""

    text: str
    path: tuple[str, ...]
    value: object


def load_config(
    path: Path, overrides: Sequence[str], schema: type[Config], *, anchor: bool = False
) -> Config:
    """Read `path`, apply each `key.path=value` of `overrides` in order, and validate.

    Args:
        anchor: make relative paths absolute: those of the file start from its folder, those of the
            overrides from the working folder. Otherwise they stay as they are written.

    Raises:
        ConfigError: names the file and line, or the `--set`, of every error, and what would be
            accepted.
    """
    tree, data = _parse(path)
    settings = [parse_override(text) for text in overrides]
    if anchor:
        data = _anchored(data, schema, folder_of(path), str(path))
        settings = [anchored_override(override, schema) for override in settings]
    for override in settings:
        _apply(override, data)
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        sentences = [
            f"{_place(path, tree, settings, item['loc'])}: {_sentence(item, schema)}"
            for item in errors[:MOST_ERRORS]
        ]
        if len(errors) > MOST_ERRORS:
            sentences.append(f"… and {len(errors) - MOST_ERRORS:,} more errors")
        raise ConfigError("\n".join(sentences)) from None
    except UserError as error:  # a check across settings, which names them itself
        raise ConfigError(f"{path}: {error}") from None


def presets() -> Path:
    """The folder `./configs`, else the one in the package."""
    here = Path("configs")
    return here if here.is_dir() else packaged_presets()


def packaged_presets() -> Path:
    """The folder of presets in the package."""
    return Path(__file__).parents[2] / "configs"


def config_files(folder: Path) -> list[Path]:
    """The YAML files of a folder, by name.

    Raises:
        ConfigError: the folder has none.
    """
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise ConfigError(f"{folder} has no .yaml file: pass the folder of the configs.")
    return files


def describe(path: Path) -> str:
    """The comment at the top of a YAML file, as text."""
    lines = []
    for line in _read(path).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return "\n".join(lines).strip()


def parse_override(text: str) -> Override:
    """Split `a.b=value` and parse the value as YAML, as in a config file.

    An empty value is the empty string, which the sections treat as "not set".
    """
    key, equals, raw = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {text}: write it as section.key=value, as in ppo.kl_coef=0.1.")
    try:
        value = parse_yaml(raw, "the value")[1] if raw.strip() else ""
    except ConfigError:
        raise ConfigError(
            f"--set {text}: {raw!r} is not a YAML value; put quotes around text with special "
            "characters."
        ) from None
    return Override(text, path, value)


def anchored_override(override: Override, schema: type[BaseModel]) -> Override:
    """An override whose paths start from the working folder."""
    nested: Any = override.value
    for part in reversed(override.path):
        nested = {part: nested}
    nested = _anchored(nested, schema, Path.cwd(), f"--set {override.text}")
    for part in override.path:
        nested = nested[part]
    return override._replace(value=nested)


def _anchored(
    data: Mapping[str, Any], schema: type[BaseModel], folder: Path, where: str
) -> dict[str, Any]:
    try:
        return anchored(data, schema, folder)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


# ---- the file ----


def _read(path: Path) -> str:
    """The text of `path`, or a ConfigError that explains why it cannot be read."""
    try:
        return read_whole(path, LARGEST).decode("utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _yaml_names(path.parent), n=1)
        hint = f" Did you mean {path.with_name(near[0])}?" if near else " Check the path."
        raise ConfigError(f"{path}: no such file.{hint}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text: pass a YAML file.") from None
    except UnreadableError as error:
        inside = " in it" if exists(path) and path.is_dir() else ""
        raise ConfigError(f"{path} {error}: pass a YAML file{inside}.") from None


def _yaml_names(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("*.y*ml")]


def _parse(path: Path) -> tuple[yaml.MappingNode, dict[str, Any]]:
    """The node tree of the file, which knows the line of every key, and its plain data."""
    tree, data = parse_yaml(_read(path), str(path))
    if tree is None:
        raise ConfigError(f"{path} is empty: write settings as lines of the form key: value.")
    if not isinstance(tree, yaml.MappingNode) or not isinstance(data, dict):
        raise ConfigError(f"{path}: the file must consist of lines of the form key: value.")
    return tree, {str(key): value for key, value in data.items()}


def _apply(override: Override, data: dict[str, Any]) -> None:
    """Set one override in nested `data`; missing sections are created."""
    *groups, last = override.path
    for group in groups:
        # A section may be written as `sft:` with nothing below it, which YAML reads as null.
        section = {} if data.get(group) is None else data[group]
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override.text}: {group!r} is a value, not a section.")
        data[group] = dict(section)  # a copy: an alias in the file may share it with another key
        data = data[group]
    data[last] = override.value


# ---- error messages ----


def _place(
    path: Path, tree: yaml.MappingNode, overrides: Sequence[Override], location: Location
) -> str:
    """`--set …` if the invalid value came from there, else `file:line`."""
    keys = tuple(str(part) for part in location)
    for override in reversed(overrides):
        if keys and keys[: len(override.path)] == override.path:
            return f"--set {override.text}"
    line = _line(tree, location)
    return f"{path}:{line}" if line else str(path)


def _line(tree: yaml.MappingNode, location: Location) -> int:
    """The 1-based line of the deepest part of `location` in the file; 0 if there is none."""
    node: yaml.Node = tree
    line = 0
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                break
            key, node = found[-1]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _sentence(item: ErrorDetails, schema: type[BaseModel]) -> str:
    """One pydantic error as a sentence for the author of a YAML file."""
    name = ".".join(str(part) for part in item["loc"])
    match item["type"]:
        case "extra_forbidden":
            return f"there is no setting {name!r}. {_suggestion(item['loc'], schema)}"
        case "missing":
            return f"{name} is missing: add it."
        case "model_type":
            return f"{name} must be a section: put its settings below it, indented."
        case "value_error" | "assertion_error":
            text = str(item["ctx"]["error"])
            return f"{name}: {text}" if name else text
    rule = item["msg"].replace("Input should be", "must be")
    return f"{name} {rule}; it is {_shown(item['input'])}."


def _shown(value: object) -> str:
    """A value, short and without secrets."""
    return reprlib.repr(masked(value) if isinstance(value, str) else value)


def _suggestion(location: Location, schema: type[BaseModel]) -> str:
    """The closest known name: first in the same section, then anywhere in the schema."""
    *parents, last = (str(part) for part in location)
    neighbours = _fields(schema, parents)
    near = difflib.get_close_matches(last, neighbours, n=1)
    if near:
        return f"Did you mean {'.'.join([*parents, near[0]])!r}?"
    elsewhere = [name for name in _leaves(schema) if name.rpartition(".")[2] == last]
    if elsewhere:
        return f"Did you mean {elsewhere[0]!r}?"
    return f"Settings in this section: {', '.join(neighbours)}."


def _sections(schema: type[BaseModel]) -> Mapping[str, type[BaseModel]]:
    """The fields of `schema` that are sections themselves."""
    return {
        name: field.annotation
        for name, field in schema.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _fields(schema: type[BaseModel], parents: Sequence[str]) -> list[str]:
    for parent in parents:
        schema = _sections(schema).get(parent, schema)
    return list(schema.model_fields)


def _leaves(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted name of every setting."""
    sections = _sections(schema)
    for name in schema.model_fields:
        if name in sections:
            yield from _leaves(sections[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"

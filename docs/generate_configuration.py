"""Writes docs/configuration.md from the schema of the settings.

    .venv/bin/python docs/generate_configuration.py

A test fails when the page is not what this script would write.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flows.config import PipelineConfig
from tasks.settings import Settings

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """\
# Configuration

<!-- Written by docs/generate_configuration.py from the schema; do not edit. -->

One YAML file configures a whole run. It holds only what differs from the defaults below; one
schema is the file, the form in the Prefect UI and the parameters of the MLflow runs.

* `rlhf run my.yaml --set ppo.kl_coef=0.1` changes single settings. A value is read as YAML.
* `rlhf config my.yaml` prints the file with every default filled in.
* `rlhf validate my.yaml` checks the settings and the data, and [estimates](estimate.md) what a
  run will take; it keeps nothing.
* An unknown key, a wrong type or a value out of bounds is an error that names file and line.
* Settings that contradict each other are an error too: for example `ppo.batch_size` above
  `ppo.rollout_size`, or texts longer than the model reads.
* `""` means "not given". NaN and infinity are never a value.
* A relative path starts from the folder of the file, one in `--set` from the working folder.
* `rlhf validate` warns of settings that are valid and train for nothing, such as a learning rate
  for all weights that is kept with adapters; `rlhf run` repeats those that need no data.
"""

ENVIRONMENT = """\
## Environment variables

Where things are kept and which device computes is no part of a run's config. These variables are
read in one place, [`Settings`](../tasks/settings.py). An empty variable is one that is not set.

| Variable | Default | Meaning |
|---|---|---|
"""

_BOUNDS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}


def render() -> str:
    """The whole page."""
    sections = list(_sections(PipelineConfig, "", "The run"))
    places: dict[type[BaseModel], list[tuple[str, str]]] = {}
    for section, path, description in sections:
        places.setdefault(section, []).append((path, description))
    return "\n".join(
        [HEAD, *(_table(section, found) for section, found in places.items()), _environment()]
    )


def _sections(
    section: type[BaseModel], path: str, description: str
) -> Iterator[tuple[type[BaseModel], str, str]]:
    """A section with its dotted path and description, then those inside it."""
    yield section, path, description
    for name, field in section.model_fields.items():
        inner = f"{path}.{name}".lstrip(".")
        if _is_section(field):
            assert isinstance(field.annotation, type)
            yield from _sections(field.annotation, inner, field.description or "")
        elif (item := _item(field)) is not None:
            yield item, f"{inner}[]", f"{field.description}; each item"


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _item(field: FieldInfo) -> type[BaseModel] | None:
    """What a list consists of, when each item has settings of its own."""
    if get_origin(field.annotation) is not tuple:
        return None
    item = get_args(field.annotation)[0]
    return item if isinstance(item, type) and issubclass(item, BaseModel) else None


def _table(section: type[BaseModel], places: list[tuple[str, str]]) -> str:
    title = ", ".join(f"`{path}`" for path, _ in places if path) or "Top level"
    intro = [f"`{path}`: {text}." if len(places) > 1 else f"{text}." for path, text in places]
    rows = [
        f"| `{name}` | {_type(field)} | {_default(field)} | {_cell(field.description or '')} |"
        for name, field in section.model_fields.items()
        if not _is_section(field)
    ]
    head = ["| Setting | Type | Default | Meaning |", "|---|---|---|---|"] if rows else []
    return "\n".join([f"## {title}", "", "  \n".join(intro), "", *head, *rows, ""])


def _type(field: FieldInfo) -> str:
    """The type with its bounds, or the values that are allowed."""
    values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    if callable(extra := field.json_schema_extra):  # the values of `algorithm`, from the table
        extra(schema := {})
        values = schema.get("enum", ())
    if values:
        return " or ".join(f"`{value}`" for value in values)
    if _item(field) is not None or get_origin(field.annotation) is list:
        return "list"
    name = {str: "text", int: "integer", float: "number", bool: "true or false"}.get(
        field.annotation or object, "mapping"
    )
    bounds = [
        f"{sign} {getattr(rule, attribute):g}"
        for rule in field.metadata
        for kind, (sign, attribute) in _BOUNDS.items()
        if isinstance(rule, kind)
    ]
    return ", ".join([name, *bounds])


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, str) and "\n" in value:
        return f"{value.count(chr(10)) + 1} lines: `rlhf config` prints them"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """A value as it stands in a YAML file."""
    if value == "":
        return '""'
    if isinstance(value, tuple):
        value = [item.model_dump() if isinstance(item, BaseModel) else item for item in value]
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _environment() -> str:
    rows = [
        f"| `{field.validation_alias}` | {_environment_default(field)} | "
        f"{_cell(field.description or '')} |"
        for field in Settings.model_fields.values()
    ]
    return ENVIRONMENT + "\n".join(rows) + "\n"


def _environment_default(field: FieldInfo) -> str:
    return f"`{field.default}`" if str(field.default) else "not set"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")

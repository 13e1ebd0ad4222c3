"""The tables and their fields, by the names that a config uses."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, TypeAlias

TableKind: TypeAlias = Literal["demonstrations", "preferences", "prompts"]

TABLE_KINDS: tuple[TableKind, ...] = ("demonstrations", "preferences", "prompts")

GOLD = "gold"  # the annotator of known answers; nobody in the preference store is called so

OF_A_VOTE = ("shown_first", "gold", "time")  # may also be fields of a vote's object in `votes`

DETAILS = (*OF_A_VOTE, "source")

OF_ANY_ROW = ("source", "licence")  # fields that any table may have

# The fields that a source may have, each of which can be mapped to another name.
FIELDS: Mapping[TableKind, tuple[str, ...]] = {
    "demonstrations": (
        *("id", "prompt", "system", "response", "messages"),
        *("parent", "role", "text", "rank", "tree"),
        *OF_ANY_ROW,
    ),
    "preferences": (
        *("id", "prompt", "system", "chosen", "rejected", "margin", "annotator"),
        *("response_a", "response_b", "votes", "vote", "preference", "score_a", "score_b"),
        *("answers", "answer", "response", "score", "rank", "parent", "role", "text", "tree"),
        *DETAILS,
        "licence",
    ),
    "prompts": ("id", "prompt", "system", *OF_ANY_ROW),
}

_NAME = r"\w[\w .\-/]*"

PLACE = re.compile(rf"\{{\{{({_NAME})\}}\}}|\{{({_NAME})\}}")  # {{name}} or {name}


def is_template(place: str) -> bool:
    """Whether a place is a template: a text with a name in braces."""
    return bool(names_in(place))


@lru_cache
def names_in(template: str) -> tuple[str, ...]:
    """The columns and paths that a template names, in order; `{{name}}` names none."""
    return tuple(dict.fromkeys(match[2] for match in PLACE.finditer(template) if match[2]))


def word(value: Any) -> str:
    """A value as votes are compared by: small letters, whole numbers without a decimal point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().lower() if isinstance(value, str | int | float) else ""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text)

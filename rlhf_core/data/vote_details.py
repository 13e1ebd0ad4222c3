"""What a vote says: for which side it is, and the optional details of how it was cast.

The details are the side shown first, gold, the time and the source. Their names are common ones:
other people's files have a column `gold` with the right answer, or a `time` in seconds. So a column
with such a name is read only if all of its values look like ours; otherwise it is skipped, with a
note in the report. A column that the user has mapped is always read, and a wrong value in it is a
bad row.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, TypeAlias

from rlhf_core.data.prepared import writable
from rlhf_core.settings.fields import word

# Characters in the name of a source; longer values are articles or the like.
LONGEST_NAME = 200


class UnlikeError(Exception):
    """A value that a field cannot have; the message is the reason."""

    def __init__(self, category: str, reason: str) -> None:
        super().__init__(reason)
        self.category = category


BOTH_BAD = frozenset(("tie (bothbad)", "tie (both bad)", "both_bad", "bothbad"))
_WORDS: Mapping[str, str] = {
    **{"a": "a", "model_a": "a", "response_a": "a", "answer_a": "a", "assistant_a": "a"},
    **{"b": "b", "model_b": "b", "response_b": "b", "answer_b": "b", "assistant_b": "b"},
    **dict.fromkeys(("tie", *BOTH_BAD), "tie"),
}


@dataclass(frozen=True)
class Sides:
    """What the values of a source's votes mean.

    A value means what `values` says; else the column that it is the name of, so that `left` is the
    answer in the column `left`; else what it says by itself.
    """

    values: Mapping[str, str]  # as the settings say, by `word`
    columns: Mapping[str, str]  # names of the two columns, by `word` -> "a" or "b"
    words: Mapping[str, str] = field(default_factory=dict)  # beside those that are known

    @classmethod
    def of(
        cls, values: Mapping[str, str], a: str, b: str, words: Mapping[str, str] | None = None
    ) -> "Sides":
        """The sides of a source whose answers stand in the columns or dotted paths `a` and `b`."""
        names = ((name, side) for place, side in ((a, "a"), (b, "b")) for name in _ends(place))
        found: dict[str, str] = {}
        for name, side in names:
            found[name] = "" if found.get(name, side) != side else side  # "" if both have it
        return cls(values, {name: side for name, side in found.items() if side}, words or {})

    def named(self, value: Any) -> str:
        """The side that the settings or the columns call so; "" if none does."""
        name = word(value)
        if name in ("yes", "no") and name not in self.values:
            name = {"yes": "true", "no": "false"}[name]  # as YAML reads them
        return self.values.get(name) or self.columns.get(name, "")

    def vote(self, value: Any) -> str:
        """ "a", "b" or "tie"; "" if the value is no vote."""
        name = word(value)
        return self.named(value) or self.words.get(name, "") or _WORDS.get(name, "")


def _ends(place: str) -> tuple[str, str]:
    return word(place), word(place.rsplit(".", 1)[-1])


def shown_first(value: Any) -> str:
    """The side that was shown first, "a" or "b"; empty when absent."""
    if _missing(value):
        return ""
    side = value.strip().lower() if isinstance(value, str) else ""
    if side not in ("a", "b"):
        raise UnlikeError("unknown side", f"{quote(value)} is not a side; a side is 'a' or 'b'")
    return side


def gold(value: Any) -> bool:
    """A boolean, or its name as in CSV files; False when absent."""
    if _missing(value):
        return False
    if isinstance(value, bool):
        return value
    name = value.strip().lower() if isinstance(value, str) else ""
    if name not in ("true", "false"):
        raise UnlikeError("bad gold", f"{quote(value)} is neither true nor false")
    return name == "true"


def time(value: Any) -> str:
    """A time as it is, text or a number; dates of Parquet files as ISO 8601."""
    if _missing(value):
        return ""
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UnlikeError("wrong type", "is neither text nor a number")
    return _writable(str(value))


def source(value: Any) -> str:
    """The name of a source: text or a whole number; empty when absent."""
    if _missing(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UnlikeError("wrong type", "is neither text nor a whole number")
    return _writable(str(value))


def _missing(value: Any) -> bool:
    """None, an empty cell, or NaN, which pandas uses for missing values."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def quote(value: Any) -> str:
    """A value as it is shown in an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _writable(text: str) -> str:
    if not writable(text):
        raise UnlikeError("broken text", "has half of a surrogate pair")
    return text


def _moment(value: Any) -> str:
    text = time(value)
    if isinstance(value, date) or not text:
        return text
    try:
        # A number might be the seconds that the annotator took.
        datetime.fromisoformat(text if isinstance(value, str) else "")
    except ValueError as error:
        reason = f"{quote(value)} is not a date and time such as 2026-03-01T12:30"
        raise UnlikeError("bad time", reason) from error
    return text


def name(value: Any) -> str:
    """A name, as of a source or a licence: a line of text or a whole number; empty when absent.

    Raises: UnlikeError for anything else.
    """
    name = source(value)
    if len(name) > LONGEST_NAME or "\n" in name:
        raise UnlikeError("bad source", f"{quote(value)} is not a name")
    return name


Reader: TypeAlias = Callable[[Any], str | bool]
READERS: Mapping[str, Reader] = {
    "shown_first": shown_first,
    "gold": gold,
    "time": time,
    "source": source,
}
# Every value of a column must pass these for the column to be read by its name.
_LOOKS_LIKE: Mapping[str, Reader] = {**READERS, "time": _moment, "source": name}


def first_unlike(field: str, values: Iterable[tuple[int, Any]]) -> tuple[int, str] | None:
    """The number of the first row whose value does not look like ours, and the reason."""
    for number, value in values:
        try:
            _LOOKS_LIKE[field](value)
        except UnlikeError as error:
            return number, str(error)
    return None

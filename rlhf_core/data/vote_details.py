"""Optional details of how a vote was cast: the side shown first, gold, the time, the source.

Their names are common ones: other people's files have a column `gold` with the right answer, or a
`time` in seconds. So a column with such a name is read only if all of its values look like ours;
otherwise it is skipped, with a note in the report. A column that the user has mapped is always
read, and a wrong value in it is a bad row.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime
from typing import Any, TypeAlias

from rlhf_core.data.prepared import writable

OF_A_VOTE = ("shown_first", "gold", "time")  # may also be fields of a vote's object in `votes`
DETAILS = (*OF_A_VOTE, "source")
# Characters in the name of a source; longer values are articles or the like.
LONGEST_NAME = 200


class UnlikeError(Exception):
    """A value that a field cannot have; the message is the reason."""

    def __init__(self, category: str, reason: str) -> None:
        super().__init__(reason)
        self.category = category


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


def _name(value: Any) -> str:
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
_LOOKS_LIKE: Mapping[str, Reader] = {**READERS, "time": _moment, "source": _name}


def first_unlike(field: str, values: Iterable[tuple[int, Any]]) -> tuple[int, str] | None:
    """The number of the first row whose value does not look like ours, and the reason."""
    for number, value in values:
        try:
            _LOOKS_LIKE[field](value)
        except UnlikeError as error:
            return number, str(error)
    return None

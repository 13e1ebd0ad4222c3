"""Where a field of ours stands in a row: a column, a dotted path, or a template of several.

    question                      the column of that name, also one whose name has dots
    fields.instruction            the key `instruction` of the object in the column `fields`
    summaries.0.text              the key `text` of the first object in a list
    "{instruction}\\n{input}"      a text made of columns and paths; see `fill`

This module knows names and places, not what a value means.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rlhf_core.data.sources import Row, SourceRows
from rlhf_core.settings.fields import PLACE, names_in

_LISTED = 12  # columns that a message names at most
_LONGEST = 60  # characters of a name in a message

Look = Callable[[str], str]


def find(row: Row, place: str) -> Any:
    """The value at a column or dotted path; None if the row has none."""
    if place in row or "." not in place:
        return row.get(place)
    value: Any = row
    for step in place.split("."):
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def has(row: Row, place: str) -> bool:
    """Whether a row has a column, or something at a dotted path."""
    return place in row or ("." in place and find(row, place) is not None)


def fill(template: str, look: Look) -> str:
    """A template with its names replaced by texts; `{{name}}` becomes `{name}`.

    Where all names of a line or of a paragraph are empty, it is left out, so that
    "{instruction}\\n{input}" is the instruction alone in a row without input.
    """
    texts = {name: look(name) for name in names_in(template)}
    if not all(texts.values()):
        kept = [part for part in template.split("\n\n") if _has_text(part, texts)]
        lines = [[line for line in part.split("\n") if _has_text(line, texts)] for part in kept]
        template = "\n\n".join("\n".join(part) for part in lines)

    return PLACE.sub(lambda m: texts[m[2]] if m[2] else f"{{{m[1]}}}", template)


def _has_text(part: str, texts: Mapping[str, str]) -> bool:
    names = names_in(part)
    return not names or any(texts[name] for name in names)


def is_missing(value: Any) -> bool:
    """None, or NaN, which pandas writes for missing values."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_filled(value: Any) -> bool:
    """Whether a value says anything: not missing, and not an empty text, list or object."""
    if isinstance(value, str):
        return not (not value or value.isspace())
    return not is_missing(value) and value not in ([], {}, ())


def shown(name: str) -> str:
    """A name of a file as a message shows it: short, and without control characters."""
    text = repr(name)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 2]}…'"


def listed(names: Sequence[str], remarks: Sequence[str] = ()) -> str:
    """Names for a message, the first dozen of them, each with its remark."""
    said = zip_longest(names[:_LISTED], remarks[:_LISTED], fillvalue="")
    texts = [shown(name)[1:-1] + remark for name, remark in said]
    more = len(names) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more > 0 else "")


def unread_texts(
    source: SourceRows, read: Iterable[str], ignored: Iterable[str] = ()
) -> dict[str, int]:
    """The columns that hold text and are not read, each with how many rows are filled.

    An object of which some keys are read counts by its keys, as dotted paths. Numbers written as
    text, as in CSV files, count as numbers.
    """
    places, left_out = set(read), set(ignored)
    prefixes = {
        ".".join(steps[:n])
        for p in places
        for steps in [p.split(".")]
        for n in range(1, len(steps))
    }
    filled, texts = Counter[str](), set[str]()
    for _, row in source.rows:
        for place, value in _leaves(row, "", prefixes):
            if place in places or place in left_out or not is_filled(value):
                continue
            filled[place] += 1
            if place not in texts and _holds_text(value):
                texts.add(place)
    return {place: filled[place] for place in filled if place in texts}


def _leaves(row: Row, start: str, prefixes: set[str]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        place = f"{start}{name}"
        if place not in prefixes:
            yield place, value
        elif isinstance(value, dict):
            yield from _leaves(value, f"{place}.", prefixes)


def _holds_text(value: Any) -> bool:
    if isinstance(value, str):
        return not _is_number(value)
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and any(_holds_text(entry) for entry in value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.strip().lower() in ("true", "false")
    return True


def passed_over(rows: Iterable[Row], places: Iterable[str]) -> dict[str, int]:
    """The lists of which mapped paths read single entries, each with how many rows have more."""
    used: dict[str, set[int]] = {}
    for place in places:
        steps = place.split(".")
        for n, step in enumerate(steps):
            if n and step.isdecimal():
                used.setdefault(".".join(steps[:n]), set()).add(int(step))
    counts = Counter[str]()
    for row in rows if used else ():
        for place, entries in used.items():
            found = find(row, place)
            counts[place] += isinstance(found, list) and len(found) > len(entries)
    return dict(+counts)

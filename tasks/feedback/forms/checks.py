"""What a value has to be like to go into the store: of its type, not too long, nobody's name."""

import hashlib
import hmac
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from rlhf_core.data.forms.fields import is_filled
from rlhf_core.data.forms.messages import checked, parsed
from rlhf_core.data.forms.rows import BadRowError
from rlhf_core.data.vote_details import UnlikeError, quote
from rlhf_core.settings.fields import GOLD
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import Annotator, Judgment, Project, Prompt, Response

_MAIL = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+")


def _length(column: Any) -> int:
    return int(column.type.length or 0)  # 0 = any length


# Postgres refuses what is longer; SQLite would keep it.
MOST: Mapping[str, int] = {
    "annotator": _length(Annotator.pseudonym),
    "model": _length(Response.model),
    "source": min(_length(Judgment.source), _length(Prompt.source)),
    "licence": _length(Prompt.licence),
    "time": _length(Judgment.time),
}


def text(value: Any, field: str, most: int = 0) -> str:
    """A text as it is, or a number as text; empty when absent.

    Raises: BadRowError.
    """
    if not is_filled(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRowError(field, "wrong type", f"is {quote(value)}, not text")
    found = str(value)
    if "\0" in found:
        raise BadRowError(field, "broken text", "has a null character, which cannot be kept")
    try:
        checked(found)
    except UnlikeError as error:
        raise BadRowError(field, error.category, str(error)) from error
    if most and len(found) > most:
        raise BadRowError(
            field, "too long", f"has {len(found):,} characters; at most {most} are kept"
        )
    return found


def plain(value: Any, field: str) -> None:
    """Refuse a null character anywhere in a text or in messages. Raises: BadRowError."""
    texts = [value] if isinstance(value, str) else [part["content"] for part in value]
    if any("\0" in part for part in texts):
        raise BadRowError(field, "broken text", "has a null character, which cannot be kept")


def seconds(value: Any, field: str) -> float | None:
    """A number of seconds; None when absent. Raises: BadRowError."""
    if not is_filled(value):
        return None
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not (math.isfinite(found) and found >= 0):
        raise BadRowError(field, "bad seconds", f"is {quote(value)}, not a number of seconds")
    return found


def mapping(value: Any, field: str) -> dict[str, Any]:
    """An object, also as JSON; empty when absent. Raises: BadRowError."""
    if not is_filled(value):
        return {}
    found = parsed(value) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise BadRowError(field, "wrong type", f"is {quote(value)}, not an object")
    try:
        text(json.dumps(found, allow_nan=False, ensure_ascii=False), field)
        null = "\\u0000" in json.dumps(found)
    except (TypeError, ValueError) as error:
        raise BadRowError(field, "wrong type", f"cannot be written as JSON ({error})") from error
    if null:
        raise BadRowError(field, "broken text", "has a null character, which cannot be kept")
    return {str(key): part for key, part in found.items()}


def kept(value: Any, field: str) -> dict[str, str]:
    """Columns to keep, as text. Raises: BadRowError."""
    return {
        name: part if isinstance(part, str) else "" if part is None else json.dumps(part)
        for name, part in mapping(value, field).items()
    }


class Pseudonyms:
    """Who voted, under a name that is nobody's.

    A pseudonym of the file is kept as it is. An e-mail address is none, and is refused, unless all
    names are to be replaced by ones that are made from them with a secret of the project: the same
    name is the same annotator in each file, and nobody can tell who it is without the database.
    """

    def __init__(self, hashed: bool) -> None:
        self._hashed = hashed
        self._secret = b""

    def use(self, project: FeedbackProject) -> None:
        """Take the secret of a project, without which no name is replaced."""
        with project.database.reading() as session:
            row = session.get_one(Project, project.id)
            self._secret = f"{row.id} {row.created_at.isoformat()}".encode()

    def name(self, value: str, field: str) -> str:
        """The pseudonym of a name. Raises: BadRowError."""
        found = text(value, field, MOST["annotator"]).strip()
        if not found:
            return ""
        if found == GOLD and not self._hashed:
            raise BadRowError(
                field,
                "the name of known answers",
                f"is '{GOLD}', which is how known answers are called, but the row is not marked as "
                "one with gold: true; rename the person, or replace all names with `--who hashed`",
            )
        if self._hashed:
            digest = hmac.new(self._secret, found.encode(), hashlib.sha256).hexdigest()
            return f"h-{digest[:12]}"
        if _MAIL.search(found):
            raise BadRowError(
                field,
                "a person's name",
                "is an e-mail address, and the store keeps pseudonyms only; `--who hashed` "
                "replaces all names by pseudonyms",
            )
        return found


def right_answer(annotator: str, marked: bool, said: str, field: str) -> str:
    """What a row says is right, if it is a known answer and nobody's vote; else "".

    Args:
        annotator: as the row has it.
        marked: whether the row says that the right answer is known.
        said: what the row votes for.
        field: that has the vote.

    Raises: BadRowError for what is no answer.
    """
    if annotator.strip() != GOLD or not marked:
        return ""
    if said not in ("a", "b", "tie"):
        raise BadRowError(
            field, "unknown vote", f"is {quote(said)}, which is no right answer; it is a, b or tie"
        )
    return said


def is_mail(value: str) -> bool:
    """Whether a text names a person by an e-mail address."""
    return bool(_MAIL.search(value))

"""Convert the rows of a user's source into the prepared columns of `rlhf_core.data.prepared`.

A source of preferences has one of these formats; the first that its fields allow is used:

    prompt, chosen, rejected           texts, or the messages of the answer or the whole dialogue
    chosen, rejected                   whole dialogues: messages, or the text format of HH-RLHF
    prompt, response_a, response_b     with `votes`: a list of "a", "b" or "tie", of
                                       [annotator, vote, ...] or of {"annotator", "vote",
                                       "shown_first", "time", "gold"}; or with one `vote` (or
                                       `preference`)

Each vote becomes a row. Chosen and rejected become response_a and response_b with the vote "a". A
source may also record how a vote was cast: `rlhf_core.data.vote_details`.

Demonstrations are `prompt`, `response`, or whole dialogues in `messages`; prompts are `prompt`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from rlhf_core.data.encoding import Message, Prompt
from rlhf_core.data.prepared import COLUMNS, TableKind, writable
from rlhf_core.data.sources import Fault, Row, SourceRows
from rlhf_core.data.vote_details import DETAILS, OF_A_VOTE, READERS, UnlikeError, first_unlike
from rlhf_core.errors import DataError

# The fields that a source may have, each of which can be mapped to another name.
FIELDS: Mapping[TableKind, tuple[str, ...]] = {
    "demonstrations": ("id", "prompt", "response", "messages"),
    "preferences": (
        *("id", "prompt", "chosen", "rejected", "margin", "annotator"),
        *("response_a", "response_b", "votes", "vote", "preference", *DETAILS),
    ),
    "prompts": ("id", "prompt"),
}


@dataclass(frozen=True)
class ParsedSource:
    """One source in the prepared columns, and the rows that were left out of it.

    A source row with several votes gives several examples; `ballot` distinguishes anonymous votes
    of the same row, so that they are not dropped as duplicates.
    """

    frame: pd.DataFrame  # COLUMNS of its kind, and `ballot`
    source: str
    rows: int
    faults: Sequence[Fault]
    skipped: Mapping[str, int]  # reason -> rows
    unread: Sequence[str] = ()  # notes on columns that have a name of ours but other content
    numbers: Sequence[int] = ()  # of the row in the source, for each example


def parse(source: SourceRows, kind: TableKind, names: Mapping[str, str]) -> ParsedSource:
    """Convert the rows of a source into the prepared columns.

    `names` maps our field names to those of the source.

    Raises: DataError when the source is empty or lacks a required field. Single bad rows are
    returned as `faults`.
    """
    if not source.rows and not source.unreadable:
        raise DataError(f"{source.source} has no rows; check that it is the right file")
    columns = source.columns()
    convert = _converter(source, columns, kind, names)
    details, unread = _details(source, kind, names, sided=convert is not _pair)
    with_prompt = names.get("prompt", "prompt") in columns
    path = Path(source.source)
    examples: list[Row] = []
    numbers: list[int] = []
    faults, skipped = list(source.unreadable), Counter[str]()
    for number, values in source.rows:
        row = _Row(values, names, with_prompt, details, path.name)
        try:
            common = {"id": row.label("id") or f"{path.stem}-{number}", "ballot": 0}
            examples += [{**common, **example} for example in convert(row)]
            numbers += [number] * (len(examples) - len(numbers))
        except _BadRowError as bad:
            where = (source.source, source.unit, number, bad.field)
            faults.append(Fault(*where, bad.category, bad.reason))
        except _SkippedRowError as skip:
            skipped[str(skip)] += 1
    frame = pd.DataFrame(examples, columns=[*COLUMNS[kind], "ballot"], dtype=object)
    faults.sort(key=lambda fault: fault.number)
    rows = len(source.rows) + len(source.unreadable)
    return ParsedSource(frame, source.source, rows, faults, skipped, unread, numbers)


_Converter: TypeAlias = Callable[["_Row"], list[Row]]
_BALLOTS = ("votes", "vote", "preference")
_NEEDED: Mapping[TableKind, str] = {
    "demonstrations": "'prompt' and 'response', or 'messages'",
    "preferences": "'chosen' and 'rejected' (with 'prompt', or as whole dialogues), or 'prompt', "
    "'response_a', 'response_b' and 'votes' (or 'vote')",
    "prompts": "'prompt'",
}


def _converter(
    source: SourceRows, columns: Sequence[str], kind: TableKind, names: Mapping[str, str]
) -> _Converter:
    if not columns:
        return lambda row: []  # no row could be read: the faults report it
    listed = ", ".join(columns)
    for field, name in names.items():
        in_votes = field in OF_A_VOTE and any(name in vote for _, vote in _votes(source, names))
        if name not in columns and not in_votes:
            raise DataError(
                f"{source.source} has no field '{name}', which data.{kind}.fields maps to "
                f"'{field}'; its fields are: {listed}"
            )
    here = {field for field in FIELDS[kind] if names.get(field, field) in columns}
    converter = _choose(kind, here, names)
    if converter is None:
        raise DataError(
            f"{source.source} has no {kind}: they need {_NEEDED[kind]}, but its fields are: "
            f"{listed}; map the right ones in data.{kind}.fields"
        )
    return converter


def _details(
    source: SourceRows, kind: TableKind, names: Mapping[str, str], *, sided: bool
) -> tuple[frozenset[str], Sequence[str]]:
    """The vote details to read, and a note on each column with such a name but other content."""
    if kind != "preferences":
        return frozenset(), ()
    read, notes = set(names) & set(DETAILS), []
    if "shown_first" in names and not sided:
        raise DataError(
            f"data.{kind}.fields names '{names['shown_first']}' of {source.source} as the answer "
            "that was shown first, but chosen and rejected have no sides; use 'response_a', "
            "'response_b' and 'vote', or remove shown_first from the fields"
        )
    for field in DETAILS:
        if field in names or field in names.values():  # mapped, or mapped to another field
            continue
        values = [(number, row[field]) for number, row in source.rows if field in row]
        if field in OF_A_VOTE:
            values += [(n, vote[field]) for n, vote in _votes(source, names) if field in vote]
        if not values:
            continue
        if field == "shown_first" and not sided:
            notes.append(
                f"{source.source}: chosen and rejected have no sides, so the field 'shown_first' "
                "is not read"
            )
        elif odd := first_unlike(field, values):
            number, reason = odd
            notes.append(
                f"{source.source}, {source.unit} {number}, field '{field}': {reason}, so the field "
                f"is assumed to mean something else and is not read; if it is ours, map it in "
                f"data.{kind}.fields"
            )
        else:
            read.add(field)
    return frozenset(read), notes


def _votes(source: SourceRows, names: Mapping[str, str]) -> Iterator[tuple[int, Row]]:
    """The votes of a source that are objects, each with its row number."""
    listed = names.get("votes", "votes")
    for number, row in source.rows:
        votes = row.get(listed)
        for vote in votes if isinstance(votes, list) else ():
            if isinstance(vote, dict):
                yield number, vote


def _choose(kind: TableKind, here: set[str], names: Mapping[str, str]) -> _Converter | None:
    if kind == "prompts":
        return _prompt if "prompt" in here else None
    if kind == "demonstrations":
        if {"prompt", "response"} <= here:
            return partial(_demonstration, field="response")
        return partial(_demonstration, field="messages") if "messages" in here else None
    if {"chosen", "rejected"} <= here:
        return _pair
    # A field that the user mapped takes precedence over one that is merely present.
    ballots = [field for field in _BALLOTS if field in here]
    ballot = min(ballots, key=lambda field: field not in names, default=None)
    if ballot and {"response_a", "response_b"} <= here:
        return partial(_voted_pair, field=ballot)
    return None


def _prompt(row: "_Row") -> list[Row]:
    return [{"prompt": row.prompt()}]


def _demonstration(row: "_Row", field: str) -> list[Row]:
    prompt, response = row.exchange(field)
    return [{"prompt": prompt, "response": response}]


def _pair(row: "_Row") -> list[Row]:
    prompt, chosen, rejected = _sides(row, "chosen", "rejected")
    answers = {"prompt": prompt, "response_a": chosen, "response_b": rejected}
    known = {"margin": row.margin(), "source": row.source(), **row.cast({})}
    return [{**answers, "vote": "a", "annotator": row.label("annotator"), **known}]


def _voted_pair(row: "_Row", field: str) -> list[Row]:
    """One preference for each vote."""
    prompt, a, b = _sides(row, "response_a", "response_b")
    answers = {"prompt": prompt, "response_a": a, "response_b": b}
    known, anonymous = {"margin": row.margin(), "source": row.source()}, Counter[str]()
    preferences = []
    for annotator, vote, details in row.votes(field):
        anonymous[vote] += not annotator
        ballot = {"ballot": 0 if annotator else anonymous[vote]}
        cast = {"vote": vote, "annotator": annotator, **row.cast(details)}
        preferences.append({**answers, **known, **cast, **ballot})
    return preferences


def _sides(row: "_Row", first: str, second: str) -> tuple[Prompt, str, str]:
    prompt, one = row.exchange(first)
    same, other = row.exchange(second)
    if prompt != same:
        raise _SkippedRowError("dialogues diverge before the last answer")
    return prompt, one, other


class _SkippedRowError(Exception):
    """A valid row with nothing to learn from; the message is the reason."""


class _BadRowError(Exception):
    def __init__(self, field: str, category: str, reason: str) -> None:
        super().__init__(reason)
        self.field, self.category, self.reason = field, category, reason


_ROLES = ("system", "user", "assistant")
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TYPES: Mapping[type, str] = {
    **{bool: "a truth value", int: "a number", float: "a number"},
    **{str: "text", list: "a list", dict: "an object"},
}


@dataclass(frozen=True)
class _Row:
    """One row of a source, accessed by our field names; every value it returns is validated."""

    values: Row
    names: Mapping[str, str]
    with_prompt: bool  # the source has a field for the prompt
    details: frozenset[str]  # the details of a vote to read
    file: str  # the name of the source

    def label(self, field: str) -> str:
        """An id or annotator: text or a whole number; empty when absent."""
        value = self._get(field)
        if value is None or isinstance(value, str):
            return self._writable(value or "", field)
        if type(value) is int:
            return str(value)
        raise self._wrong_type(field, value, "text or a whole number")

    def source(self) -> str:
        """Where the row comes from: its own field, or else the name of the source."""
        return str(self._detail("source", {})) or self.file

    def cast(self, vote: Row) -> Row:
        """How a vote was cast: from `vote`, its object in `votes`, or else from the row."""
        return {field: self._detail(field, vote) for field in OF_A_VOTE}

    def margin(self) -> float:
        """The margin, 0 when absent."""
        value = self._get("margin")
        if value is None or value == "":
            return 0.0
        try:
            margin = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            margin = math.nan
        if not math.isfinite(margin):
            raise self._bad("margin", "bad margin", f"{value!r} is not a finite number")
        return margin

    def prompt(self) -> Prompt:
        """The prompt: text, or messages that end with a user's."""
        value = self._get("prompt")
        if not isinstance(value, list):
            return self._text(value, "prompt")
        return self._question(self._messages(value, "prompt"), "prompt")

    def exchange(self, field: str) -> tuple[Prompt, str]:
        """The prompt and the answer in `field`, which has the answer or the whole dialogue."""
        value = self._get(field)
        if isinstance(value, list):
            dialogue = self._messages(value, field)
        elif self.with_prompt:
            return self.prompt(), self._text(value, field)
        else:
            dialogue = self._turns(self._text(value, field), field)
        if dialogue[-1]["role"] != "assistant":
            raise self._bad(field, "bad messages", "does not end with an assistant message")
        return self._prompt_of(dialogue[:-1], field), dialogue[-1]["content"]

    def votes(self, field: str) -> list[tuple[str, str, Row]]:
        """Annotator (empty when anonymous), vote, and its object's other fields, for each vote."""
        value = self._required(self._get(field), field)
        if field != "votes":
            return [(self.label("annotator"), self._vote(value, field), {})]
        if not isinstance(value, list):
            raise self._wrong_type(field, value, "a list of votes")
        if not value:
            raise _SkippedRowError("no votes")
        return [self._ballot(entry, field) for entry in value]

    def _get(self, field: str) -> Any:
        return self.values.get(self.names.get(field, field))

    def _detail(self, field: str, vote: Row) -> str | bool:
        name = self.names.get(field, field)
        value = vote.get(name) if vote.get(name) is not None else self.values.get(name)
        try:
            return READERS[field](value if field in self.details else None)
        except UnlikeError as error:
            raise self._bad(field, error.category, str(error)) from error

    def _bad(self, field: str, category: str, reason: str) -> _BadRowError:
        return _BadRowError(self.names.get(field, field), category, reason)

    def _wrong_type(self, field: str, value: Any, wanted: str, where: str = "") -> _BadRowError:
        found = _TYPES.get(type(value), f"of type {type(value).__name__}")
        return self._bad(field, "wrong type", f"{where}is {found}, not {wanted}")

    def _required(self, value: Any, field: str, where: str = "") -> Any:
        if value is None:
            raise self._bad(field, "missing", f"{where}is missing")
        return value

    def _text(self, value: Any, field: str, where: str = "") -> str:
        if not isinstance(self._required(value, field, where), str):
            raise self._wrong_type(field, value, "text", where)
        if not value or value.isspace():
            raise self._bad(field, "empty text", f"{where}is empty")
        return self._writable(value, field, where)

    def _writable(self, text: str, field: str, where: str = "") -> str:
        if not writable(text):
            raise self._bad(field, "broken text", f"{where}has half of a surrogate pair")
        return text

    def _messages(self, value: Sequence[Any], field: str) -> list[Message]:
        if not value:
            raise self._bad(field, "empty text", "is an empty list of messages")
        return [self._message(entry, f"message {n} ", field) for n, entry in enumerate(value, 1)]

    def _message(self, entry: Any, where: str, field: str) -> Message:
        if not isinstance(entry, dict) or not {"role", "content"} <= entry.keys():
            reason = f"{where}is not an object with role and content"
            raise self._bad(field, "bad messages", reason)
        role = entry["role"]
        if role not in _ROLES:
            reason = f"{where}has the role {role!r}; it must be system, user or assistant"
            raise self._bad(field, "bad messages", reason)
        return {"role": role, "content": self._text(entry["content"], field, where)}

    def _turns(self, text: str, field: str) -> list[Message]:
        """The messages of a dialogue in the text format of HH-RLHF."""
        before, *turns = _TURN.split("\n\n" + text.lstrip())
        if before or not turns:
            reason = "is not a dialogue (messages, or turns that begin with 'Human:'/'Assistant:')"
            raise self._bad(field, "bad messages", f"{reason}, and the source has no prompt field")
        entries = [
            {"role": _SPEAKERS[speaker], "content": content.strip()}
            for speaker, content in zip(turns[::2], turns[1::2], strict=True)
        ]
        return self._messages(entries, field)

    def _prompt_of(self, context: list[Message], field: str) -> Prompt:
        """The dialogue before its answer, checked against the prompt field if there is one."""
        if not self.with_prompt:
            return self._question(context, field)
        prompt = self.prompt()
        if not context or context == prompt:
            return prompt
        contents = [message["content"].strip() for message in context]
        if isinstance(prompt, list) or prompt.strip() not in contents:
            raise self._bad(field, "bad messages", "is a dialogue that does not contain the prompt")
        return self._question(context, field)

    def _question(self, context: list[Message], field: str) -> list[Message]:
        if not context or context[-1]["role"] != "user":
            raise self._bad(field, "bad messages", "does not end with a user message to answer")
        return context

    def _ballot(self, entry: Any, field: str) -> tuple[str, str, Row]:
        details: Row = {}
        if isinstance(entry, dict):
            annotator, vote, details = entry.get("annotator"), entry.get("vote"), entry
        elif isinstance(entry, list) and len(entry) > 1:
            annotator, vote = entry[0], entry[1]
        else:
            annotator, vote = None, entry
        name = self._writable("" if annotator is None else str(annotator), field)
        return name, self._vote(vote, field), details

    def _vote(self, value: Any, field: str) -> str:
        vote = value.strip().lower() if isinstance(value, str) else ""
        if vote not in ("a", "b", "tie"):
            reason = f"{value!r} is not a vote; a vote is 'a', 'b' or 'tie'"
            raise self._bad(field, "unknown vote", reason)
        return vote

"""One row of a source, asked by our names for its fields; every value that it returns is valid."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from rlhf_core.data.encoding import Message, Prompt
from rlhf_core.data.forms import messages
from rlhf_core.data.forms.fields import fill, find, has, is_filled, is_missing
from rlhf_core.data.origins.columns import OddNameError, OriginColumns
from rlhf_core.data.origins.counts import Origin
from rlhf_core.data.sources import Row
from rlhf_core.data.vote_details import READERS, Sides, UnlikeError, quote
from rlhf_core.settings.fields import OF_A_VOTE, TableKind, is_template, names_in

# Where a prompt may end: after a sentence or a colon before white space, or after a line.
_SAFE = re.compile(r"[.!?:][\"')\]]*(?=\s)|[。！？]|\n+")


class BadRowError(Exception):
    """A row that cannot be used: its field, a category to count it by, and the reason."""

    def __init__(self, field: str, category: str, reason: str) -> None:
        super().__init__(reason)
        self.field, self.category, self.reason = field, category, reason


class SkippedRowError(Exception):
    """A valid row with nothing to learn from; the message is the reason."""


@dataclass(frozen=True)
class Reading:
    """What the settings say about a table beside the names of its fields."""

    votes: Mapping[str, str] = field(default_factory=dict)  # value, as `word` has it -> our vote
    ignore: Set[str] = frozenset()  # columns and keys of messages to leave out
    score_margin: float = 0.0  # margin for each point between two scores, in raw reward
    template: str = "{prompt}"  # of a text prompt
    style: Literal["text", "chat"] = "text"
    keep: Sequence[str] = ()  # columns and dotted paths to keep beside a vote or a prompt
    # what more a vote may be called, by `word`; unlike `votes`, data may have none of them
    words: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""  # of rows that name none


class VoteOfRow(NamedTuple):
    """A vote of a row."""

    annotator: str  # empty when anonymous
    vote: str
    details: Row  # the other fields of its object in `votes`
    said: Any  # the vote as the row has it
    entry: Any  # of the list `votes`; None where a row has one vote


class AnswerOfRow(NamedTuple):
    """An answer of a list, and how good it is: more is better."""

    text: str
    level: float
    entry: Any  # of the list `answers`


@dataclass(frozen=True)
class SourceRow:
    """A row and how to read it."""

    values: Row
    place: str  # name of the source and number, which stand for a missing id
    kind: TableKind
    names: Mapping[str, str]  # ours -> the source's
    reading: Reading
    sides: Sides
    with_prompt: bool  # the source has a field for the prompt
    with_system: bool  # the source has a field for the system message
    signed: bool  # the sign of a margin says which side it favours
    details: frozenset[str]  # the details of a vote to read
    file: str  # the name of the source
    seen: Counter[str]  # counts prompts, and text prompts
    origins: OriginColumns

    # --- prompts and answers

    def prompt(self) -> Prompt:
        """The prompt: text, or messages that end with a user's."""
        with self._blame("prompt"):
            value = messages.unpacked(self.get("prompt"))
            if isinstance(value, list):
                return messages.question(messages.messages(value, self.reading.ignore))
            text = messages.text(value)
            if messages.is_open_dialogue(text):
                return messages.question(messages.turns(text, "prompt"))
            return text

    def worded(self, prompt: Prompt) -> Prompt:
        """The prompt as the model gets it: in the words of the template, in the style that is set,
        and with the system message of the row. Messages get only the latter."""
        system = self._system()
        self.seen["prompts"] += 1
        if not isinstance(prompt, str):
            return self._after_system(system, prompt)
        self.seen["text prompts"] += 1
        template = self.reading.template
        if "system" in names_in(template):
            text, system = self._filled(template, prompt, system), ""
        else:
            text = self._filled(template, prompt, "")
        if self.reading.style == "chat":
            return self._after_system(system, [{"role": "user", "content": text}])
        return f"{system}\n\n{text}" if system else text

    def exchange(self, field: str) -> tuple[Prompt, str]:
        """The prompt and the answer in `field`, which has the answer or the whole dialogue."""
        with self._blame(field):
            value = messages.unpacked(self.get(field))
            if isinstance(value, list):
                dialogue = messages.messages(value, self.reading.ignore)
            elif self.with_prompt and not str(value).startswith("\n\nHuman:"):
                answer = messages.text(value)
                return self.prompt(), answer
            else:
                dialogue = messages.turns(messages.text(value))
            if dialogue[-1]["role"] != "assistant":
                raise UnlikeError("bad messages", "does not end with an assistant message")
            return self._prompt_of(dialogue[:-1]), dialogue[-1]["content"]

    def halves(self, first: str, second: str) -> tuple[Prompt, str, str]:
        """The prompt that two texts share, up to the last safe place of it, and both answers."""
        with self._blame(first):
            one = messages.text(self.get(first))
        with self._blame(second):
            other = messages.text(self.get(second))
        shared = next(
            (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
            min(len(one), len(other)),
        )
        ends = [match.end() for match in _SAFE.finditer(one, 0, shared)]
        with self._blame(first):
            if not ends:
                raise UnlikeError(
                    "no prompt",
                    f"and '{self.name(second)}' do not share a beginning that ends with a sentence "
                    f"or a line, so there is no telling where the prompt ends; map 'prompt' in "
                    f"data.{self.kind}.fields",
                )
            answer = messages.text(one[ends[-1] :], "the rest after the shared beginning ")
        with self._blame(second):
            return (
                messages.text(one[: ends[-1]]),
                answer,
                messages.text(other[ends[-1] :], "the rest after the shared beginning "),
            )

    def _prompt_of(self, context: list[Message]) -> Prompt:
        """The dialogue before its answer, checked against the prompt field if there is one."""
        if not self.with_prompt:
            return messages.question(context)
        prompt = self.prompt()
        if not context or context == prompt:
            return prompt
        contents = [message["content"].strip() for message in context]
        if isinstance(prompt, list) or prompt.strip() not in contents:
            raise UnlikeError("bad messages", "is a dialogue that does not contain the prompt")
        return messages.question(context)

    def _system(self) -> str:
        value = self.get("system") if self.with_system else None
        if not is_filled(value):
            return ""
        with self._blame("system"):
            return messages.text(value)

    def _after_system(self, system: str, prompt: list[Message]) -> list[Message]:
        if not system or prompt[0] == {"role": "system", "content": system}:
            return prompt
        if prompt[0]["role"] == "system":
            reason = "is another system message than that of the dialogue"
            raise BadRowError(self.name("system"), "bad messages", reason)
        return [{"role": "system", "content": system}, *prompt]

    def _filled(self, template: str, prompt: str, system: str) -> str:
        own = {"prompt": prompt, "system": system}
        text = fill(template, lambda name: own[name] if name in own else self._said(name))
        if not is_filled(text):
            reason = "is empty in the words of data.prompt_template"
            raise BadRowError(self.name("prompt"), "empty text", reason)
        return text

    def _said(self, place: str, what: str = "text that a template can take") -> str:
        """What a column says; nothing if it is missing."""
        value = find(self.values, place)
        if not is_filled(value):
            return ""
        if isinstance(value, str | int | float):
            text = str(value)
        else:
            error = messages.wrong_type(value, what)
            raise BadRowError(place, error.category, str(error))
        try:
            return messages.checked(text)
        except UnlikeError as error:
            raise BadRowError(place, error.category, str(error)) from error

    # --- names and numbers

    def label(self, field: str) -> str:
        """An id or annotator: text or a whole number; empty when absent."""
        with self._blame(field):
            return _label(self.get(field))

    def identity(self) -> str:
        """The id, or else the name of the source with the number of the row."""
        return self.label("id") or self.place

    def source(self) -> str:
        """Where the row comes from: its own field, or else the name of the source."""
        return str(self._detail("source", {})) or self.file

    def origin(self) -> Origin:
        """Where the row comes from, and under which licence."""
        source = self.source() if self.kind == "preferences" else self.file
        try:
            return self.origins.of(self.values, source)
        except OddNameError as error:
            raise BadRowError(error.place, error.category, str(error)) from error

    def kept(self) -> dict[str, str]:
        """The columns to keep, as text; empty where the row has none."""
        beside = "a prompt" if self.kind == "prompts" else "a vote"
        return {
            place: self._said(place, f"a value to keep beside {beside}")
            for place in self.reading.keep
        }

    def number(self, field: str, value: Any, where: str = "") -> float:
        """A score or a rank; true is 1 and false is 0."""
        with self._blame(field):
            messages.required(value, where)
            names = {"true": 1.0, "false": 0.0}
            try:
                known = names.get(value.strip().lower()) if isinstance(value, str) else None
                found = float(value) if known is None else known
            except (TypeError, ValueError, OverflowError):
                found = math.nan
            if not math.isfinite(found):
                reason = f"{where}is {quote(value)}, which is neither a number nor true or false"
                raise UnlikeError("bad score", reason)
            return found

    def margin(self) -> float:
        """The margin as the row has it, 0 when absent."""
        value = self.get("margin")
        if is_missing(value) or (isinstance(value, str) and not value.strip()):
            return 0.0
        with self._blame("margin"):
            return read_margin(value)

    def margin_of_chosen(self) -> float:
        """By how much the chosen answer should win."""
        margin = self.margin()
        if margin < 0:
            self._refuse_margin(margin, "favours the rejected answer by its sign")
        return margin

    def margins(self, votes: Sequence[str]) -> list[float]:
        """By how much the winner of each vote should win, in raw reward.

        If any margin of the source is negative, their signs say which side they favour: the margin
        is that of the votes for this side, which have to be as many as the others at least.
        """
        margin, counts = self.margin(), Counter(votes)
        if not self.signed or margin == 0:
            return [margin] * len(votes)
        side, other = ("a", "b") if margin > 0 else ("b", "a")
        if counts[other] > counts[side]:
            favoured, winner = (self.name(f"response_{name}") for name in (side, other))
            self._refuse_margin(
                margin, f"favours '{favoured}' by its sign, but '{winner}' won the vote"
            )
        return [abs(margin) if vote == side else 0.0 for vote in votes]

    def _refuse_margin(self, margin: float, reason: str) -> None:
        raise BadRowError(self.name("margin"), "bad margin", f"{margin:g} {reason}")

    # --- votes

    def votes(self, field: str) -> list[VoteOfRow]:
        """The votes in `field`, a list of them or a single one."""
        with self._blame(field):
            value = messages.required(self.get(field))
            if field != "votes":
                return [VoteOfRow(self.label("annotator"), self._vote(value), {}, value, None)]
            if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
                value = messages.parsed(value) or value
            if not isinstance(value, list):
                raise messages.wrong_type(value, "a list of votes")
            if not value:
                raise SkippedRowError("no votes")
            return [self._ballot(entry) for entry in value]

    def cast(self, vote: Row) -> Row:
        """How a vote was cast: from `vote`, its object in `votes`, or else from the row."""
        return {field: self._detail(field, vote) for field in OF_A_VOTE}

    def answers(self, ranked: str) -> list[AnswerOfRow]:
        """The answers in `answers`, each with its `score`, or with its `rank` as a negative score,
        so that more is better."""
        with self._blame("answers"):
            entries = messages.required(self.get("answers"))
            if isinstance(entries, str):
                entries = messages.parsed(entries) or entries
            if not isinstance(entries, list):
                raise messages.wrong_type(entries, "a list of answers")
            beside = self.get(ranked)
            found = []
            for n, entry in enumerate(entries, 1):
                where = f"answer {n} "
                known = isinstance(entry, dict)
                text = messages.text(self._entry(entry, "answer") if known else entry, where)
                level = self._entry(entry, ranked) if known else None
                if isinstance(beside, list) and len(beside) == len(entries):
                    level = beside[n - 1]
                value = self.number("answers", level, f"the {ranked} of {where}")
                found.append(AnswerOfRow(text, -value if ranked == "rank" else value, entry))
            if len(found) < 2:
                raise SkippedRowError("fewer than two answers")
            return found

    def _entry(self, entry: Row, field: str) -> Any:
        """A field of an object in a list, by its mapped name, or else by ours."""
        place = self.name(field)
        return find(entry, place) if has(entry, place) else entry.get(field)

    def _ballot(self, entry: Any) -> VoteOfRow:
        details: Row = {}
        if isinstance(entry, dict):
            annotator, vote = self._entry(entry, "annotator"), self._entry(entry, "vote")
            details = entry
        elif isinstance(entry, list) and len(entry) > 1:
            annotator, vote = entry[0], entry[1]
        else:
            annotator, vote = None, entry
        return VoteOfRow(_label(annotator), self._vote(vote), details, vote, entry)

    def _vote(self, value: Any) -> str:
        vote = self.sides.vote(value)
        if not vote:
            raise UnlikeError(
                "unknown vote",
                f"{quote(value)} is not a vote; a vote is 'a', 'b' or 'tie', and data.{self.kind}."
                "votes says what other values mean, e.g. {a: 1, b: 0}",
            )
        return vote

    # --- reading

    def name(self, field: str) -> str:
        """The source's name for a field of ours."""
        return self.names.get(field, field)

    def get(self, field: str) -> Any:
        """The value of a field of ours, unchecked; None when absent."""
        place = self.name(field)
        if field in self.names and place not in self.values and is_template(place):
            return fill(place, self._said) or None
        return find(self.values, place)

    def _detail(self, field: str, vote: Row) -> str | bool:
        if field not in self.details:
            return READERS[field](None)
        name = self.name(field)
        value = find(vote, name)
        value = self.get(field) if value is None else value
        with self._blame(field):
            if field == "shown_first":
                value = self.sides.named(value) or value
            return READERS[field](value)

    @contextmanager
    def _blame(self, field: str) -> Iterator[None]:
        """What is wrong with a value is wrong with this field of the row."""
        try:
            yield
        except UnlikeError as error:
            raise BadRowError(self.name(field), error.category, str(error)) from error


def read_margin(value: Any) -> float:
    """A margin that is given. Raises: UnlikeError when it is not a finite number."""
    try:
        margin = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        raise UnlikeError("bad margin", f"{quote(value)} is not a finite number")
    return margin


def _label(value: Any) -> str:
    """Text or a whole number, also one that pandas has made a float: 17.0 and "17.0" are "17"."""
    if is_missing(value) or value in ("nan", "NaN"):
        return ""
    if isinstance(value, str):
        return messages.checked(re.sub(r"^(-?\d+)\.0$", r"\1", value))
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and value == int(value):
        return str(int(value))
    raise messages.wrong_type(value, "text or a whole number")

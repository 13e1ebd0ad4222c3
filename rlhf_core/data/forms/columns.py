"""Which optional columns of a source are read, and notes on those that are not.

Nothing that a source has is passed over in silence: a column that holds text and is not read, one
that has a name of ours but other content, entries of a list beyond those that are mapped.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rlhf_core.data.forms.fields import find, is_filled, listed, passed_over, shown, unread_texts
from rlhf_core.data.forms.messages import parsed, unpacked
from rlhf_core.data.forms.rows import Reading, SourceRow, read_margin
from rlhf_core.data.forms.table import Form, entries, in_source, is_present
from rlhf_core.data.origins.columns import OriginColumns
from rlhf_core.data.sources import Row, SourceRows
from rlhf_core.data.vote_details import Sides, UnlikeError, first_unlike
from rlhf_core.settings.fields import DETAILS, OF_A_VOTE, TableKind, names_in

_TEXTS = {"prompt", "response", "chosen", "rejected", "response_a", "response_b", "messages"}
_SAMPLE = 20  # values of a column that are looked at for how it is written


class Columns:
    """The columns of a source in its form; `notes` collects what its user should know."""

    def __init__(
        self,
        source: SourceRows,
        kind: TableKind,
        names: Mapping[str, str],
        form: Form,
        reading: Reading,
    ) -> None:
        self.source, self.kind, self.names, self.form = source, kind, names, form
        self.notes: list[str] = []
        self.lacks: frozenset[str] = frozenset()  # names in the template that it has no column for
        sides = self._name("response_a"), self._name("response_b")
        self.sides = Sides.of(reading.votes, *sides, reading.words)
        self.details: frozenset[str] = frozenset()
        if kind == "preferences":
            self.details = self._details()
        self.reading = self._with_own_template(reading)
        self.system = self._reads_system()
        self.prompt = is_present(source, names, "prompt")
        self.signed = any(_negative(find(row, self._name("margin"))) for _, row in source.rows)
        if form.implicit:
            self.notes.append(
                f"{source.source}: there is no field for the prompt, so the beginning that chosen "
                "and rejected share, up to its last end of a sentence or line, is taken as the "
                f"prompt; if that is wrong, map 'prompt' in data.{kind}.fields"
            )
        self.origins = OriginColumns(source, kind, names, find, reading.licence)
        self.notes += self.origins.notes
        self.notes += [*self._brackets(), *self._unread()]
        self.seen = Counter[str]()

    def rows(self, path: Path) -> Iterator[tuple[int, SourceRow]]:
        """The rows of the source, which is at `path`, with their numbers."""
        make = partial(
            SourceRow,
            kind=self.kind,
            names=self.names,
            reading=self.reading,
            sides=self.sides,
            with_prompt=self.prompt,
            with_system=self.system,
            signed=self.signed,
            details=self.details,
            file=path.name,
            seen=self.seen,
            origins=self.origins,
        )
        stem = path.stem
        return ((n, make(values, place=f"{stem}-{n}")) for n, values in self.source.rows)

    def note_unused_template(self) -> None:
        """After all rows: a note if the template was not needed, so that its columns are unread."""
        wanted = [name for name in names_in(self.reading.template) if name != "prompt"]
        if wanted and self.seen["prompts"] and not self.seen["text prompts"]:
            self.notes.append(
                f"{self.source.source}: its prompts are messages, to which data.prompt_template is "
                f"not applied, so {listed(wanted)} is not read"
            )

    def _name(self, field: str) -> str:
        return self.names.get(field, field)

    def _details(self) -> frozenset[str]:
        """The vote details to read; a note on each column with such a name but other content."""
        read, source = set(self.names) & set(DETAILS), self.source
        for field in DETAILS:
            if field in self.names or field in self.names.values():  # mapped, in one way or another
                continue
            if next(self._values(field), None) is None:
                continue
            if field == "shown_first" and not self.form.sided:
                self.notes.append(
                    f"{source.source}: chosen and rejected have no sides, so the field "
                    "'shown_first' is not read"
                )
            elif odd := first_unlike(field, self._values(field)):
                self._is_another(field, *odd)
            else:
                read.add(field)
        return frozenset(read)

    def _values(self, field: str) -> Iterator[tuple[int, Any]]:
        """What the rows, and the votes in them, have in the column of a detail."""
        found: Iterator[tuple[int, Any]] = iter(())
        if field in self.source.columns():
            found = ((n, row[field]) for n, row in self.source.rows if field in row)
        if field in OF_A_VOTE:
            cast = entries(self.source, self.names, "votes")
            found = chain(found, ((n, vote[field]) for n, vote in cast if field in vote))
        if field == "shown_first":
            return ((n, self.sides.named(value) or value) for n, value in found)
        return found

    def _is_another(self, field: str, number: int, reason: str) -> None:
        self.notes.append(
            f"{self.source.source}, {self.source.unit} {number}, field '{field}': {reason}, so the "
            "field is assumed to mean something else and is not read; if it is ours, map it in "
            f"data.{self.kind}.fields"
        )

    def _with_own_template(self, reading: Reading) -> Reading:
        """The reading of a source that may lack what the template names."""
        wanted = [name for name in names_in(reading.template) if name != "prompt"]
        missing = [name for name in wanted if not self._can_say(name)]
        self.lacks = frozenset(missing)
        if not missing:
            return reading
        start = f"{self.source.source} does not have {listed(missing)}, which data.prompt_template"
        if len(missing) == len(wanted) and "prompt" not in names_in(reading.template):
            self.notes.append(f"{start} is made of, so its prompts are used as they are")
            return replace(reading, template="{prompt}")
        self.notes.append(f"{start} names, so its prompts are without it")
        return reading

    def _can_say(self, name: str) -> bool:
        if name == "system":
            return is_present(self.source, self.names, name)
        return in_source(self.source, name)

    def _reads_system(self) -> bool:
        """Whether to read the system message of a row; a note if nobody has asked for it."""
        if "system" in self.names:
            return True
        if "system" not in self.form.reads or "system" in self.names.values():
            return False
        if "system" not in self.source.columns():
            return False
        values, odd = 0, 0  # the number of the first row whose value is no text
        for number, row in self.source.rows:
            if is_filled(row.get("system")):
                values += 1
                odd = odd or (0 if isinstance(row["system"], str) else number)
        if odd:
            self._is_another("system", odd, "is not text")
        elif values and "system" not in names_in(self.reading.template):
            self.notes.append(
                f"{self.source.source}: the column 'system' ({self._filled(values)}) is put "
                "before the prompt as its system message; if it is something else, name it in "
                f"data.{self.kind}.ignore"
            )
        return bool(values) and not odd

    def _places(self) -> set[str]:
        """The columns and paths of the source that are read."""
        optional = set(DETAILS) - self.details | (set() if self.system else {"system"})
        places = [self._name(field) for field in (self.form.needs | self.form.reads) - optional]
        inside = [name for place in places for name in names_in(place)]
        own = self.origins.places.values()
        return {*places, *inside, *own, *names_in(self.reading.template)}

    def _unread(self) -> Iterator[str]:
        """Notes on the columns that hold text, and on entries of lists, that are not read."""
        source, read = self.source, self._places()
        # Those columns have a note of their own.
        alone = (*DETAILS, "system", "licence", "license")
        noted = {field for field in alone for n in self.notes if f"'{field}'" in n}
        unread = unread_texts(source, read, {*self.reading.ignore, *self.reading.keep, *noted})
        if unread:
            yield self._unread_note(unread)
        for numbered, what in ((lambda: source.rows, "rows"), (self._inside, "objects")):
            for place, count in passed_over((row for _, row in numbered()), read).items():
                total = sum(1 for _ in numbered())
                yield (
                    f"{source.source}: the list {shown(place)} has more entries than "
                    f"data.{self.kind}.fields reads in {count} of {total} {what}; the others "
                    "are not read"
                )

    def _inside(self) -> Iterator[tuple[int, Row]]:
        """The objects in lists of votes or answers."""
        lists = ("votes", "answers")
        return chain.from_iterable(entries(self.source, self.names, field) for field in lists)

    def _brackets(self) -> Iterator[str]:
        """Notes on columns whose texts are lists or objects that were written as text."""
        for place in sorted({self._name(field) for field in _TEXTS & self.form.needs}):
            values = (find(row, place) for _, row in self.source.rows)
            first = list(islice(filter(is_filled, values), _SAMPLE))
            if len(first) > 1 and all(_is_bracketed(value) for value in first):
                yield (
                    f"{self.source.source}: the column {shown(place)} holds lists or objects in "
                    "JSON or Python that are no messages, so they are read as text with their "
                    "brackets and quotes; if people did not write these, convert the column"
                )

    def _unread_note(self, unread: Mapping[str, int]) -> str:
        columns = listed(list(unread), [f" ({self._filled(count)})" for count in unread.values()])
        what = f"column {columns} holds" if len(unread) == 1 else f"columns {columns} hold"
        example = next(filter(self._is_text, unread), "")
        template = f' (such as "{{prompt}}\\n{{{shown(example)[1:-1]}}}")' if example else ""
        return (
            f"{self.source.source}: the {what} text that is not read; "
            f"data.prompt_template{template} puts it into the prompt, "
            f"data.{self.kind}.fields reads it as another field, and "
            f"data.{self.kind}.ignore leaves it out without this note"
        )

    def _is_text(self, place: str) -> bool:
        values = (find(row, place) for _, row in self.source.rows)
        return isinstance(next(filter(is_filled, values), None), str)

    def _filled(self, count: int) -> str:
        return f"{count} of {len(self.source.rows)} rows filled"


def without(source: SourceRows, ignored: Set[str]) -> SourceRows:
    """The source without some of its columns."""
    if not ignored:
        return source
    return source.mapped(lambda n, row: [(n, {k: v for k, v in row.items() if k not in ignored})])


def _is_bracketed(value: object) -> bool:
    try:
        return isinstance(unpacked(value), str) and parsed(str(value)) is not None
    except UnlikeError:  # a bad row
        return False


def _negative(margin: object) -> bool:
    try:
        return isinstance(margin, str | int | float) and read_margin(margin) < 0
    except UnlikeError:
        return False

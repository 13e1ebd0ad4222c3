"""Convert the rows of a user's source into the prepared columns of `rlhf_core.data.prepared`.

A source of preferences has one of these forms:

    prompt, chosen, rejected           texts, or the messages of the answer or the whole dialogue
    chosen, rejected                   whole dialogues: messages, or the text format of HH-RLHF; or
                                       texts that begin alike
    prompt, response_a, response_b     with `votes`: a list of "a", "b" or "tie", of
                                       [annotator, vote, ...] or of {"annotator", "vote",
                                       "shown_first", "time", "gold"}; or with one `vote` (or
                                       `preference`); or with `score_a` and `score_b`
    prompt, answers                    a list of {"answer", "rank"} or {"answer", "score"}
    prompt, response, score            one rated answer a row: answers to one prompt are compared
    id, parent, role, text, rank       one message of a tree a row: replies to one are compared
    tree                               a whole tree a row, with its replies inside

The first whose fields are there is used, but one whose fields are mapped goes before. Each vote
becomes a row. Chosen and rejected become response_a and response_b with the vote "a". A source may
also record how a vote was cast: `rlhf_core.data.vote_details`.

Demonstrations are `prompt`, `response`, or whole dialogues in `messages`, or the best replies of a
tree; prompts are `prompt`. A `system` message may stand beside any prompt.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from rlhf_core.data.forms.columns import Columns, without
from rlhf_core.data.forms.rows import BadRowError, Reading, SkippedRowError
from rlhf_core.data.forms.table import form_of
from rlhf_core.data.origins.counts import NOWHERE, ORIGIN, Origin
from rlhf_core.data.prepared import COLUMNS, KEPT
from rlhf_core.data.sources import Fault, Row, SourceRows
from rlhf_core.errors import DataError
from rlhf_core.settings.fields import TableKind


@dataclass(frozen=True)
class ParsedSource:
    """One source in the prepared columns, and the rows that were left out of it.

    A source row with several votes gives several examples; `ballot` distinguishes anonymous votes
    of the same row, so that they are not dropped as duplicates.
    """

    frame: pd.DataFrame  # COLUMNS of its kind, `ballot`, and KEPT if columns are kept
    source: str
    rows: int
    faults: Sequence[Fault]
    skipped: Mapping[str, int]  # reason -> rows
    lacks: frozenset[str] = frozenset()  # names in the template for which it has no column
    unread: Sequence[str] = ()  # notes on columns that are not read, or are read unasked
    numbers: Sequence[int] = ()  # of the row in the source, for each example
    origins: Sequence[Origin] = ()  # for each example; empty = nothing is known


class Parsing:
    """A source in a form of ours, and the examples that its rows become, one after the other.

    An example has the prepared columns, `ballot`, `origin`, `row` (the number of its row) and
    `values` (the row itself); one of two answers also `entry_a` and `entry_b`, what the row says of
    each of them, and one of a vote `said` and `entry`, the vote as the row has it.

    Raises: DataError when the source is empty or lacks a required field.
    """

    def __init__(
        self,
        source: SourceRows,
        kind: TableKind,
        names: Mapping[str, str],
        reading: Reading | None = None,
    ) -> None:
        self.reading = reading = reading or Reading()
        if not source.rows and not source.unreadable:
            raise DataError(f"{source.source} has no rows; check that it is the right file")
        self.kind, self.names = kind, names
        self.source = without(source, reading.ignore)
        self.form = form_of(self.source, kind, names, reading)
        self.columns = Columns(self.source, kind, names, self.form, reading)
        self.faults: list[Fault] = []
        self.skipped = Counter[str]()

    def examples(self) -> Iterator[Row]:
        """The examples; after the last one, `faults` and `skipped` say what was left out.

        They are made as the rows are read, except where an example needs several rows.
        """
        self.faults, self.skipped = list(self.source.unreadable), Counter[str]()
        found: Iterable[Row] = self._examples()
        if self.form.join:
            found, left_over = self.form.join(list(found))
            self.skipped.update(left_over)
        yield from found
        self.faults.sort(key=lambda fault: fault.number)

    def _examples(self) -> Iterator[Row]:
        source, keep = self.source, self.reading.keep
        for number, row in self.columns.rows(Path(source.source)):
            try:
                common = {"id": row.identity(), "ballot": 0, "row": number, "values": row.values}
                common[ORIGIN] = row.origin()
                if keep:
                    common[KEPT] = row.kept()
                found = self.form.convert(row)
            except BadRowError as bad:
                where = (source.source, source.unit, number, bad.field)
                self.faults.append(Fault(*where, bad.category, bad.reason))
            except SkippedRowError as skip:
                self.skipped[str(skip)] += 1
            else:
                yield from ({**common, **example} for example in found)


def parse(
    source: SourceRows, kind: TableKind, names: Mapping[str, str], reading: Reading | None = None
) -> ParsedSource:
    """Convert the rows of a source into the prepared columns.

    `names` maps our field names to columns, dotted paths or templates of the source.

    Raises: DataError when the source is empty or lacks a required field. Single bad rows are
    returned as `faults`.
    """
    parsing = Parsing(source, kind, names, reading)
    examples = list(parsing.examples())
    parsing.columns.note_unused_template()
    frame = pd.DataFrame(
        examples,
        columns=[*COLUMNS[kind], "ballot", *([KEPT] if parsing.reading.keep else [])],
        dtype=object,
    )
    rows = len(source.rows) + len(source.unreadable)
    numbers = [example.get("row", 0) for example in examples]
    notes = parsing.columns.lacks, parsing.columns.notes
    left_out = parsing.faults, parsing.skipped
    origins = [example.get(ORIGIN, NOWHERE) for example in examples]
    return ParsedSource(frame, source.source, rows, *left_out, *notes, numbers, origins)

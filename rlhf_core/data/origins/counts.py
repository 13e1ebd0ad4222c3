"""How many rows of the prepared tables come from whom, in a small file beside the tables.

`origins.json` says for each table how many rows of each side are by which annotator, from which
sources, under which licences and written by which models. It is not part of the digest of the data,
which is that of the tables alone. Tables without the file, of earlier versions, are counted by
reading them: they have annotators and the sources of votes, but no licences.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf_core.data.prepared import SPLITS, Split, falls_to_eval
from rlhf_core.data.prompts import prompt_key
from rlhf_core.errors import DataError
from rlhf_core.settings.fields import TableKind

FILE = "origins.json"
FORM = 1
# What a table says that was derived from the others.
CHOSEN_ANSWERS = "answers chosen in the preferences"
OTHER_PROMPTS = "prompts of the other tables"
DERIVED = frozenset((CHOSEN_ANSWERS, OTHER_PROMPTS))

Half: TypeAlias = Literal["", "first_half", "second_half"]
Names: TypeAlias = tuple[str, ...]


class Origin(NamedTuple):
    """Where a row comes from; of the prompt alone as well, which is used without the answers."""

    sources: Names = ()
    licences: Names = ()
    models: Names = ()  # that wrote the answers
    prompt_sources: Names = ()
    prompt_licences: Names = ()

    @classmethod
    def of(cls, sources: Names, licences: Names) -> "Origin":
        """That of a row of which prompt and answers come from the same place."""
        return cls(sources, licences, (), sources, licences)

    @property
    def of_prompt(self) -> "Origin":
        """That of the prompt."""
        return Origin.of(self.prompt_sources, self.prompt_licences)

    def beside(self, other: "Origin") -> "Origin":
        """That of a row that is made of two."""
        return Origin(*(tuple(dict.fromkeys((*a, *b))) for a, b in zip(self, other, strict=True)))


NOWHERE = Origin()
ORIGIN = "origin"  # a column of the tables while they are prepared


class VoteRow(NamedTuple):
    """What the counts need of a vote."""

    split: Split
    key: str  # of the prompt
    annotator: str
    won: str | None  # the text that won; None for a tie
    origin: Origin


class TextRow(NamedTuple):
    """What the counts need of a demonstration or a prompt."""

    split: Split
    key: str
    origin: Origin


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Count(_Facts):
    """Rows of a table that have everything in common that is counted."""

    table: TableKind
    split: Split
    half: Half = Field("", description="Of votes for training: that of `reward_model.votes`")
    annotator: str = Field("", description="Who voted; empty = anonymous, or no vote")
    sources: Names = ()
    licences: Names = ()
    models: Names = Field((), description="Which models wrote the answers")
    rows: int


class Table(_Facts):
    """A table as a whole."""

    source: str = Field(description="Where its rows come from, as the report of the data says")
    derived: bool = Field(False, description="It was made of the votes, which are counted instead")
    train: int
    eval: int


class Origins(_Facts):
    """Where the rows of all tables come from."""

    form: int = FORM
    licences_known: bool = Field(True, description="False for tables of earlier versions")
    tables: Mapping[TableKind, Table]
    counts: tuple[Count, ...]

    def write(self, directory: Path) -> None:
        """Write the file beside the tables."""
        (directory / FILE).write_text(self.model_dump_json() + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Origins":
        """The counts in a file.

        Raises: DataError when it cannot be read.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            first = str(error).splitlines()[0]
            raise DataError(f"{path.name} cannot be read ({first}); prepare the data again") from (
                error
            )


def in_order(counts: Iterable[Count]) -> tuple[Count, ...]:
    """The counts in an order that follows from what they say."""
    return tuple(sorted(counts, key=lambda count: tuple(vars(count).values())))


def half_of(key: str) -> Half:
    """The half of the votes that a prompt belongs to, as `select_votes` has it."""
    return "second_half" if falls_to_eval(f"half/{key}", 0, 0.5) else "first_half"


def count_votes(votes: Iterable[VoteRow]) -> Iterator[Count]:
    """The votes, by everything that is counted."""
    found: Counter[tuple[Split, Half, str, Origin]] = Counter()
    halves: dict[str, Half] = {}
    for split, key, annotator, _, origin in votes:
        half: Half = ""
        if split == "train":
            half = halves.get(key) or halves.setdefault(key, half_of(key))
        found[split, half, annotator, origin] += 1
    for (split, half, annotator, origin), rows in found.items():
        yield _count("preferences", split, annotator, origin, rows, half)


def count_texts(table: TableKind, texts: Iterable[TextRow]) -> Iterator[Count]:
    """Demonstrations or prompts, by everything that is counted."""
    for (split, origin), rows in Counter((text.split, text.origin) for text in texts).items():
        yield _count(table, split, "", origin, rows)


def count_chosen(votes: Iterable[VoteRow]) -> Iterator[Count]:
    """The demonstrations that were made of votes: of each annotator the different texts that won,
    though others may have chosen the same."""
    chosen = {
        (hash((vote.split, vote.key, vote.won)), (vote.split, vote.annotator, vote.origin))
        for vote in votes
        if vote.won is not None
    }
    return _by_annotator("demonstrations", (group for _, group in chosen))


def count_asked(votes: Iterable[VoteRow]) -> Iterator[Count]:
    """The prompts that were taken from votes: of each annotator the different ones."""
    asked = {
        (hash((vote.split, vote.key)), (vote.split, vote.annotator, vote.origin.of_prompt))
        for vote in votes
    }
    return _by_annotator("prompts", (group for _, group in asked))


def _by_annotator(table: TableKind, rows: Iterable[tuple[Split, str, Origin]]) -> Iterator[Count]:
    for (split, annotator, origin), number in Counter(rows).items():
        yield _count(table, split, annotator, origin, number)


def _count(
    table: TableKind, split: Split, annotator: str, origin: Origin, rows: int, half: Half = ""
) -> Count:
    return Count.model_construct(
        table=table,
        split=split,
        half=half,
        annotator=annotator,
        sources=origin.sources,
        licences=origin.licences,
        models=origin.models,
        rows=rows,
    )


# ---- tables of earlier versions ----


def count_tables(directory: Path) -> Origins:
    """The counts of prepared tables that have no file of them; `directory` has the preferences of
    both sides and `validation.json`.

    Raises: DataError when they cannot be read.
    """
    try:
        told = json.loads((directory / "validation.json").read_text(encoding="utf-8"))["tables"]
        tables = {
            kind: Table(
                source=found["source"],
                derived=found["source"] in DERIVED,
                train=found["train"],
                eval=found["eval"],
            )
            for kind, found in told.items()
        }
        votes = list(_old_votes(directory))
        counts = [*count_votes(votes)]
        for kind, count in (("demonstrations", count_chosen), ("prompts", count_asked)):
            if kind in tables and tables[kind].derived:
                counts += count(votes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"the prepared tables cannot be read ({error!r})") from error
    return Origins(licences_known=False, tables=tables, counts=in_order(counts))


def _old_votes(directory: Path) -> Iterator[VoteRow]:
    origins: dict[str, Origin] = {}
    keys: dict[str, str] = {}
    for split in SPLITS:
        path = directory / f"preferences.{split}.jsonl"
        with path.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                row = json.loads(line)
                source = row.get("source", "")
                origin = origins.setdefault(source, Origin.of((source,) if source else (), ()))
                prompt = row["prompt"]
                key = keys.get(prompt) if isinstance(prompt, str) else prompt_key(prompt)
                if key is None:
                    key = keys.setdefault(prompt, prompt_key(prompt))
                yield VoteRow(split, key, row.get("annotator", ""), _won(row), origin)


def _won(row: Mapping[str, object]) -> str | None:
    """The text that won; version 0.1.0 wrote `chosen` and `tie`."""
    if "chosen" in row:
        return None if row["tie"] else str(row["chosen"])
    if row["vote"] == "tie":
        return None
    return str(row["response_b" if row["vote"] == "b" else "response_a"])

"""What a user says about a file on its way in or out, and what comes of it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from rlhf_core.errors import ConfigError, plural
from rlhf_core.settings.fields import word
from tasks.feedback.store.records import Ballot, NewPair

OURS = ("a", "b", "tie", "both_bad", "skip")  # what the values of a vote may mean
Progress = Callable[[int, int], None]  # how many of how many rows are done


def unseen(done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class ImportOptions:
    """How a file is read. Names of fields are those of `data.preferences.fields`, and some more:
    model_a, model_b, seconds, note, reason, licence."""

    form: str = "auto"
    fields: Mapping[str, str] = field(default_factory=dict)  # ours -> the file's
    votes: Mapping[str, Sequence[str]] = field(default_factory=dict)  # ours -> values of the file
    keep: Sequence[str] = ()  # columns to keep beside each pair
    ignore: Sequence[str] = ()  # columns to leave out without a note
    source: str = ""  # of rows that name none; "" = the name of the file
    licence: str = ""  # of rows that name none
    gold: str = ""  # the column with the right answer
    who: Literal["as-is", "hashed"] = "as-is"  # pseudonyms as they are, or new ones
    prompt: str = ""  # of rows that have none
    ask: int = 0  # ask so many people about each pair, and take no votes
    score_margin: float = 0.0  # margin for each point between two scores (raw reward)
    on_bad_row: Literal["error", "drop"] = "error"
    split: str = "train"
    subset: str = ""
    limit: int = 0  # rows; 0 = all

    def values(self) -> dict[str, str]:
        """What each value of a vote means, by `word`.

        Raises: ConfigError for an unknown vote, and for a value that means two.
        """
        found: dict[str, str] = {}
        for ours, theirs in self.votes.items():
            if ours not in OURS:
                raise ConfigError(
                    f"'{ours}' is no vote; votes maps {', '.join(OURS)} to values of the file"
                )
            for value in theirs:
                if found.setdefault(word(value), ours) != ours:
                    raise ConfigError(
                        f"the value '{value}' of votes means both '{found[word(value)]}' and "
                        f"'{ours}'; remove one"
                    )
        return found


class Entry(NamedTuple):
    """A pair of a file and the votes on it."""

    row: int  # its number in the file
    pair: NewPair
    ballots: list[Ballot]
    known: int | None = None  # the number that the project has given it, if it came from here


@dataclass
class Imported:
    """What became of a file."""

    source: str
    form: str
    rows: int = 0
    pairs: int = 0  # of the file
    new_pairs: int = 0
    votes: int = 0  # of the file, skips included
    new_votes: int = 0
    skips: int = 0  # among the votes
    gold: int = 0  # rows with a right answer
    asked: int = 0  # pairs put into the queue
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> how many
    bad_rows: list[str] = field(default_factory=list)  # the first of them
    unread: dict[str, int] = field(default_factory=dict)  # column -> rows in which it is filled
    notes: list[str] = field(default_factory=list)

    @property
    def there_already(self) -> int:
        """Votes that the project had, or that stand in the file twice."""
        return self.votes - self.new_votes

    def lines(self) -> list[str]:
        """The result in sentences."""
        found = [f"{self.source}: read {plural(self.rows, 'row')} as {self.form}."]
        if self.asked:
            found.append(
                f"In the queue: {plural(self.asked, 'pair')} ({self.new_pairs:,} new); their votes "
                "were not read."
            )
        else:
            skips = f", {self.skips:,} of them skips" if self.skips else ""
            found.append(
                f"{plural(self.votes, 'vote')}{skips} on {plural(self.pairs, 'pair')}: "
                f"{self.new_votes:,} new, {self.there_already:,} there already or in the file "
                f"twice; {plural(self.new_pairs, 'new pair')}."
            )
        if self.gold:
            found.append(f"With the right answer of their pair: {plural(self.gold, 'row')}.")
        found += [f"Left out: {count:,} {reason}." for reason, count in self.left_out.items()]
        found += [f"  {row}" for row in self.bad_rows]
        if self.unread:
            columns = ", ".join(f"{name} ({count:,})" for name, count in self.unread.items())
            found.append(f"Columns that were not read, with their filled rows: {columns}.")
        return found + self.notes


@dataclass(frozen=True)
class ExportOptions:
    """What is written, and how."""

    form: str = "votes"
    snapshot: str = ""  # a digest, its beginning or `latest`; "" = what counts now
    without_annotators: bool = False  # numbers in place of pseudonyms
    only_open: bool = False  # of forms for labelling: only pairs that want votes
    also: Sequence[str] = ()  # of KEPT_BACK: votes that no training may see, written all the same
    force: bool = False  # overwrite


# Votes that no training may see, and so are not written unless somebody asks for them.
KEPT_BACK: Mapping[str, str] = {
    "hold-out": "measure what the order of the queue saves",
    "verdicts": "people gave as judges of an evaluation",
}
# What may be lost, one and many of it.
LOSSES: Mapping[str, tuple[str, str]] = {
    "tie": ("tie", "ties"),
    "both_bad": ("vote for neither", "votes for neither (both bad)"),
    "skip": ("skip", "skips"),
    "note": ("note", "notes"),
    "reason": ("reason of a skip", "reasons of skips"),
    "seconds": ("time that a vote took", "times that votes took"),
    "time": ("time of a vote", "times of votes"),
    "first": ("side that was shown first", "sides that were shown first"),
    "annotator": ("vote's annotator", "votes' annotators"),
    "margin": ("margin", "margins"),
    "gold": ("right answer", "right answers"),
    "model": ("answer's model", "answers' models"),
    "sampling": ("answer's sampling settings", "answers' sampling settings"),
    "licence": ("licence", "licences"),
    "source": ("source", "sources"),
    "kept": ("pair's kept columns", "pairs' kept columns"),
    "repeat": ("repeat", "repeats"),
    "vote": ("vote", "votes"),
    "single": ("single vote, which is part of a sum", "single votes, which are parts of sums"),
    "undecided": ("pair without a winner", "pairs without a winner"),
    "unvoted": ("pair without a vote", "pairs without a vote"),
    "earlier": (
        "earlier vote that was replaced or taken back",
        "earlier votes that were replaced or taken back",
    ),
    "unlike": (
        "text that would be read as something else",
        "texts that would be read as something else",
    ),
    "system": ("dialogue with a system message", "dialogues with a system message"),
    "dialogue": (
        "prompt that is a dialogue (it is one text there)",
        "prompts that are dialogues (they are one text there)",
    ),
}


@dataclass
class Exported:
    """What became of an export."""

    path: str
    form: str
    rows: int = 0
    lost: Counter[str] = field(default_factory=Counter)  # of LOSSES
    beside: list[str] = field(default_factory=list)  # other files that were written
    known: int = 0  # of the rows, known answers
    kept_back: Counter[str] = field(default_factory=Counter)  # of KEPT_BACK

    def lines(self) -> list[str]:
        """The result in sentences."""
        known = f", {self.known:,} of them known answers" if self.known else ""
        written = f"{self.path}: wrote {self.rows:,} rows as {self.form}{known}."
        found = [written, *(f"Beside it: {path}." for path in self.beside)]
        for name, count in self.kept_back.items():
            votes = "1 vote that" if count == 1 else f"{count:,} votes that"
            found.append(
                f"Left out: {votes} {KEPT_BACK[name]}, and no training may see; --with {name} "
                f"writes {'it' if count == 1 else 'them'}."
            )
        if sentence := self.loss():
            found.append(sentence)
        return found

    def loss(self) -> str:
        """What cannot be written, such as "37 ties, 12 skips and 5 notes cannot be written as
        pairs."; empty if nothing was lost."""
        said = [
            f"{self.lost[key]:,} {names[self.lost[key] != 1]}"
            for key, names in LOSSES.items()
            if self.lost[key]
        ]
        if not said:
            return ""
        listed = said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
        return f"{listed} cannot be written as {self.form}."

"""Rows in a form that `data.preferences` reads, as pairs and votes of the store.

The same readers read them; what training does not ask is taken beside: who wrote an answer, how
long a vote took, notes, skips, whether both were bad, the right answer.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from rlhf_core.data.formats import Parsing
from rlhf_core.data.forms.fields import find, is_filled, listed
from rlhf_core.data.forms.rows import BadRowError, Reading
from rlhf_core.data.forms.table import in_source
from rlhf_core.data.prepared import KEPT, canonical_prompt
from rlhf_core.data.sources import Fault, Row, SourceRows
from rlhf_core.data.vote_details import BOTH_BAD, quote
from rlhf_core.errors import DataError
from rlhf_core.settings.fields import DETAILS, FIELDS, names_in, word
from tasks.feedback.forms import checks
from tasks.feedback.forms.checks import MOST, Pseudonyms
from tasks.feedback.forms.options import OURS, Entry, ImportOptions
from tasks.feedback.store.records import Answer, Ballot, NewPair

# Of a vote, and of a row; each may be mapped by `fields`.
OF_A_BALLOT = ("seconds", "note", "reason")
OF_A_PAIR = ("model_a", "model_b", "licence", "pair")
EXTRA = (*OF_A_BALLOT, *OF_A_PAIR, "model", "gold_answer")
# Other names that files have for them.
_ALSO: Mapping[str, tuple[str, ...]] = {
    "model_a": ("chosen_model", "chosen-model", "model_chosen"),
    "model_b": ("rejected_model", "rejected-model", "model_rejected"),
    "licence": ("license",),
}
_NUMBER = re.compile(r"[0-9]{1,18}")  # of a pair
_ASKS_FOR = ("votes", "vote", "preference", "score_a", "score_b", "chosen", "answers", "score")


class PreferenceRows:
    """The pairs and votes of a source; `faults` and `left_out` are complete once all were read.

    Raises: DataError when the source has no preferences, or a field that is mapped is not there.
    """

    def __init__(
        self,
        source: SourceRows,
        names: Mapping[str, str],
        votes: Mapping[str, str],
        options: ImportOptions,
        people: Pseudonyms,
        *,
        sides: bool = False,
        lost: Mapping[str, int] | None = None,
    ) -> None:
        """
        Args:
            names: of ours -> the source's.
            votes: value, as `word` has it -> ours.
            sides: `left` is the first answer, and it was shown first.
            lost: what is not in the rows any more, and how often.
        """
        self._options, self._people, self._lost = options, people, lost or {}
        self._special = {**dict.fromkeys(BOTH_BAD, "both_bad"), "skip": "skip", **votes}
        self._special = {
            value: ours for value, ours in self._special.items() if ours in ("both_bad", "skip")
        } | {value: "" for value, ours in votes.items() if ours not in ("both_bad", "skip")}
        self._own = {field: name for field, name in names.items() if field in EXTRA}
        known = {field: name for field, name in names.items() if field in FIELDS["preferences"]}
        if odd := sorted(names.keys() - self._own.keys() - known.keys()):
            raise DataError(
                f"fields maps '{odd[0]}', which is no field of ours; they are: "
                f"{', '.join((*FIELDS['preferences'], *EXTRA))}"
            )
        if options.gold and not in_source(source, options.gold):
            raise DataError(
                f"{source.source} has no field '{options.gold}', which --gold names; its fields "
                f"are: {listed(source.columns())}"
            )
        if options.ask:
            source = _with_votes(source, known)
        as_ties = {value: "tie" if ours in OURS[3:] else ours for value, ours in votes.items()}
        reading = Reading(
            as_ties,
            frozenset(options.ignore),
            options.score_margin,
            keep=tuple(dict.fromkeys(options.keep)),
            words={"skip": "tie"} | ({"left": "a", "right": "b"} if sides else {}),
        )
        try:
            self._parsing = Parsing(source, "preferences", known, reading)
        except DataError as error:
            raise DataError(in_options(str(error))) from error
        self.source = self._parsing.source
        self._names = known
        self._file = Path(source.source).name
        self._read = self._places()
        self.faults: list[Fault] = []
        self.left_out = Counter[str]()
        self.unread: dict[str, int] = {}
        self._golden = Counter[int]()  # votes on control questions, by pair
        self._known: set[int] = set()  # pairs whose right answer the source has

    @property
    def notes(self) -> list[str]:
        """What a user should know about how the source was read."""
        notes = [
            in_options(note)
            for note in self._parsing.columns.notes
            if "text that is not read" not in note  # all columns are listed in `unread`
            and not (self._options.gold and "'gold'" in note)
        ]
        golden = sum(count for pair, count in self._golden.items() if pair not in self._known)
        if golden:
            notes.append(
                f"{golden:,} votes are on pairs of which the right answer is known, but not "
                "said; --gold COLUMN reads it"
            )
        return notes

    def __iter__(self) -> Iterator[Entry]:
        self.faults, self.left_out = [], Counter(self._lost)
        self._golden, self._known = Counter(), set()
        unread = Counter[str]()
        examples = self._parsing.examples()
        last = 0
        for _, group in groupby(examples, key=lambda one: (one.get("row", 0), one["id"])):
            votes = list(group)
            number, values = votes[0].get("row", 0), votes[0].get("values", {})
            if number != last:
                unread.update(_unread(values, self._read))
                last = number
            try:
                entry = self._entry(number, values, votes)
            except BadRowError as bad:
                where = (self.source.source, self.source.unit, number, bad.field)
                reason = in_options(bad.reason)
                if bad.field in EXTRA and bad.field not in self._own.values():
                    reason += f" (--ignore {bad.field} leaves the column out)"
                self.faults.append(Fault(*where, bad.category, reason))
                continue
            if entry is None:
                self.left_out["pairs of identical answers"] += 1
            else:
                yield entry
        for reason, count in self._parsing.skipped.items():
            self.left_out[f"rows or answers: {reason}"] += count
        for fault in self._parsing.faults:
            reason = in_options(fault.reason)
            self.faults.append(
                Fault(fault.source, fault.unit, fault.number, fault.field, fault.category, reason)
            )
        self.faults.sort(key=lambda fault: fault.number)
        self.unread = dict(unread)

    # ---- one row ----

    def _entry(self, number: int, values: Row, votes: list[Row]) -> Entry | None:
        first = votes[0]
        a, b = first["response_a"], first["response_b"]
        checks.plain(first["prompt"], self._name("prompt"))
        for text in (a, b):
            checks.plain(text, "response")
        model_a = self._model(values, "model_a", first.get("entry_a"))
        model_b = self._model(values, "model_b", first.get("entry_b"))
        if a.strip() == b.strip() and model_a == model_b:
            return None
        source = self._source(first["source"])
        licence = checks.text(self._extra(values, "licence"), "licence", MOST["licence"])
        licence = licence or self._options.licence
        gold = self._right_answer(values)
        people, told = self._without_known(votes, bool(gold))
        pair = NewPair(
            first["prompt"],
            Answer(a, model_a, {}, source, licence),
            Answer(b, model_b, {}, source, licence),
            source,
            licence,
            first.get(KEPT, {}),
            gold or told or self._marked(votes),
            self._options.ask,
        )
        key = hash((canonical_prompt(pair.prompt), frozenset((a, b))))
        if pair.gold:
            self._known.add(key)
        elif marked := sum(bool(vote["gold"]) for vote in votes):
            self._golden[key] += marked
        known = str(find(values, self._own["pair"]) or "") if "pair" in self._own else ""
        ballots = [] if self._options.ask else [self._ballot(values, vote) for vote in people]
        return Entry(number, pair, ballots, int(known) if _NUMBER.fullmatch(known) else None)

    def _without_known(self, votes: list[Row], known: bool) -> tuple[list[Row], Any]:
        """The votes of people, and the right answer, if one of the votes is that."""
        people, right = [], None
        for vote in votes:
            special = self._special.get(word(vote.get("said")), "")
            said = special or vote["vote"]
            marked = known or bool(vote["gold"])
            told = checks.right_answer(vote["annotator"], marked, said, self._name("vote"))
            if told:
                right = right or told
            else:
                people.append(vote)
        return people, right

    def _ballot(self, values: Row, vote: Row) -> Ballot:
        entry = vote.get("entry")
        voted: Any = self._special.get(word(vote.get("said")), "") or vote["vote"]
        name = self._names.get("annotator", "annotator")
        taken = self._detail(values, entry, "seconds")
        note = self._detail(values, entry, "note")
        return Ballot(
            voted,
            self._people.name(vote["annotator"], name),
            vote["shown_first"],
            vote["margin"],
            checks.seconds(taken, self._own.get("seconds", "seconds")),
            checks.text(vote["time"], "time", MOST["time"]),
            checks.text(note, self._own.get("note", "note")),
            checks.text(self._detail(values, entry, "reason"), "reason"),
            self._source(vote["source"]),
            "import",
            max(vote["ballot"] - 1, 0),  # the first of several that are alike is like a single one
        )

    def _right_answer(self, values: Row) -> Any:
        field = self._options.gold or self._own.get("gold_answer", "")
        value = find(values, field) if field else None
        if not is_filled(value):
            return None
        sides = self._parsing.columns.sides
        found = sides.vote(value)
        if not found:
            raise BadRowError(
                field,
                "unknown vote",
                f"{quote(value)} is no right answer; it is 'a', 'b' or 'tie', and --votes says "
                "what other values mean",
            )
        return found

    def _marked(self, votes: list[Row]) -> Any:
        """The right answer that a tool has marked among the votes."""
        marked = [one for one in votes if _mapped(one.get("entry"), "ground_truth")]
        for vote in marked:
            if self._special.get(word(vote.get("said"))) is None:
                return vote["vote"]
        return None

    def _model(self, values: Row, field: str, entry: Any) -> str:
        own = self._extra(values, field)
        if not is_filled(own) and isinstance(entry, dict):
            own = find(entry, self._own.get("model", "model"))
        return checks.text(own, self._own.get(field, field), MOST["model"])

    def _source(self, found: str) -> str:
        if found == self._file and self._options.source:
            found = self._options.source
        return checks.text(found, self._name("source"), MOST["source"])

    def _extra(self, values: Row, field: str) -> Any:
        names = (self._own[field],) if field in self._own else (field, *_ALSO.get(field, ()))
        return next((find(values, name) for name in names if is_filled(find(values, name))), None)

    def _detail(self, values: Row, entry: Any, field: str) -> Any:
        """A value of a vote's entry in the list of votes, or else of the row."""
        name = self._own.get(field, field).removeprefix("votes.")
        if isinstance(entry, list):
            place = int(name) if name.isdecimal() else -1
            return entry[place] if 0 <= place < len(entry) else None
        found = _mapped(entry, name)
        return self._extra(values, field) if found is None else found

    def _name(self, field: str) -> str:
        return self._names.get(field, field)

    def _places(self) -> set[str]:
        parsing = self._parsing
        details = set(DETAILS) - parsing.columns.details
        fields = (parsing.form.needs | parsing.form.reads) - details
        fields -= set() if parsing.columns.system else {"system"}
        places = {self._name(field) for field in fields}
        places |= {name for place in places for name in names_in(place)}
        for field in {*OF_A_BALLOT, "model_a", "model_b", "licence", *self._own}:
            places |= {self._own[field]} if field in self._own else {field, *_ALSO.get(field, ())}
        return places | {*self._options.keep, *self._options.ignore, self._options.gold}


def _mapped(entry: Any, name: str) -> Any:
    return find(entry, name) if isinstance(entry, dict) else None


def _unread(values: Row, read: set[str], start: str = "") -> Iterator[str]:
    """The filled columns of a row that are not read, by key where some keys of them are."""
    for name, value in values.items():
        place = f"{start}{name}"
        if place in read or not is_filled(value):
            continue
        inside = f"{place}."
        if any(one.startswith(inside) for one in read):
            if isinstance(value, dict):
                yield from _unread(value, read, inside)
            continue
        yield place


def _with_votes(source: SourceRows, names: Mapping[str, str]) -> SourceRows:
    """Pairs that nobody has voted on yet, with a vote that is not read."""
    here = set(source.columns())
    if "votes" in here:
        return source.mapped(
            lambda n, row: [(n, row if row.get("votes") else {**row, "votes": ["tie"]})]
        )
    if any(names.get(field, field) in here for field in _ASKS_FOR):
        return source
    return source.mapped(lambda n, row: [(n, {**row, "vote": "tie"})])


def in_options(message: str) -> str:
    """A message about settings of `data.preferences`, in the options of the command."""
    message = re.sub(
        r"data\.prompt_template(?: \(such as \"(.*?)\"\))?(?= puts)",
        lambda m: f'--fields prompt="{m[1] or "{prompt}..."}"',
        message,
    )
    message = message.replace("data.on_bad_row to 'drop'", "--on-bad-row drop")
    message = re.sub(r"which data\.preferences reads by \{path: \.\.\., ", "read by {", message)
    return re.sub(r"data\.preferences\.(\w+)", lambda m: "--" + m[1].replace("_", "-"), message)

"""Votes of a project, or of a snapshot, into a file in another form; what does not fit is named.

exported = export_file(project, "pairs.jsonl", ExportOptions(form="pairs"))
print(exported.loss())  # "37 ties, 12 skips and 5 notes cannot be written as pairs."
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from getpass import getuser
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

import pyarrow as pa
from sqlalchemy import func, select

from rlhf_core.data.sources import Row
from rlhf_core.errors import DataError
from rlhf_core.settings.fields import GOLD
from tasks.feedback.forms import files, stored, tables, votes
from tasks.feedback.forms.dialogues import hh_rlhf, pair_row
from tasks.feedback.forms.known import WRITTEN, form_named
from tasks.feedback.forms.options import KEPT_BACK, Exported, ExportOptions, Progress, unseen
from tasks.feedback.forms.stored import StoredPair
from tasks.feedback.forms.tools import argilla, labelstudio
from tasks.feedback.forms.tools.naming import is_question
from tasks.feedback.store import audit
from tasks.feedback.store.judgments import CastVote, KeptBack
from tasks.feedback.store.records import CHOICES
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import Judgment

CHUNK = 1000  # votes whose pairs are looked up at once
_ROWS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_TASKS = (".json", ".jsonl")
_S = pa.string()
_PAIR = pa.schema(
    [(name, _S) for name in ("prompt", "chosen", "rejected", "annotator", "time", "source")]
    + [(name, _S) for name in ("licence", "chosen_model", "rejected_model")]
    + [("margin", pa.float64()), ("gold", pa.bool_())]
)
_DIALOGUES = pa.schema([("chosen", _S), ("rejected", _S)])


class Out(NamedTuple):
    """Votes on their way out: what they are, what gets lost, how far it is."""

    project: FeedbackProject
    options: ExportOptions
    made: Exported
    progress: Progress
    known: dict[int, str]  # the right answer to each pair of a vote that has passed
    kept_back: Mapping[str, KeptBack]

    @property
    def lost(self) -> Counter[str]:
        """What the form has no place for."""
        return self.made.lost

    def votes(self, *, skips: bool = False) -> Iterator[tuple[CastVote, StoredPair]]:
        """The votes, each with its pair."""
        snapshot = self.options.snapshot
        total = self.total()
        if snapshot:
            found = self.project.snapshots.votes(snapshot)
        else:
            also = self.options.also
            found = self.project.judgments.stream(skips=True, training=True, also=also)
        done = 0
        while chunk := list(islice(found, CHUNK)):
            pairs = stored.by_id(self.project, (vote.pair for vote in chunk))
            done += len(chunk)
            self.progress(min(done, total), total)
            for vote in chunk:
                if vote.vote == "skip" and not skips:
                    self.lost["skip"] += 1
                    self.lost["note"] += bool(vote.note)
                    continue
                if vote.gold and vote.vote != "skip":
                    self.known[vote.pair] = vote.gold
                yield vote, pairs[vote.pair]

    def answers(self) -> Iterator[tuple[CastVote, StoredPair]]:
        """The known answers to the pairs of the votes, once these have passed, as votes of the
        annotator for whom they stand."""
        numbers = iter(self.known)
        while chunk := list(islice(numbers, CHUNK)):
            pairs = stored.by_id(self.project, chunk)
            for number in chunk:
                yield _answer(pairs[number], self.known[number]), pairs[number]

    @property
    def pairs_kept_back(self) -> int:
        """Pairs whose votes are not written."""
        return sum(one.pairs for one in self.kept_back.values())

    def total(self) -> int:
        """About how many votes there are."""
        if self.options.snapshot:
            return self.project.snapshots.find(self.options.snapshot).votes
        with self.project.database.reading() as session:
            query = select(func.count()).select_from(Judgment)
            return session.scalar(query.filter_by(project_id=self.project.id)) or 0


def export_file(
    project: FeedbackProject,
    path: str,
    options: ExportOptions | None = None,
    *,
    progress: Progress = unseen,
    by: str = "",
) -> Exported:
    """Write the votes that count now, or those of a snapshot, to a file.

    No identity is written: the store's pseudonyms, or numbers in their place. Votes that no
    training may see are written only if `also` names them.

    Raises: DataError for an unknown form, an ending that it is not written to, or a snapshot that
    is not there; UserError when the file is there already or cannot be written.
    """
    options = options or ExportOptions()
    form = form_named(options.form, WRITTEN)
    labelling = form.name in ("label-studio", "argilla")
    place = files.checked(path, _TASKS if labelling else _ROWS, force=options.force)
    if unknown := [name for name in options.also if name not in KEPT_BACK]:
        raise DataError(
            f"--with takes {' or '.join(KEPT_BACK)}, not '{unknown[0][:80]}'; the other votes are "
            "written without it"
        )
    kept_back: Mapping[str, KeptBack] = {}
    if options.snapshot:
        project.snapshots.find(options.snapshot)  # before a file is begun
    elif not labelling:
        kept_back = project.judgments.kept_back(options.also, skips=form.name == "votes")
    made = Exported(path, form.title)
    made.kept_back.update({name: one.votes for name, one in kept_back.items()})
    out = Out(project, options, made, progress, {}, kept_back)
    schema, flat, rows = _ROWS_OF[form.name](out)
    beside = _beside(form.name, project)
    targets = {
        place.with_name(place.name.split(".")[0] + ending): text for ending, text in beside.items()
    }
    for target in targets:
        files.checked(str(target), (target.suffix,), force=options.force)
    made.rows = files.write(place, rows, schema, flat)
    for target, text in targets.items():
        files.write_text(target, text)
        made.beside.append(str(target))
    made.lost["earlier"] += 0 if options.snapshot or labelling else _earlier(project)
    with project.database.writing() as session:
        details = {"form": form.name, "rows": made.rows, "snapshot": options.snapshot}
        audit.note(session, project.id, by or getuser(), "export", path[-300:], details)
    return made


def _earlier(project: FeedbackProject) -> int:
    """Judgments that do not count any more."""
    with project.database.reading() as session:
        mine = select(func.count()).select_from(Judgment).where(Judgment.project_id == project.id)
        replaced = session.scalar(mine.where(Judgment.replaces_id.is_not(None))) or 0
        return int(replaced)


def _answer(stored_pair: StoredPair, right: str) -> CastVote:
    pair = stored_pair.pair
    return CastVote(
        judgment=0,
        pair=stored_pair.id,
        prompt=pair.prompt,
        response_a=pair.a.text,
        response_b=pair.b.text,
        model_a=pair.a.model,
        model_b=pair.b.model,
        vote=right,
        first="",
        annotator=GOLD,
        kind="import",
        gold=right,
        margin=0.0,
        seconds=None,
        time="",
        note="",
        reason="",
        source="",
        kept=dict(pair.kept),
    )


def _numbered(options: ExportOptions) -> Callable[[str], str]:
    """How annotators are called: by their pseudonyms, or by numbers in the order of their votes."""
    if not options.without_annotators:
        return lambda name: name or ""
    numbers: dict[str, str] = {}
    return lambda name: numbers.setdefault(name, str(len(numbers) + 1)) if name else ""


# ---- votes ----

Rows = tuple[pa.Schema, Callable[[Row], Row], Iterable[Row]]


def _raw(out: Out) -> Rows:
    return votes.SCHEMA, votes.flat, _raw_rows(out)


def _raw_rows(out: Out) -> Iterator[Row]:
    called = _numbered(out.options)
    alike: Counter[bytes] = Counter()  # anonymous votes that say the same are several
    voted: set[int] = set()
    for vote, pair in out.votes(skips=True):
        voted.add(vote.pair)
        number = 0
        if not vote.annotator:
            key = (vote.pair, vote.vote, vote.first, vote.time, vote.source)
            digest = blake2b(repr(key).encode(), digest_size=8).digest()
            number = alike[digest]
            alike[digest] += 1
        yield votes.row(vote, pair, called(vote.annotator), number)
    for vote, pair in out.answers():
        out.made.known += 1
        yield votes.row(vote, pair, GOLD, 0) | {"gold": True}
    if not out.options.snapshot:
        out.lost["unvoted"] += stored.count(out.project) - len(voted) - out.pairs_kept_back


def _decided(out: Out) -> Iterator[tuple[CastVote, StoredPair, str]]:
    """Votes for one of the answers, with the one that won; the rest is counted."""
    for vote, pair in out.votes():
        if vote.kind == "repeat":
            out.lost["repeat"] += 1
        elif vote.vote in ("tie", "both_bad"):
            out.lost[vote.vote] += 1
        else:
            yield vote, pair, vote.vote
            continue
        out.lost["note"] += bool(vote.note)


def _pairs(out: Out) -> Rows:
    return _PAIR, _flat_pair, _pair_rows(out)


def _pair_rows(out: Out) -> Iterator[Row]:
    called, lost = _numbered(out.options), out.lost
    for vote, pair, winner in _decided(out):
        _count(lost, vote, pair, "first", "seconds", "note", "sampling", "kept")
        yield pair_row(vote, pair, winner, called(vote.annotator))
    for vote, pair in out.answers():
        if vote.vote == "tie":
            lost["gold"] += 1
        else:
            out.made.known += 1
            yield pair_row(vote, pair, vote.vote, GOLD) | {"gold": True}


def _flat_pair(row: Row) -> Row:
    prompt = row["prompt"]
    return {**row, "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt)}


def _hh(out: Out) -> Rows:
    return _DIALOGUES, dict, _hh_rows(out)


def _hh_rows(out: Out) -> Iterator[Row]:
    for vote, pair, winner in _decided(out):
        row, reason = hh_rlhf(pair, winner)
        if row is None:
            out.lost[reason] += 1
            continue
        _count(
            out.lost, vote, pair,
            *("first", "seconds", "time", "note", "annotator", "margin", "source"),
            *("model", "sampling", "licence", "kept"),
        )  # fmt: skip
        yield row
    out.lost["gold"] += len(out.known)


def _count(lost: Counter[str], vote: CastVote, stored_pair: StoredPair, *what: str) -> None:
    """Count what a vote has, and the form has no place for."""
    pair = stored_pair.pair
    has: Mapping[str, object] = {
        **{"first": vote.first, "time": vote.time, "note": vote.note, "margin": vote.margin},
        **{"seconds": vote.seconds is not None, "annotator": vote.annotator},
        **{"source": vote.source, "kept": pair.kept, "licence": pair.licence},
        **{"model": pair.a.model or pair.b.model, "sampling": pair.a.sampling or pair.b.sampling},
    }
    lost.update(name for name in what if has[name])


# ---- sums of votes ----


def _summed(form: str) -> Callable[[Out], Rows]:
    def rows(out: Out) -> Rows:
        return tables.SCHEMAS[form], dict, _sum_rows(out, form)

    return rows


def _sum_rows(out: Out, form: str) -> Iterator[Row]:
    tally: dict[int, list[int]] = {}
    lost = out.lost
    for vote, pair in out.votes():
        if vote.kind == "repeat":
            lost["repeat"] += 1
            continue
        counts = tally.setdefault(vote.pair, [0, 0, 0, 0])
        counts[CHOICES.index(vote.vote)] += 1
        lost["single"] += 1
        lost["both_bad"] += vote.vote == "both_bad"
        _count(lost, vote, pair, "first", "seconds", "time", "note", "annotator", "margin")
    lost["gold"] += len(out.known)
    every = stored.pairs(out.project, snapshot=out.options.snapshot)
    yield from tables.rows(form, every, tally, lost)
    lost["unvoted"] -= out.pairs_kept_back


# ---- pairs to be labelled ----


def _tasks(make: Callable[[StoredPair], Row]) -> Callable[[Out], Rows]:
    def rows(out: Out) -> Rows:
        return _DIALOGUES, dict, _task_rows(out, make)

    return rows


def _task_rows(out: Out, make: Callable[[StoredPair], Row]) -> Iterator[Row]:
    lost, options = out.lost, out.options
    every = stored.pairs(out.project, only_open=options.only_open, snapshot=options.snapshot)
    for pair in every:
        lost["vote"] += pair.votes
        # They stay in the store, and are found again by the number of the pair.
        lost["gold"] += pair.pair.gold is not None
        lost["dialogue"] += not is_question(pair.prompt)
        yield make(pair)


def _beside(form: str, project: FeedbackProject) -> dict[str, str]:
    """Ending and text of the files beside that of the form."""
    if form == "label-studio":
        return {".config.xml": labelstudio.CONFIG}
    if form == "argilla":
        rules = project.rules
        settings = argilla.settings(rules.question, rules.guidelines)
        return {".settings.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n"}
    return {}


_ROWS_OF: Mapping[str, Callable[[Out], Rows]] = {
    "votes": _raw,
    "pairs": _pairs,
    "hh-rlhf": _hh,
    **{form: _summed(form) for form in tables.SCHEMAS},
    "label-studio": _tasks(labelstudio.task),
    "argilla": _tasks(argilla.record),
}

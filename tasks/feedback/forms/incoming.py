"""A file into a project: its pairs and votes are checked, then put in; what is there stays.

imported = import_file(project, "votes.jsonl", ImportOptions(licence="CC BY 4.0"))
print("\\n".join(imported.lines()))

An import that was killed is repeated: votes are known by what they say, so none is doubled.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from getpass import getuser
from itertools import islice
from pathlib import Path
from typing import TypeVar

from rlhf_core.data.columnar import DamagedError
from rlhf_core.data.prepared import canonical_prompt
from rlhf_core.data.sources import SourceRows, reread_rows
from rlhf_core.errors import DataError
from rlhf_core.reading import UnreadableError
from tasks.feedback.forms import stored
from tasks.feedback.forms.checks import Pseudonyms
from tasks.feedback.forms.known import Form, form_of_file
from tasks.feedback.forms.options import Entry, Imported, ImportOptions, Progress, unseen
from tasks.feedback.forms.rows import PreferenceRows, in_options
from tasks.feedback.forms.tools import argilla, labelstudio
from tasks.feedback.forms.tools.naming import compared_lists
from tasks.feedback.forms.votes import VoteRows
from tasks.feedback.store import audit
from tasks.feedback.store.content import EXCHANGED
from tasks.feedback.store.records import NewPair
from tasks.feedback.store.store import FeedbackProject

Item = TypeVar("Item")
CHUNK = 500  # pairs that are put in at once
_LISTED = 20  # bad rows that are named


def import_file(
    project: FeedbackProject,
    path: str,
    options: ImportOptions | None = None,
    *,
    progress: Progress = unseen,
    by: str = "",
) -> Imported:
    """Put the votes of a file into a project, or its pairs into the queue.

    Nothing is put in before the whole file has been checked.

    Args:
        path: a .jsonl, .json, .csv or .parquet file (.gz too), a `save_to_disk` folder or a hub id.

    Raises: DataError when the file cannot be read, is in no known form, or has a bad row while
        `on_bad_row` is `error`; ConfigError for options that contradict each other.
    """
    return import_checked(lambda: project, path, options, progress=progress, by=by)


def import_checked(
    find: Callable[[], FeedbackProject],
    path: str,
    options: ImportOptions | None = None,
    *,
    progress: Progress = unseen,
    by: str = "",
) -> Imported:
    """As `import_file`, into a project that is asked for, and so perhaps made, once the file is
    known to be good."""
    options = options or ImportOptions()
    try:
        source = reread_rows(path, split=options.split, subset=options.subset, limit=options.limit)
        if not source.rows and not source.unreadable:
            raise DataError(f"{source.source} has no rows; check that it is the right file")
        if options.prompt:
            source = _with_prompt(source, options.prompt)
        form = form_of_file(source, options.form, options.fields)
        people = Pseudonyms(options.who == "hashed")
        rows = _reader(source, form, options, people)
        found = _checked(rows, source, form, options, progress)
        project = find()
        people.use(project)
        return _put_in(project, rows, found, options, progress, by or getuser())
    except (UnreadableError, DamagedError) as error:  # of a file that is read again
        raise DataError(f"{path}: {error}; check the file, or write it again") from error


def _reader(
    source: SourceRows, form: Form, options: ImportOptions, people: Pseudonyms
) -> VoteRows | PreferenceRows:
    if form.name == "votes":
        unused = [
            name
            for name in ("fields", "votes", "keep", "gold", "score_margin")
            if getattr(options, name)
        ]
        if unused:
            raise DataError(
                f"{source.source} is a file of raw votes, which says what its columns mean; "
                f"remove --{unused[0].replace('_', '-')}"
            )
        return VoteRows(source, options, people)
    votes = {**form.votes, **options.values()}
    if adapt := _ADAPTED.get(form.name):
        own = adapt(source, options)
        return PreferenceRows(
            own.source, own.names, votes, options, people, sides=own.sides, lost=own.left_out
        )
    there = set(source.columns())
    also = {ours: name for ours, name in form.also.items() if name.partition(".")[0] in there}
    names = {**also, **form.fields, **options.fields}
    return PreferenceRows(source, names, votes, options, people)


_ADAPTED = {
    "compared-lists": compared_lists,
    "label-studio": labelstudio.adapted,
    "argilla": argilla.adapted,
}


def _with_prompt(source: SourceRows, prompt: str) -> SourceRows:
    """Rows of texts that answer the same question, which does not stand beside them."""
    if "prompt" in source.columns():
        raise DataError(f"{source.source} has a field 'prompt', so --prompt has no meaning")
    return source.mapped(lambda n, row: [(n, {**row, "prompt": prompt})])


def _checked(
    rows: VoteRows | PreferenceRows,
    source: SourceRows,
    form: Form,
    options: ImportOptions,
    progress: Progress,
) -> Imported:
    """Read all rows once: what they are, and which are bad."""
    total = len(source.rows)
    found = Imported(source.source, form.title, total + len(source.unreadable))
    gold = 0
    pairs: set[int] = set()  # by hash: a million of them take 60 MB
    for entry in _shown(rows, total, progress):
        pair = entry.pair
        texts = frozenset((pair.a.text, pair.b.text))
        models = frozenset((pair.a.model, pair.b.model))
        pairs.add(hash((canonical_prompt(pair.prompt), texts, models)))
        found.votes += len(entry.ballots)
        found.skips += sum(ballot.vote == "skip" for ballot in entry.ballots)
        gold += pair.gold is not None
    found.gold, found.pairs = gold, len(pairs)
    found.left_out.update(rows.left_out)
    found.unread, found.notes = rows.unread, list(rows.notes)
    if rows.faults and options.on_bad_row == "error":
        many = len(rows.faults)
        them = "it" if many == 1 else f"all {many:,} bad rows"
        raise DataError(
            f"{rows.faults[0]}; fix the row, or leave {them} out with --on-bad-row drop"
        )
    for fault in rows.faults:
        found.left_out[f"bad rows ({fault.category})"] += 1
    found.bad_rows = [in_options(str(fault)) for fault in rows.faults[:_LISTED]]
    return found


def _put_in(
    project: FeedbackProject,
    rows: Iterable[Entry],
    found: Imported,
    options: ImportOptions,
    progress: Progress,
    by: str,
) -> Imported:
    before = stored.count(project)
    batch = None
    if options.ask:
        name = f"import of {Path(found.source).name}"
        batch = project.content.batch(name[:200], "import", {"asked": options.ask})
    pairs: set[int] = set()
    other: set[int] = set()
    for entries in _chunks(_shown(rows, found.rows, progress), CHUNK):
        entries = _recognised(project, entries)
        if options.ask:
            added = project.content.add([entry.pair for entry in entries], batch=batch)
            pairs |= {one.id for one in added}
        else:
            found.new_votes += project.judgments.add(
                (entry.pair, entry.ballots) for entry in entries
            )
        other |= _known_otherwise(project, entries)
    if other:
        is_not = "answer of the file is" if len(other) == 1 else "answers of the file are"
        found.notes.append(
            f"{len(other):,} known {is_not} not the one that the project has, which stays; "
            "`rlhf feedback gold` changes it"
        )
    found.asked = len(pairs)
    found.new_pairs = stored.count(project) - before
    with project.database.writing() as session:
        counts = {"form": found.form, "rows": found.rows, "new votes": found.new_votes}
        counts |= {"new pairs": found.new_pairs, "asked": found.asked}
        audit.note(session, project.id, by, "import", found.source[-300:], counts)
    return found


def _known_otherwise(project: FeedbackProject, entries: list[Entry]) -> set[int]:
    """The pairs of which the project has another right answer than the entries say."""
    golden = [(entry.pair, str(entry.pair.gold)) for entry in entries if entry.pair.gold]
    if not golden:
        return set()
    placed = project.content.add([replace(pair, wanted=0) for pair, _ in golden])
    there = stored.by_id(project, (one.id for one in placed))
    return {
        one.id
        for one, (_, said) in zip(placed, golden, strict=True)
        if there[one.id].pair.gold != (EXCHANGED.get(said, said) if one.swapped else said)
    }


def _recognised(project: FeedbackProject, entries: list[Entry]) -> list[Entry]:
    """Pairs that came from this project: as they are there, with who wrote what."""
    numbers = [entry.known for entry in entries if entry.known is not None]
    if not numbers:
        return entries
    there = stored.by_id(project, numbers)
    return [_with_origin(entry, there.get(entry.known or 0)) for entry in entries]


def _with_origin(entry: Entry, own: stored.StoredPair | None) -> Entry:
    if own is None:
        return entry
    new, old = entry.pair, own.pair
    for a, b in ((old.a, old.b), (old.b, old.a)):
        if (new.a.text, new.b.text) == (a.text, b.text):
            pair = NewPair(
                old.prompt, a, b, old.source, old.licence, old.kept, new.gold, new.wanted
            )
            return entry._replace(pair=pair)
    return entry


def _shown(rows: Iterable[Entry], total: int, progress: Progress) -> Iterator[Entry]:
    for place, entry in enumerate(rows):
        if place % CHUNK == 0:
            progress(min(entry.row, total), total)
        yield entry
    progress(total, total)


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk

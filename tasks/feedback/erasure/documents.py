"""Takes a person out of files: rows of tables are left out, other mentions overwritten.

A row is about the person if one of its cells is the pseudonym, and a whole row goes, since it says
what the person did. In running text the same number of x takes the place of the pseudonym, so that
a log that a server writes at the moment stays as long as it was. What people compare is never
changed: a word in it is not the person.
"""

import csv
import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from tasks.feedback.erasure.names import TEXTS, WHO, Name
from tasks.feedback.erasure.requests import NOBODY

Outcome: TypeAlias = Literal["", "rows left out", "overwritten", "deleted", "common word"]
GONE: Any = object()  # of a value that goes with what it is in
HEADER = 2**20  # bytes of a safetensors file, whose rest is numbers
BLOCK = 2**24
WEIGHTS = ".safetensors"
_CSV_FIELD = 2**30


def has(path: Path, name: Name) -> bool:
    """Whether a file has the pseudonym in it, packed or not."""
    return any(name.stands_in_bytes(part) for part in _contents(path, name))


def may_have(path: Path, name: Name) -> bool:
    """Whether a file has the bytes of the pseudonym, even within a longer name."""
    try:
        return any(name.may_be_in(part) for part in _blocks(path.open("rb"), name))
    except OSError:
        return False


class Look(NamedTuple):
    """What one sees of a file without opening it as a database."""

    is_sqlite: bool
    may_have: bool  # the bytes of the pseudonym, even within a longer name
    has: bool  # the pseudonym


def look(path: Path, name: Name) -> Look:
    """Look into a file. A process that has it open as a database must not: closing it gives up the
    locks that SQLite holds in the same process (https://sqlite.org/howtocorrupt.html, 2.2)."""
    try:
        with path.open("rb") as file:
            is_sqlite = file.read(16) == b"SQLite format 3\0"
        return Look(is_sqlite, may_have(path, name), has(path, name))
    except OSError:
        return Look(False, False, False)


def clean(path: Path, name: Name) -> Outcome:
    """Take a person out of a file; what was done.

    A word that means other things as well is taken out only where annotators are named, and "common
    word" says that it stands elsewhere.
    """
    suffix = path.suffix.lower()
    clean_table = _TABLES.get(suffix)
    if clean_table is not None:
        try:
            changed = clean_table(path, name)
        except (ValueError, csv.Error, RecursionError):
            changed = False  # it is not what its name says
        if changed:
            again = clean(path, name) if name.telling and has(path, name) else ""
            return again or "rows left out"
        if not name.telling:
            return "common word"
    if not name.telling:
        return "common word"
    if suffix == ".parquet" or _is_packed(path) or _is_binary(path):
        path.unlink(missing_ok=True)
        return "deleted"
    _overwrite(path, name)
    return "overwritten"


# ---- what is in a file ----


def _contents(path: Path, name: Name) -> Iterator[bytes]:
    """What a file has, in pieces that overlap by more than a name."""
    suffix = path.suffix.lower()
    try:
        if suffix == WEIGHTS:
            with path.open("rb") as file:
                yield file.read(HEADER)
            return
        yield from _blocks(path.open("rb"), name)
        if suffix == ".parquet":
            yield from _parquet_texts(path)
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    yield member.encode()
                    yield from _blocks(archive.open(member), name)
        elif suffix == ".gz" and not path.name.endswith(".tar.gz"):
            yield from _blocks(gzip.open(path), name)  # noqa: SIM115 (it is closed there)
        elif suffix in (".tar", ".tgz") or path.name.endswith(".tar.gz"):
            with tarfile.open(path) as archive:
                for found in archive:
                    yield found.name.encode()
                    if (member_file := archive.extractfile(found)) is not None:
                        yield from _blocks(member_file, name)
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, RuntimeError):
        return  # it has just been removed, or is not what its name says: the bytes were looked at


def _blocks(file: Any, name: Name) -> Iterator[bytes]:
    overlap = 8 * len(name.text.encode(errors="surrogatepass")) + 16
    with file:
        tail = b""
        while block := file.read(BLOCK):
            yield tail + block
            tail = block[-overlap:]


def _parquet_texts(path: Path) -> Iterator[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        for batch in file.iter_batches():
            yield json.dumps(batch.to_pylist(), ensure_ascii=False, default=str).encode()
    except pa.ArrowException:
        return


def _is_packed(path: Path) -> bool:
    return zipfile.is_zipfile(path) or path.suffix.lower() in (".gz", ".tgz", ".tar", ".bz2", ".xz")


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(BLOCK)


def _overwrite(path: Path, name: Name) -> None:
    """Write over the pseudonym where it stands; whoever appends meanwhile loses nothing."""
    content = path.read_bytes()
    new = name.overwritten(content)
    with path.open("r+b") as file:
        file.write(new)
        file.flush()
        os.fsync(file.fileno())


# ---- values ----


def without(value: Any, name: Name, key: str = "") -> Any:
    """A value of JSON without the person; GONE if it was about nothing else."""
    if isinstance(value, dict):
        return _without_in_object(value, name)
    if isinstance(value, list):
        kept = [part for part in value if not _is_row_of(part, name, key)]
        kept = [without(part, name, key) for part in kept]
        return [part for part in kept if part is not GONE]
    if not isinstance(value, str) or key.lower() in TEXTS:
        return value
    if value == name.text:
        return GONE if name.telling or key.lower() in WHO else value
    return name.replaced(value, NOBODY) if name.telling else value


def _without_in_object(value: dict[str, Any], name: Name) -> dict[str, Any]:
    columns, data = value.get("columns"), value.get("data")
    if isinstance(columns, list) and isinstance(data, list):  # a table of pandas or MLflow
        rows = [row for row in data if isinstance(row, list) and _tells(row, columns, name)]
        if rows:
            places = [place for place, row in enumerate(data) if row not in rows]
            value = {**value, "data": [data[place] for place in places]}
            if isinstance(value.get("index"), list):
                value["index"] = list(range(len(places)))
    made = {}
    for key, part in value.items():
        if key == name.text and name.telling:
            continue
        new = without(part, name, key)
        made[key] = NOBODY if new is GONE else new
    return made


def _is_row_of(part: Any, name: Name, key: str) -> bool:
    """Whether an entry of a list says something about the person."""
    if isinstance(part, dict):
        return any(_is_name(cell, column, name) for column, cell in part.items())
    if isinstance(part, list):
        return name.telling and name.text in part
    return _is_name(part, key, name)


def _tells(row: list[Any], columns: Iterable[Any], name: Name) -> bool:
    pairs = zip(columns, row, strict=False)
    return any(_is_name(cell, str(column), name) for column, cell in pairs)


def _is_name(cell: Any, column: str, name: Name) -> bool:
    column = column.lower()
    return cell == name.text and column not in TEXTS and (name.telling or column in WHO)


# ---- tables ----


def _clean_json(path: Path, name: Name) -> bool:
    value = json.loads(path.read_text(encoding="utf-8"))
    new = without(value, name)
    if new == value:
        return False
    text = json.dumps(None if new is GONE else new, ensure_ascii=False, indent=1)
    return _replace(path, lambda file: file.write(text) > 0)


def _clean_lines(path: Path, name: Name) -> bool:

    def write(file: io.TextIOBase) -> bool:
        changed = False
        with path.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                kept = line
                if name.may_be_in(line.encode(errors="surrogatepass")):
                    kept = _clean_line(line, name)
                changed |= kept != line
                file.write(kept)
        return changed

    return _replace(path, write)


def _clean_line(line: str, name: Name) -> str:
    value = json.loads(line)
    if _is_row_of(value, name, ""):
        return ""
    new = without(value, name)
    return line if new == value else json.dumps(new, ensure_ascii=False) + "\n"


def _clean_csv(path: Path, name: Name) -> bool:
    csv.field_size_limit(_CSV_FIELD)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","

    def write(file: io.TextIOBase) -> bool:
        changed = False
        with path.open(encoding="utf-8", newline="") as lines:
            rows = csv.reader(lines, delimiter=delimiter)
            out = csv.writer(file, delimiter=delimiter, lineterminator="\n")
            columns = next(rows, [])
            out.writerow(columns)
            for row in rows:
                if _tells(row, columns, name):
                    changed = True
                    continue
                named = [
                    cell if column.lower() in TEXTS or not name.telling
                    else name.replaced(cell, NOBODY)
                    for column, cell in zip(columns, row, strict=False)
                ]  # fmt: skip
                changed |= named != row[: len(named)]
                out.writerow([*named, *row[len(named) :]])
        return changed

    return _replace(path, write)


def _clean_parquet(path: Path, name: Name) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    rows = table.to_pylist()
    kept = [without(row, name) for row in rows if not _is_row_of(row, name, "")]
    if kept == rows:
        return False
    part = path.with_name(f".{path.name}.part")
    pq.write_table(pa.Table.from_pylist(kept, schema=table.schema), part)
    part.replace(path)
    return True


def _replace(path: Path, write: Callable[[io.TextIOBase], bool]) -> bool:
    """Write a file anew, whole or not at all; not at all if nothing changed, as `write` says."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            changed = write(file)
            file.flush()
            os.fsync(file.fileno())
        if changed:
            part.chmod(path.stat().st_mode)
            part.replace(path)
        return changed
    finally:
        part.unlink(missing_ok=True)


_TABLES: dict[str, Callable[[Path, Name], bool]] = {
    ".json": _clean_json,
    ".jsonl": _clean_lines,
    ".ndjson": _clean_lines,
    ".csv": _clean_csv,
    ".tsv": _clean_csv,
    ".parquet": _clean_parquet,
}

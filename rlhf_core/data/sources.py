"""Read files, folders and hub data sets as numbered rows.

This module knows file formats, not what a row means. Nothing is unpickled, and code shipped with a
data set never runs.
"""

import csv
import difflib
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_core.errors import DataError

Row = dict[str, Any]
# Keys around the rows of a file.
_WRAPPERS = ("data", "rows", "examples", "instances", "records", "items", "entries", "samples")
Unit = Literal["line", "row"]


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row, and where it is."""

    source: str
    unit: Unit
    number: int  # counted from 1
    field: str  # its name in the file; empty when the whole row is bad
    category: str  # under which the report counts it
    reason: str

    def __str__(self) -> str:
        where = f"{self.source}, {self.unit} {self.number}"
        return (
            f"{where}, field '{self.field}': {self.reason}"
            if self.field
            else f"{where}: {self.reason}"
        )


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source, and the lines that could not be read.

    Rows are numbered by the line on which they begin, or by row if the format has no lines.
    """

    source: str
    unit: Unit
    rows: Sequence[tuple[int, Row]]
    unreadable: Sequence[Fault] = ()

    def columns(self) -> list[str]:
        """The field names of all rows, in order of appearance."""
        return list(self._columns)

    @cached_property
    def _columns(self) -> dict[str, None]:
        return dict.fromkeys(name for _, row in self.rows for name in row)


def read_rows(path: str, *, split: str, subset: str, limit: int) -> SourceRows:
    """The rows of a file, a `save_to_disk` folder or a Hugging Face data set.

    `path` is a .jsonl, .json, .csv or .parquet file (.gz too), a folder or a hub id; `split` and
    `subset` choose within the latter two; `limit` keeps only the first rows, 0 keeps all.

    Raises: DataError when `path` does not exist or cannot be read.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return _read_folder(local, split, limit)
    if local.is_file():
        return _read_file(local, limit)
    if _format(local) is not None or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path):
        raise DataError(f"there is no file {path}{_nearest(local)}")
    return _read_hub(path, split, subset, limit)


def _format(path: Path) -> Callable[[str, bytes, int], SourceRows] | None:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {path.parent} either"
    names = sorted(sibling.name for sibling in path.parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=3)
    return (
        f"; did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""
    )


def _read_file(path: Path, limit: int) -> SourceRows:
    read = _format(path)
    if read is None:
        raise DataError(
            f"{path}: this kind of file is not supported; "
            "use .jsonl, .json, .csv or .parquet, plain or as .gz"
        )
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); check the file") from error
    return read(str(path), data, limit)


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; "
            "save the file as UTF-8"
        ) from error


class _Collector:
    """Collects the rows of a text file, up to the limit."""

    def __init__(self, name: str, unit: Unit, limit: int) -> None:
        self.name, self.unit, self.limit = name, unit, limit
        self.rows: list[tuple[int, Row]] = []
        self.unreadable: list[Fault] = []

    def full(self) -> bool:
        return 0 < self.limit <= len(self.rows) + len(self.unreadable)

    def add(self, number: int, row: object) -> None:
        if isinstance(row, dict):
            self.rows.append((number, row))
        else:
            self.reject(number, "is not a JSON object with fields")

    def reject(self, number: int, reason: str) -> None:
        self.unreadable.append(Fault(self.name, self.unit, number, "", "unreadable", reason))

    def finish(self) -> SourceRows:
        return SourceRows(self.name, self.unit, self.rows, self.unreadable)


def _read_json_lines(name: str, data: bytes, limit: int) -> SourceRows:
    found = _Collector(name, "line", limit)
    # str.splitlines would also split at U+2028, which may occur inside a JSON string.
    for number, line in enumerate(_decode(name, data).split("\n"), start=1):
        if found.full():
            break
        if not line.strip():
            continue
        try:
            found.add(number, json.loads(line))
        except (ValueError, RecursionError) as error:
            found.reject(number, f"not valid JSON ({_why(error)})")
    return found.finish()


def _read_json(name: str, data: bytes, limit: int) -> SourceRows:
    """One array of objects, also as the value of `data` in an object, or JSON lines."""
    text = _decode(name, data)
    array = _wrapped(text)
    if array is None and not text.lstrip().startswith("["):
        return _read_json_lines(name, data, limit)
    try:
        array = json.loads(text) if array is None else array
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{name}{line}: not valid JSON ({_why(error)})") from error
    found = _Collector(name, "row", limit)
    for number, row in enumerate(array[: limit or None], start=1):
        found.add(number, row)
    return found.finish()


def _wrapped(text: str) -> list[Any] | None:
    """The rows of a file that is one object, around them or alone; None if it is anything else."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):  # JSON lines, or damaged
        return None
    lists = [found[key] for key in _WRAPPERS if isinstance(found.get(key), list)]
    return lists[0] if len(lists) == 1 else [found]


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)


def _read_csv(name: str, data: bytes, limit: int) -> SourceRows:
    """Every cell stays text: "NA" and "001" are what the author wrote."""
    found = _Collector(name, "line", limit)
    records = _csv_records(name, _decode(name, data))
    _, header = next(records, (1, []))
    if len(set(header)) < len(header):
        raise DataError(f"{name}, line 1: a column name occurs twice in the header; rename one")
    for number, cells in records:
        if found.full():
            break
        if len(cells) == len(header):
            found.add(number, dict(zip(header, cells, strict=True)))
        else:
            found.reject(number, f"has {len(cells)} cells, but the header has {len(header)}")
    return found.finish()


def _csv_records(name: str, text: str) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line on which it begins, since a quoted cell may span lines."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begins = 1
    with _long_cells():
        try:
            for cells in reader:
                if cells:
                    yield begins, cells
                begins = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{name}, line {begins}: not valid CSV ({error}); check the quotes of this record"
            ) from error


@contextmanager
def _long_cells() -> Iterator[None]:
    """Allow cells of any length; the default limit of `csv` is 128 KiB."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(name: str, data: bytes, limit: int) -> SourceRows:
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name}: not a Parquet file ({_first_line(error)})") from error
    return _numbered(name, table.slice(0, limit or None).to_pylist())


def _read_folder(path: Path, split: str, limit: int) -> SourceRows:
    import datasets  # takes half a second

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is a folder that was not written by save_to_disk; "
            "name a file in it, or save the data set with Dataset.save_to_disk"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        splits = list(loaded)
        dataset = loaded.get(split)
    else:
        splits = [str(loaded.split or "train")]
        dataset = loaded if split in splits else None
    if dataset is None:
        raise DataError(f"{path} has no split '{split}'; it has: {', '.join(splits)}")
    return _from_dataset(f"{path} ({split})", dataset, limit)


def _read_hub(path: str, split: str, subset: str, limit: int) -> SourceRows:
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(path, subset or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"'{path}' is not a local file or folder, and cannot be loaded from the Hugging Face "
            f"hub ({_first_line(error)}); check the name, the split '{split}' and the subset, and "
            "that this machine reaches the hub or has the data set in its cache"
        ) from error
    return _from_dataset(f"{path} ({split})", dataset, limit)


def _from_dataset(name: str, dataset: Any, limit: int) -> SourceRows:
    count = min(limit or len(dataset), len(dataset))
    return _numbered(name, dataset.select(range(count)).to_list())


def _numbered(name: str, rows: Sequence[Row]) -> SourceRows:
    return SourceRows(name, "row", list(enumerate(rows, start=1)))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


_FORMATS = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

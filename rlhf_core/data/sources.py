"""Read files, folders and hub data sets as numbered rows.

This module knows file formats, not what a row means. Nothing is unpickled, and code shipped with a
data set never runs. A file is read up to a limit, and what cannot be read is a DataError or a fault
of its row.
"""

import csv
import difflib
import io
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

from rlhf_core.data.columnar import DamagedError, read_columnar, reread_columnar
from rlhf_core.errors import DataError, printable
from rlhf_core.reading import MIB, UnreadableError, exists, expanded, file_size, opened, read_whole

Row = dict[str, Any]
# Keys around the rows of a file.
_WRAPPERS = ("data", "rows", "examples", "instances", "records", "items", "entries", "samples")
Unit = Literal["line", "row"]

REREAD_FROM = 32 * MIB  # smaller files are kept in memory
LONGEST_ROW = 64 * MIB  # of a .jsonl file, which is read line by line
LARGEST_TEXT = 2_048 * MIB  # a .json file, which is read in one piece, or a line of a .csv file
DEEPEST = 100  # lists and objects within each other


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
        return printable(
            f"{where}, field '{self.field}': {self.reason}"
            if self.field
            else f"{where}: {self.reason}"
        )


class Reread(Sequence[tuple[int, Row]]):
    """Rows that are read from their file each time that they are looked at, never all at once."""

    def __init__(self, read: Callable[[], Iterator[tuple[int, Row]]], length: int = -1) -> None:
        self.read = read
        self._length = length

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        try:
            yield from self.read()
        except (UnreadableError, DamagedError) as error:
            raise DataError(
                f"the data have changed while they were read ({error}); leave their file as it is, "
                "and start again"
            ) from error

    def __len__(self) -> int:
        if self._length < 0:
            self._length = sum(1 for _ in self.read())
        return self._length

    @overload
    def __getitem__(self, place: int) -> tuple[int, Row]: ...
    @overload
    def __getitem__(self, place: slice) -> list[tuple[int, Row]]: ...
    def __getitem__(self, place: int | slice) -> Any:
        """Rows by their place, read from the beginning."""
        if isinstance(place, slice):
            return list(islice(self.read(), *place.indices(len(self))))
        found = next(islice(self.read(), place, None), None) if place >= 0 else None
        if found is None:
            raise IndexError(place)
        return found


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source, and the lines that could not be read.

    Rows are numbered by the line on which they begin, or by row if the format has no lines.
    """

    source: str
    unit: Unit
    rows: Sequence[tuple[int, Row]]
    unreadable: Sequence[Fault] = ()

    def mapped(self, change: Callable[[int, Row], Iterable[tuple[int, Row]]]) -> "SourceRows":
        """The source with other rows in place of each; rows that are read as they are needed stay
        so."""
        if isinstance(self.rows, Reread):
            read = self.rows.read
            changed: Sequence[tuple[int, Row]] = Reread(
                lambda: (new for n, row in read() for new in change(n, row))
            )
        else:
            changed = [new for n, row in self.rows for new in change(n, row)]
        return replace(self, rows=changed)

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
    try:
        local = expanded(path)
    except UnreadableError as error:
        raise DataError(f"the path of the data, {path!r}, {error}; check it") from error
    if exists(local):
        try:
            if local.is_dir():
                return _read_folder(local, split, limit)
            return _read_file(local, limit)
        except (UnreadableError, DamagedError) as error:
            raise DataError(f"{local}: {error}; check the file, or write it again") from error
    if not _is_hub_id(local, path):
        raise DataError(f"there is no file {path}{_nearest(local)}")
    return _read_hub(path, split, subset, limit)


def reread_rows(path: str, *, split: str, subset: str, limit: int) -> SourceRows:
    """As `read_rows`, for a source that need not fit in memory: the rows of a large .jsonl, .csv or
    .parquet file, plain or as .gz, of a `save_to_disk` folder and of a hub data set are read each
    time that they are looked at. A .json file is read in one piece.

    Raises: DataError when `path` does not exist or cannot be read.
    """
    try:
        local = expanded(path)
    except UnreadableError:
        return read_rows(path, split=split, subset=subset, limit=limit)  # says what is wrong
    try:
        if exists(local):
            large = size_of(path) >= REREAD_FROM
            if large and local.is_dir():
                return _read_folder(local, split, limit, again=True)
            if large and (read := _AGAIN.get(_format(local) or read_rows)):
                file_size(local)
                return read(local, limit)
        elif _is_hub_id(local, path):
            return _read_hub(path, split, subset, limit, again=True)
    except (UnreadableError, DamagedError) as error:
        raise DataError(f"{path}: {error}; check the file, or write it again") from error
    return read_rows(path, split=split, subset=subset, limit=limit)


def _is_hub_id(local: Path, path: str) -> bool:
    return _format(local) is None and bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path))


def size_of(path: str, limit: int = 0) -> int:
    """About how many bytes of text the first `limit` rows of a source have, 0 = all of them; 0 when
    nobody knows before it is read, as of a hub data set."""
    try:
        local = expanded(path)
    except UnreadableError:
        return 0
    if not exists(local):
        return 0
    files = [*local.glob("*.arrow"), *local.glob("*/*.arrow")] if local.is_dir() else [local]
    size = sum(file.stat().st_size * _unpacked(file) for file in files)
    return min(size, limit * _LARGE_ROW) if limit else size


def _unpacked(path: Path) -> int:
    """By how much a file is larger as text, about."""
    packed = 5 if path.suffix.lower() == ".gz" else 1
    return packed * (3 if _format(path) is _read_parquet else 1)


def _format(path: Path) -> Callable[[Path, int], SourceRows] | None:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _nearest(path: Path) -> str:
    try:
        names = sorted(sibling.name for sibling in path.parent.iterdir())
    except FileNotFoundError:
        return f": there is no folder {path.parent} either"
    except OSError as error:
        return f": the folder {path.parent} cannot be read ({error.strerror})"
    close = difflib.get_close_matches(path.name, names, n=3)
    return (
        f"; did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""
    )


def _read_file(path: Path, limit: int) -> SourceRows:
    file_size(path)
    read = _format(path)
    if read is None:
        raise DataError(
            f"{path}: this kind of file is not supported; "
            "use .jsonl, .json, .csv or .parquet, plain or as .gz"
        )
    return read(path, limit)


def _text(path: Path) -> str:
    """A file that is read in one piece."""
    return _decode(path, read_whole(path, LARGEST_TEXT), 1)


def _decode(path: Path, data: bytes, line: int) -> str:
    """The text of a file from a line on."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; "
            "save the file as UTF-8"
        ) from error
    return text.removeprefix("\ufeff") if line == 1 else text


class _Collector:
    """Collects the rows of a text file, up to the limit."""

    def __init__(self, path: Path, unit: Unit, limit: int) -> None:
        self.name, self.unit, self.limit = str(path), unit, limit
        self.rows: list[tuple[int, Row]] = []
        self.unreadable: list[Fault] = []

    def full(self) -> bool:
        return 0 < self.limit <= len(self.rows) + len(self.unreadable)

    def add(self, number: int, row: object) -> None:
        if not isinstance(row, dict):
            self.reject(number, "is not a JSON object with fields")
        elif _deep(row):
            self.reject(number, f"has lists or objects more than {DEEPEST} deep in each other")
        else:
            self.rows.append((number, row))

    def reject(self, number: int, reason: str) -> None:
        self.unreadable.append(Fault(self.name, self.unit, number, "", "unreadable", reason))

    def finish(self) -> SourceRows:
        return SourceRows(self.name, self.unit, self.rows, self.unreadable)


def _deep(value: object) -> bool:
    """Whether something is nested so deeply that to print or copy it would fail."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [
            part
            for outer in level
            for part in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(part, dict | list)
        ]
        if not level:
            return False
    return True


def _read_json_lines(path: Path, limit: int) -> SourceRows:
    found = _Collector(path, "line", limit)
    for number, row, reason in _json_lines(path):
        if reason:
            found.reject(number, reason)
        else:
            found.add(number, row)
        if found.full():
            break
    return found.finish()


def _reread_json_lines(path: Path, limit: int) -> SourceRows:
    return _reread(path, limit, _json_lines)


def _reread_csv(path: Path, limit: int) -> SourceRows:
    return _reread(path, limit, _csv_rows)


def _reread(
    path: Path, limit: int, numbered: Callable[[Path], Iterator[tuple[int, Any, str]]]
) -> SourceRows:
    """The first time the lines are checked, then they are only read.

    Args:
        numbered: the number of each line or record, and its value or why it has none.
    """
    checked = _Collector(path, "line", limit)
    count = 0
    for number, row, reason in numbered(path):
        if reason:
            checked.reject(number, reason)
        else:
            checked.add(number, row)
            count += len(checked.rows)
            checked.rows.clear()
        if 0 < limit <= count + len(checked.unreadable):
            break
    bad = {fault.number for fault in checked.unreadable}

    def read() -> Iterator[tuple[int, Row]]:
        good = ((n, row) for n, row, _ in numbered(path) if n not in bad)
        return islice(good, count)

    return SourceRows(checked.name, "line", Reread(read, count), checked.unreadable)


def _json_lines(path: Path) -> Iterator[tuple[int, Any, str]]:
    """The number of each line that is not empty, and its value or why it has none."""
    with opened(path) as file:
        number = 0
        # str.splitlines would also split at U+2028, which may occur inside a JSON string.
        while data := file.readline(LONGEST_ROW + 1):
            number += 1
            if len(data) > LONGEST_ROW:
                raise DataError(
                    f"{path}, line {number}: is longer than {LONGEST_ROW // MIB} MiB; write one "
                    "row a line, or shorten it"
                )
            line = _decode(path, data.removesuffix(b"\n"), number)
            if not line.strip():
                continue
            try:
                yield number, json.loads(line), ""
            except (ValueError, RecursionError) as error:
                yield number, None, f"not valid JSON ({_why(error)})"


def _read_json(path: Path, limit: int) -> SourceRows:
    """One array of objects, also as the value of `data` in an object, or JSON lines."""
    with opened(path) as file:
        start = file.read(MIB).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith((b"[", b"{")) or _is_first_of_lines(start):
        return _read_json_lines(path, limit)
    text = _text(path)
    array = _wrapped(text)
    if array is None and not text.lstrip().startswith("["):
        return _read_json_lines(path, limit)
    try:
        array = json.loads(text) if array is None else array
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{line}: not valid JSON ({_why(error)})") from error
    found = _Collector(path, "row", limit)
    for number, row in enumerate(array[: limit or None], start=1):
        found.add(number, row)
    return found.finish()


def _is_first_of_lines(start: bytes) -> bool:
    """Whether a file begins with a line that is an object, and goes on."""
    line, _, rest = start.partition(b"\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


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


def _read_csv(path: Path, limit: int) -> SourceRows:
    found = _Collector(path, "line", limit)
    for number, row, reason in _csv_rows(path):
        if found.full():
            break
        if reason:
            found.reject(number, reason)
        else:
            found.add(number, row)
    return found.finish()


def _csv_rows(path: Path) -> Iterator[tuple[int, Row, str]]:
    """The number of the line of each record, and its cells by column or why it has none. Every cell
    stays text: "NA" and "001" are what the author wrote."""
    records = _csv_records(path)
    _, header = next(records, (1, []))
    if len(set(header)) < len(header):
        raise DataError(f"{path}, line 1: a column name occurs twice in the header; rename one")
    for number, cells in records:
        if len(cells) == len(header):
            yield number, dict(zip(header, cells, strict=True)), ""
        else:
            yield number, {}, f"has {len(cells)} cells, but the header has {len(header)}"


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line on which it begins, since a quoted cell may span lines."""
    reader = csv.reader(_text_lines(path), strict=True)
    begins = 1
    while True:
        try:
            with _long_cells():  # not while somebody else has the record
                cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {begins}: not valid CSV ({error}); check the quotes of this record"
            ) from error
        if cells is None:
            return
        if cells:
            yield begins, cells
        begins = reader.line_num + 1


def _text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file with their ends, which may be those of any system."""
    with opened(path) as file:
        number = 1
        while data := file.readline(LARGEST_TEXT + 1):
            if len(data) > LARGEST_TEXT:
                raise DataError(
                    f"{path}, line {number}: is longer than {LARGEST_TEXT // MIB:,} MiB, which is "
                    "too much to read"
                )
            line = _decode(path, data, number)
            number += 1
            if "\r" in line:
                yield from io.StringIO(line, newline="")
            else:
                yield line


@contextmanager
def _long_cells() -> Iterator[None]:
    """Allow cells of any length; the default limit of `csv` is 128 KiB."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path, limit: int) -> SourceRows:
    if path.suffix.lower() != ".gz":
        return _columnar(str(path), [path], limit)
    with tempfile.NamedTemporaryFile(suffix=".parquet") as unpacked:
        unpacked.write(read_whole(path, LARGEST_TEXT))
        unpacked.flush()
        return _columnar(str(path), [Path(unpacked.name)], limit)


def _reread_parquet(path: Path, limit: int) -> SourceRows:
    if path.suffix.lower() != ".gz":
        return _columnar_again(str(path), [path], limit)
    unpacked = tempfile.NamedTemporaryFile(suffix=".parquet")  # noqa: SIM115, as long as the rows
    with opened(path) as file:
        shutil.copyfileobj(file, unpacked, MIB)
    unpacked.flush()
    return _columnar_again(str(path), [Path(unpacked.name)], limit, held=unpacked)


def _columnar_again(
    name: str, files: Sequence[Path], limit: int, held: object = None
) -> SourceRows:
    """As `_columnar`, but the rows are read each time; `held` lives as long as they can be."""
    read, faults, count = reread_columnar(files, limit)

    def rows(_: object = held) -> Iterator[tuple[int, Row]]:
        return ((number + 1, row) for number, row in read())

    return SourceRows(name, "row", Reread(rows, count), _unreadable(name, faults))


def _columnar(name: str, files: Sequence[Path], limit: int) -> SourceRows:
    rows, bad = read_columnar(files, limit)
    return SourceRows(
        name, "row", [(number + 1, row) for number, row in rows], _unreadable(name, bad)
    )


def _unreadable(name: str, bad: Iterable[tuple[int, str, str]]) -> list[Fault]:
    return [Fault(name, "row", n + 1, field, "unreadable", reason) for n, field, reason in bad]


_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_LARGEST_NOTE = 64 * MIB
_LARGE_ROW = 16 * 1024  # bytes
_HUB_ROWS = 10_000  # read at once


def _read_folder(path: Path, split: str, limit: int, *, again: bool = False) -> SourceRows:
    """A `save_to_disk` folder, without the package datasets, which trusts every byte of it.

    Args:
        again: whether the rows are read each time that they are looked at.
    """
    state = path / _STATE
    if state.is_file():
        splits, folder = [str(_note(state).get("_split") or "train")], path
    elif (path / _SPLITS).is_file():
        listed = _note(path / _SPLITS).get("splits")
        if not isinstance(listed, list) or not all(map(_plain_name, listed)):
            raise DataError(f"{path / _SPLITS} is damaged: it lists no splits; save it again")
        splits, folder = listed, path / split
    else:
        raise DataError(
            f"{path} is a folder that was not written by save_to_disk; "
            "name a file in it, or save the data set with Dataset.save_to_disk"
        )
    if split not in splits:
        raise DataError(f"{path} has no split '{split}'; it has: {', '.join(splits)}")
    read = _columnar_again if again else _columnar
    found = read(f"{path} ({split})", _arrow_files(folder), limit)
    return _with_json_columns(found, folder)


def _note(path: Path) -> dict[str, Any]:
    """One of the JSON files beside the data."""
    try:
        note = json.loads(read_whole(path, _LARGEST_NOTE))
        if isinstance(note, dict):
            return note
        reason = "it is not an object"
    except FileNotFoundError:
        reason = "it is missing"
    except UnreadableError as error:
        reason = f"it {error}"
    except (ValueError, RecursionError) as error:
        reason = _why(error)
    raise DataError(f"{path} is damaged ({reason}); save the data set again") from None


def _plain_name(name: object) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"\w[^/\0]*", name))


def _arrow_files(folder: Path) -> list[Path]:
    listed = _note(folder / _STATE).get("_data_files")
    files = listed if isinstance(listed, list) else [None]
    names = [file.get("filename") if isinstance(file, dict) else None for file in files]
    if not all(map(_plain_name, names)):
        raise DataError(
            f"{folder / _STATE} is damaged: its _data_files are not files of this folder; save the "
            "data set again"
        )
    paths = [folder / str(name) for name in names]
    for path in paths:
        try:
            file_size(path)
        except FileNotFoundError:
            raise DataError(
                f"{folder} is incomplete: {path.name} is missing; copy or save the data set again"
            ) from None
        except UnreadableError as error:
            raise DataError(f"{path} {error}; copy or save the data set again") from error
    return paths


def _with_json_columns(found: SourceRows, folder: Path) -> SourceRows:
    """The rows, with the values of columns that the package datasets stores as JSON."""
    features = _note(folder / _INFO).get("features")
    if '"Json"' not in json.dumps(features):
        return found
    from datasets import Features  # takes half a second
    from datasets.utils.json import get_json_field_paths_from_feature, json_decode_field

    try:
        places = list(get_json_field_paths_from_feature(Features.from_dict(features)))
    except Exception as error:  # a damaged note can lead these functions anywhere
        raise _unfit(folder, error) from error

    def decoded(number: int, row: Row) -> list[tuple[int, Row]]:
        try:
            for column, *inner in places:
                row[column] = json_decode_field(row[column], inner)
        except Exception as error:
            raise _unfit(folder, error) from error
        return [(number, row)]

    return found.mapped(decoded)


def _unfit(folder: Path, error: Exception) -> DataError:
    return DataError(
        f"{folder / _INFO} does not fit the data ({_first_line(error)}); save the data set again"
    )


def _read_hub(path: str, split: str, subset: str, limit: int, *, again: bool = False) -> SourceRows:
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
    return _from_dataset(f"{path} ({split})", dataset, limit, again=again)


def _from_dataset(name: str, dataset: Any, limit: int, *, again: bool = False) -> SourceRows:
    count = min(limit or len(dataset), len(dataset))

    def read() -> Iterator[tuple[int, Row]]:
        try:
            for start in range(0, count, _HUB_ROWS):
                part = dataset.select(range(start, min(start + _HUB_ROWS, count)))
                yield from enumerate(part.to_list(), start=start + 1)
        except Exception as error:  # a value that Python cannot hold, such as a date after 9999
            raise DataError(
                f"{name}: a value cannot be read ({_first_line(error)}); use another data set, or "
                "save the columns that you need"
            ) from error

    if again and count > _HUB_ROWS:
        return SourceRows(name, "row", Reread(read, count))
    return SourceRows(name, "row", list(read()))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


_FORMATS = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
# Of these, large files are read each time that somebody looks at their rows.
_AGAIN: dict[object, Callable[[Path, int], SourceRows]] = {
    _read_json_lines: _reread_json_lines,
    _read_csv: _reread_csv,
    _read_parquet: _reread_parquet,
}

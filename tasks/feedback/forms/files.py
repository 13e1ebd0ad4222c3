"""Writing rows to a file: whole or not at all, and never over another one unless told so."""

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_core.data.sources import Row
from rlhf_core.errors import DataError, UserError

BATCH = 2000  # rows of Parquet that are held in memory
Write = Callable[[Path, Iterable[Row]], int]


def checked(path: str, suffixes: tuple[str, ...], *, force: bool) -> Path:
    """The path of a file that may be written.

    Raises: DataError when its name ends otherwise; UserError when it is there or its folder is not.
    """
    found = Path(path).expanduser()
    if not any(found.name.lower().endswith(suffix) for suffix in suffixes):
        raise DataError(
            f"{path}: this form is written to {', '.join(suffixes)}; let the name end with one"
        )
    if found.is_dir() or not found.parent.is_dir():
        what = "is a folder" if found.is_dir() else f"is in no folder: there is no {found.parent}"
        raise UserError(f"{path} {what}; name a file in a folder that is there.")
    if found.exists() and not force:
        raise UserError(f"{path} is there already; --force replaces it, or name another file.")
    return found


def write(path: Path, rows: Iterable[Row], schema: pa.Schema, flat: Callable[[Row], Row]) -> int:
    """Write rows as JSON lines, JSON or Parquet, by the end of the name.

    Args:
        flat: a row for Parquet, whose columns are those of `schema`.

    Returns: the number of rows.

    Raises: UserError when the file cannot be written; what was there before stays.
    """
    name = path.name.lower()
    with _replacing(path) as part:
        if name.endswith(".parquet"):
            return _parquet(part, map(flat, rows), schema)
        with _text(part, packed=name.endswith(".gz")) as file:
            if name.removesuffix(".gz").endswith(".json"):
                return _json(file, rows)
            return _lines(file, rows)


def write_text(path: Path, text: str) -> None:
    """Write a small file in the same way."""
    with _replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside, which takes the place of the other when the block ends."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}).") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _text(path: Path, *, packed: bool) -> Iterator[IO[str]]:
    if packed:
        with gzip.open(path, "wt", encoding="utf-8", newline="\n") as file:
            yield file
    else:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            yield file


def _lines(file: IO[str], rows: Iterable[Row]) -> int:
    count = 0
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        count += 1
    return count


def _json(file: IO[str], rows: Iterable[Row]) -> int:
    count = 0
    file.write("[")
    for row in rows:
        file.write(",\n" if count else "\n")
        file.write(json.dumps(row, ensure_ascii=False))
        count += 1
    file.write("\n]\n")
    return count


def _parquet(path: Path, rows: Iterator[Row], schema: pa.Schema) -> int:
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        while batch := list(islice(rows, BATCH)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            count += len(batch)
    return count

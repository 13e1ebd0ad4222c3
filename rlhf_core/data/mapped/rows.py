"""The rows of a prepared table, each read from its file when somebody asks for it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from rlhf_core.data.prepared import Split, table_file, to_columns
from rlhf_core.digests import content_digest
from rlhf_core.settings.fields import TableKind

Row = dict[str, Any]
_BLOCK = 1 << 24  # bytes that are searched for ends of lines at once


class PreparedRows(Sequence[Row]):
    """The rows of one prepared table, in order; 8 bytes of memory a row.

    Votes prepared by version 0.1.0 are converted, as `read_table` does.

    Raises: DataError when the directory does not have the table.
    """

    def __init__(self, directory: Path, kind: TableKind, split: Split) -> None:
        self.path = table_file(directory, kind, split)
        self._kind = kind
        self._starts = _starts(self.path)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __iter__(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            for line in file:
                yield self._row(line)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return self.pick(range(*place.indices(len(self))))
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self.pick([place % len(self)])[0]

    def pick(self, places: Sequence[int]) -> list[Row]:
        """Some of the rows."""
        found = []
        with self.path.open("rb") as file:
            for place in places:
                file.seek(int(self._starts[place]))
                found.append(self._row(file.readline()))
        return found

    def digest(self) -> str:
        """SHA-256 of the file."""
        return content_digest([self.path])

    def _row(self, line: bytes) -> Row:
        return to_columns(json.loads(line), self._kind)


class Field(Sequence[Any]):
    """One field of all rows, read when somebody asks for it."""

    def __init__(self, rows: PreparedRows, name: str) -> None:
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Any]:
        return (row[self._name] for row in self._rows)

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> list[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        found = self._rows[place]
        return [row[self._name] for row in found] if isinstance(found, list) else found[self._name]


def _starts(path: Path) -> np.ndarray:
    """(N + 1,) where each line of a file starts, and where the last one ends (bytes)."""
    found, read = [np.zeros(1, dtype=np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n"))
            found.append(ends + (read + 1))
            read += len(block)
    starts = np.concatenate(found)
    return starts if starts[-1] == read else np.append(starts, read)  # without a last end of line

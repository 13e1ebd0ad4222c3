"""Token ids of many texts in one memory-mapped array: 4 bytes a token, shared by all processes.

    ids.bin        int32, the tokens of all texts one after the other
    offsets.bin    int64, where each text starts, and where the last one ends
    facts.bin      a record for each row, of which a stage says what it holds
    names.json     the values of facts that are numbers of names

A row consists of the same number of texts, such as prompt, chosen and rejected answer.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

_IDS, _OFFSETS, _FACTS, _NAMES = "ids.bin", "offsets.bin", "facts.bin", "names.json"


class TextWriter:
    """Writes the files, a few rows at a time."""

    def __init__(self, folder: Path, facts: np.dtype) -> None:
        self._folder, self._dtype = folder, facts
        self._files: dict[str, IO[bytes]] = {}
        self._end = 0
        self._names: dict[str, dict[str, int]] = {}

    def __enter__(self) -> Self:
        self._files = {n: (self._folder / n).open("wb") for n in (_IDS, _OFFSETS, _FACTS)}
        self._files[_OFFSETS].write(np.zeros(1, dtype=np.int64).tobytes())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()
        if error is None:
            names = {field: list(known) for field, known in self._names.items()}
            (self._folder / _NAMES).write_text(json.dumps(names), encoding="utf-8")

    def number(self, field: str, name: str) -> int:
        """The number of a name, for the facts."""
        known = self._names.setdefault(field, {})
        return known.setdefault(name, len(known))

    def write(self, texts: Iterable[Sequence[int]], facts: Sequence[tuple[Any, ...]]) -> None:
        """Append the texts of some rows, row by row, and a record for each row."""
        parts = [np.asarray(ids, dtype=np.int32) for ids in texts]
        if not parts:
            return
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64) + self._end
        self._end = int(ends[-1])
        self._files[_IDS].write(np.concatenate(parts).tobytes())
        self._files[_OFFSETS].write(ends.tobytes())
        self._files[_FACTS].write(np.array(list(facts), dtype=self._dtype).tobytes())


class Texts(Sequence[list[int]]):
    """The texts of some files, and `facts`, the records of their rows."""

    def __init__(self, folder: Path, facts: np.dtype) -> None:
        self._ids = _mapped(folder / _IDS, np.dtype(np.int32))
        self._offsets = _mapped(folder / _OFFSETS, np.dtype(np.int64))
        self.facts = _mapped(folder / _FACTS, facts)
        self.names: Mapping[str, list[str]] = json.loads(
            (folder / _NAMES).read_text(encoding="utf-8")
        )

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self._ids[self._offsets[place] : self._offsets[place + 1]].tolist()

    def lengths(self) -> np.ndarray:
        """(len,) tokens of each text."""
        return np.diff(self._offsets)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)

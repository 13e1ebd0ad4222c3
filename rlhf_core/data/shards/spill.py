"""Parsed rows, by the shard of their prompt.

Everything that preparation compares is on one prompt: duplicates, contradictions, the side of the
split, prompts on both sides. So rows are put into shards by a hash of the prompt key, and each
shard is prepared as if it were all there is. Beyond one shard they wait on disk.
"""

import hashlib
import pickle
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from rlhf_core.data.assembly import ORDER, PART
from rlhf_core.data.origins.counts import ORIGIN
from rlhf_core.data.prepared import COLUMNS, prompt_key
from rlhf_core.settings.fields import TableKind

Row: TypeAlias = dict[str, Any]
Frames: TypeAlias = dict[TableKind, dict[str, pd.DataFrame]]
SHARD = 64 * 2**20  # bytes of the source that a shard has, about
_HELD = 10_000  # rows in memory before they are written


class Spill:
    """Rows of all tables, put in one after the other and taken out shard by shard.

    Args:
        folder: for the shards; of one shard the rows are kept in memory.
    """

    def __init__(self, folder: Path, shards: int) -> None:
        self.shards = shards
        self._folder = folder
        self._held: dict[int, list[tuple[TableKind, str, Row]]] = defaultdict(list)
        self._count = 0
        self._columns: dict[TableKind, dict[str, list[str]]] = {}

    def begin(self, kind: TableKind, split: str, more: Sequence[str]) -> None:
        """Announce a source of a table, also one that may have no rows, and its own columns."""
        columns = [*COLUMNS[kind], "ballot", *more, ORIGIN, ORDER]
        self._columns.setdefault(kind, {})[split] = columns

    def add(self, kind: TableKind, split: str, row: Mapping[str, Any], number: int) -> None:
        """Put in a row that is the `number`-th of its source."""
        columns = self._columns[kind][split]
        part = list(self._columns[kind]).index(split)
        kept = {name: row[name] for name in columns if name in row}
        kept[ORDER] = part * PART + number
        self._held[shard_of(row["prompt"], self.shards)].append((kind, split, kept))
        self._count += 1
        if self.shards > 1 and self._count >= _HELD:
            self._write()

    def take(self, shard: int) -> Frames:
        """The rows of a shard, which are gone then: a frame for each source of each table."""
        if self.shards > 1:
            self._write()
        rows = list(self._read(shard))
        return {
            kind: {
                split: pd.DataFrame(
                    [row for k, s, row in rows if (k, s) == (kind, split)],
                    columns=columns,
                    dtype=object,
                ).astype({ORDER: "int64"})
                for split, columns in parts.items()
            }
            for kind, parts in self._columns.items()
        }

    def _read(self, shard: int) -> Iterator[tuple[TableKind, str, Row]]:
        yield from self._held.pop(shard, [])
        path = self._path(shard)
        if not path.exists():
            return
        with path.open("rb") as file:
            while True:
                try:
                    yield from pickle.load(file)  # written by this process
                except EOFError:
                    break
        path.unlink()

    def _write(self) -> None:
        for shard, rows in self._held.items():
            with self._path(shard).open("ab") as file:
                pickle.dump(rows, file, protocol=pickle.HIGHEST_PROTOCOL)
        self._held.clear()
        self._count = 0

    def _path(self, shard: int) -> Path:
        return self._folder / f"rows.{shard}.pickle"


def shard_of(prompt: Any, shards: int) -> int:
    """The shard of a prompt; the same for all prompts that ask the same."""
    if shards == 1:
        return 0
    key = f"shard\0{prompt_key(prompt)}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % shards


def shards_for(size: int) -> int:
    """How many shards data of a size (bytes, unpacked) are prepared in."""
    return max(1, -(-size // SHARD))

"""The prepared tables of shards, merged by the order of their rows in the source."""

import pickle
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd

from rlhf_core.data.assembly import ORDER, CleanTables
from rlhf_core.data.prepared import SPLITS, Split, table_lines, table_path
from rlhf_core.settings.fields import TABLE_KINDS, TableKind


class Parts:
    """The lines of all tables of some shards, in files of their own until they are merged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._orders: dict[tuple[TableKind, Split], list[np.ndarray]] = {}

    def write(self, shard: int, tables: CleanTables) -> None:
        """Write the tables of a shard; shards come in order."""
        for kind, table in tables.items():
            for split in SPLITS:
                frame = table.side(split).sort_values(ORDER, kind="stable")
                self._orders.setdefault((kind, split), []).append(_numbers(frame))
                with self._path(kind, split, shard).open("w", encoding="utf-8", newline="\n") as f:
                    f.writelines(table_lines(frame, kind))

    def merge(self, to: Path) -> None:
        """Write the tables into a folder; the parts are gone then."""
        for kind in TABLE_KINDS:
            for split in SPLITS:
                orders = self._orders[kind, split]
                parts = [self._path(kind, split, shard) for shard in range(len(orders))]
                target = table_path(to, kind, split)
                if len(parts) == 1:
                    parts[0].replace(target)
                    continue
                with ExitStack() as stack, target.open("wb") as file:
                    opened = [stack.enter_context(part.open("rb")) for part in parts]
                    file.writelines(opened[shard].readline() for shard in _turns(orders))
                for part in parts:
                    part.unlink()

    def _path(self, kind: TableKind, split: Split, shard: int) -> Path:
        return self._folder / f"{kind}.{split}.{shard}.part"


class Shelf:
    """The tables of shards, kept until they are measured; beyond one shard, on disk."""

    def __init__(self, folder: Path, shards: int) -> None:
        self._folder, self._shards = folder, shards
        self._only: CleanTables = {}

    def put(self, shard: int, tables: CleanTables) -> None:
        """Keep the tables of a shard."""
        if self._shards == 1:
            self._only = tables
            return
        with self._path(shard).open("wb") as file:
            pickle.dump(tables, file, protocol=pickle.HIGHEST_PROTOCOL)

    def take(self, shard: int) -> CleanTables:
        """The tables of a shard, which are gone then."""
        if self._shards == 1:
            return self._only
        with self._path(shard).open("rb") as file:
            tables: CleanTables = pickle.load(file)  # written by this process
        self._path(shard).unlink()
        return tables

    def _path(self, shard: int) -> Path:
        return self._folder / f"tables.{shard}.pickle"


def _numbers(frame: pd.DataFrame) -> np.ndarray:
    return frame[ORDER].to_numpy(dtype=np.int64)


def _turns(orders: list[np.ndarray]) -> Iterator[int]:
    """The shard of each row of the merged table."""
    shards = np.repeat(np.arange(len(orders)), [len(order) for order in orders])
    return iter(shards[np.argsort(np.concatenate(orders), kind="stable")].tolist())

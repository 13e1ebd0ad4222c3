"""Arrow streams and Parquet files as rows, whatever their bytes say.

The readers of Arrow trust a file: one wrong bit may crash the process, and a few bytes may ask for
all its memory. So the files are first read by a process of their own, which this module is too,
with limits; what survived there is read here in the same way. It imports nothing of ours, because
that process runs it by its path.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MIB = 2**20
BATCH = 200  # rows
# For files of a few bytes; both grow with the size of the files.
MEMORY, SECONDS = 1_024 * MIB, 6
UNPACKED_RATIO, UNPACKED_ANYWAY = 100, 256 * MIB
CELL = 64  # bytes of an empty Python object

Row = dict[str, Any]
Bad = tuple[int, str, str]  # number of a row from 0, field, reason


class DamagedError(ValueError):
    """The files cannot be read; the message continues their name."""


def read_columnar(paths: Sequence[Path], limit: int) -> tuple[list[tuple[int, Row]], list[Bad]]:
    """The numbered rows of Parquet files or Arrow streams (.arrow), and cells that are no value.

    Numbers are counted from 0 through all files. A row with a bad cell is left out. `limit` keeps
    only the first rows, 0 keeps all.

    Raises: DamagedError.
    """
    _rehearse(paths, limit)
    rows: list[tuple[int, Row]] = []
    bad: list[Bad] = []
    for good, wrong in _good(paths, limit):
        rows += good
        bad += wrong
    return rows, bad


def reread_columnar(
    paths: Sequence[Path], limit: int
) -> tuple[Callable[[], Iterator[tuple[int, Row]]], list[Bad], int]:
    """As `read_columnar`, but with a function that reads the rows by batches, and their number."""
    _rehearse(paths, limit)
    bad: list[Bad] = []
    count = 0
    for rows, wrong in _good(paths, limit):
        count += len(rows)
        bad += wrong
    return lambda: (row for rows, _ in _good(paths, limit) for row in rows), bad, count


def _good(paths: Sequence[Path], limit: int) -> Iterator[tuple[list[tuple[int, Row]], list[Bad]]]:
    """The good rows of each batch, and its bad cells."""
    try:
        for first, batch in _batches(paths, limit):
            found, wrong = _rows(batch)
            faulty = {number for number, _, _ in wrong}
            rows = [(first + n, row) for n, row in enumerate(found) if n not in faulty]
            yield rows, [(first + number, field, reason) for number, field, reason in wrong]
    except (ValueError, pa.ArrowException, OSError) as error:  # the file has just changed
        raise DamagedError(_why(error)) from error


def _rehearse(paths: Sequence[Path], limit: int) -> None:
    """Read the files in a process of their own."""
    megabytes = sum(path.stat().st_size for path in paths) // MIB
    cpu = SECONDS + megabytes
    job = {"paths": [str(path.absolute()) for path in paths], "limit": limit, "cpu": cpu}
    job["memory"] = MEMORY + 8 * MIB * megabytes
    try:
        done = subprocess.run(
            [sys.executable, "-I", __file__],
            input=json.dumps(job).encode(),
            capture_output=True,
            timeout=min(60 + 10 * cpu, 86_400),  # on a machine that is busy
            env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"},  # others reserve in advance
        )
    except subprocess.TimeoutExpired:
        raise DamagedError("takes too long to read, so it is damaged") from None
    if done.returncode == -signal.SIGXCPU:
        raise DamagedError(f"takes more than {cpu} s to read, so it is damaged")
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip()
        raise DamagedError(said or "is damaged: reading it crashes the reader")


def _batches(paths: Sequence[Path], limit: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The batches of all files, each checked, with the number of its first row."""
    count = 0
    for path in paths:
        for batch in _batches_of(path):
            if 0 < limit <= count:
                return
            part = batch.slice(0, min(batch.num_rows, limit - count) if limit else batch.num_rows)
            _check(part, count)
            yield count, part
            count += part.num_rows


def _check(batch: pa.RecordBatch, first: int) -> None:
    """Raise ValueError when a column points outside its buffers; text that is not UTF-8 may pass.

    `first` is the number of the first row, from 0.
    """
    batch.validate()
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raw = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type)
            if raw is None:
                rows = f"rows {first + 1} to {first + len(batch)}"
                raise ValueError(f"is damaged (field '{name}', {rows}: {_why(error)})") from error
            column.view(raw).validate(full=True)


def _batches_of(path: Path) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".arrow":
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                for start in range(0, batch.num_rows, BATCH):
                    yield batch.slice(start, BATCH)
    else:
        try:
            parquet = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"not a Parquet file ({_why(error)})") from error
        with parquet as file:
            yield from file.iter_batches(BATCH, use_threads=False)


def _rows(batch: pa.RecordBatch) -> tuple[list[Row], list[Bad]]:
    names = batch.schema.names
    if len(set(names)) < len(names):
        raise pa.ArrowInvalid("a column name occurs twice; rename one")
    columns: dict[str, list[Any]] = {}
    bad: list[Bad] = []
    for name, column in zip(names, batch.columns, strict=True):
        columns[name], wrong = _values(column)
        bad += [(number, name, reason) for number, reason in wrong]
    rows = [{name: columns[name][n] for name in names} for n in range(batch.num_rows)]
    return rows, sorted(bad)


def _values(column: pa.Array) -> tuple[list[Any], list[tuple[int, str]]]:
    """The values of a column, and those that Python cannot hold: a date after the year 9999."""
    try:
        return column.to_pylist(), []
    except Exception:  # whatever the conversion of a type raises
        values, bad = [], []
        for number in range(len(column)):
            try:
                values.append(column[number].as_py())
            except Exception as error:
                values.append(None)
                bad.append((number, f"holds a {column.type} that cannot be read ({_why(error)})"))
        return values, bad


def _why(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _size(value: Any) -> int:
    """About what a value takes as a Python object (bytes)."""
    if isinstance(value, str | bytes):
        return CELL + len(value)
    if isinstance(value, dict):
        return CELL + sum(map(_size, value.values()))
    if isinstance(value, list | tuple):
        return CELL + sum(map(_size, value))
    return CELL // 2


def _address_space() -> int | None:
    """What this process has of it (bytes); None where the kernel does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    except OSError:
        return None
    return int(pages) * resource.getpagesize()


def _main() -> int:
    """The process of its own: the job is on standard input, the reason on standard output."""
    job = json.load(sys.stdin)
    pa.set_cpu_count(1)
    limits = {resource.RLIMIT_CPU: job["cpu"], resource.RLIMIT_CORE: 0}
    if (taken := _address_space()) is not None:
        limits[resource.RLIMIT_AS] = taken + job["memory"]
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (most if hard < 0 else min(most, hard), hard))
    paths = [Path(path) for path in job["paths"]]
    most = max(UNPACKED_ANYWAY, UNPACKED_RATIO * sum(path.stat().st_size for path in paths))
    try:
        for _, batch in _batches(paths, job["limit"]):
            rows, _ = _rows(batch)
            most -= sum(map(_size, rows))
            if most < 0:
                print(
                    f"unpacks to more than {UNPACKED_ANYWAY // MIB} MiB and {UNPACKED_RATIO} times "
                    "its size; set the limit of rows, or save it as .jsonl"
                )
                return 1
    except MemoryError:
        print(f"needs more than {job['memory'] // MIB:,} MiB of memory to read, so it is damaged")
        return 1
    except (pa.ArrowException, OSError) as error:
        print(f"is damaged ({_why(error)})")
        return 1
    except ValueError as error:
        print(_why(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())

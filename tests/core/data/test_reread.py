"""Large files are read again and again instead of kept: the same rows, in little memory."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_core.data import sources
from rlhf_core.data.formats import Parsing, parse
from rlhf_core.data.sources import Reread, read_rows, reread_rows
from rlhf_core.errors import DataError

ROWS = [
    {"prompt": f"P{n}", "response_a": "x", "response_b": "y", "vote": "ab"[n % 2], "gold": n == 3}
    for n in range(450)
]
WHERE = {"split": "", "subset": ""}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The same rows in all formats, all of them large."""
    monkeypatch.setattr(sources, "REREAD_FROM", 1)
    text = [json.dumps(row) for row in ROWS]
    text[7:7] = ["{", "[1]", ""]
    (tmp_path / "v.jsonl").write_text("\n".join(text))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "v.parquet", row_group_size=100)
    with (tmp_path / "v.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        for number, row in enumerate(ROWS):
            writer.writerow({**row, "response_a": "two\nlines" if number % 9 else 'a "quote", é'})
            file.write("\n" if number == 5 else "one,cell\r\n" if number == 7 else "")
    names = ["v.jsonl", "v.parquet", "v.csv"]
    for name in [*names]:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        names.append(f"{name}.gz")
    return [str(tmp_path / name) for name in names]


def test_a_saved_data_set_is_read_again_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "REREAD_FROM", 1)
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "set")
    where = {"split": "train", "subset": ""}
    for limit in (0, 7):
        again, kept = (
            read(str(tmp_path / "set"), **where, limit=limit) for read in (reread_rows, read_rows)
        )
        assert isinstance(again.rows, Reread)
        assert list(again.rows) == list(again.rows) == list(kept.rows)
        assert [row for _, row in kept.rows] == ROWS[: limit or None]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_may_have_the_ends_of_lines_of_any_system(tmp_path, end, mark):
    path = tmp_path / "v.csv"
    path.write_bytes(f'{mark}prompt,response{end}P,"a{end}b"{end}Q,c{end}x{end}'.encode())
    found = read_rows(str(path), **WHERE, limit=0)
    rows = [(2, {"prompt": "P", "response": f"a{end}b"}), (4, {"prompt": "Q", "response": "c"})]
    assert found.rows == rows
    assert [(fault.number, fault.reason) for fault in found.unreadable] == [
        (5, "has 1 cells, but the header has 2")
    ]


def test_csv_that_is_not_utf8_is_named_by_its_line(tmp_path):
    (tmp_path / "v.csv").write_bytes(b"prompt,response\nP,a\nQ,\xff\n")
    with pytest.raises(DataError, match="line 3: byte 0xff is not UTF-8"):
        read_rows(str(tmp_path / "v.csv"), **WHERE, limit=0)


@pytest.mark.parametrize("limit", [0, 1, 8, 200, 10_000])
def test_they_are_the_same_rows_and_faults(files, limit):
    for path in files:
        again, kept = (read(path, **WHERE, limit=limit) for read in (reread_rows, read_rows))
        assert isinstance(again.rows, Reread)
        assert list(again.rows) == list(again.rows) == list(kept.rows)
        assert len(again.rows) == len(kept.rows)
        assert (again.unreadable, again.unit) == (kept.unreadable, kept.unit)
        assert again.columns() == kept.columns()


def test_places_are_read_from_the_beginning(files):
    rows = reread_rows(files[1], **WHERE, limit=0).rows
    assert (rows[0], rows[449]) == ((1, ROWS[0]), (450, ROWS[449]))
    assert rows[2:4] == [(3, ROWS[2]), (4, ROWS[3])]
    with pytest.raises(IndexError):
        rows[450]


def test_they_are_parsed_alike(files):
    for path in files:
        again, kept = (
            parse(read(path, **WHERE, limit=0), "preferences", {})
            for read in (reread_rows, read_rows)
        )
        assert again.frame.equals(kept.frame)
        assert again.faults == kept.faults


def test_examples_may_be_read_twice(files):
    parsing = Parsing(reread_rows(files[0], **WHERE, limit=0), "preferences", {})
    first, second = list(parsing.examples()), list(parsing.examples())
    assert first == second
    assert len(parsing.faults) == 2
    assert first[0]["values"] == ROWS[0]


@pytest.mark.parametrize("name", ["v.parquet", "v.jsonl.gz"])
def test_a_file_that_changes_while_it_is_read_is_said(files, name):
    (path,) = (path for path in files if path.endswith(name))
    rows = reread_rows(path, **WHERE, limit=0).rows
    with Path(path).open("r+b") as file:
        file.truncate(200)
    with pytest.raises(DataError, match="have changed while they were read"):
        list(rows)


def test_small_files_are_kept(tmp_path):
    (tmp_path / "v.jsonl").write_text(json.dumps(ROWS[0]))
    assert isinstance(reread_rows(str(tmp_path / "v.jsonl"), **WHERE, limit=0).rows, list)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """A file of 40 MB, whose rows as objects take more, in a process that says what it took."""
    row = json.dumps({**ROWS[0], "response_a": "x" * 800})
    with (tmp_path / "v.jsonl").open("w") as file:
        for _ in range(45_000):
            file.write(row + "\n")
    script = (
        "import resource, sys\n"
        "from rlhf_core.data.formats import Parsing\n"
        "from rlhf_core.data.sources import reread_rows\n"
        "took = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = took()\n"
        "source = reread_rows(sys.argv[1], split='', subset='', limit=0)\n"
        "count = sum(1 for _ in Parsing(source, 'preferences', {}).examples())\n"
        "print(count, (took() - before) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(tmp_path / "v.jsonl")],
        capture_output=True,
        text=True,
        check=True,
        cwd=sources.Path(__file__).parents[3],
        env={"PYTHONPATH": str(sources.Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
    )
    count, megabytes = map(int, done.stdout.split())
    assert count == 45_000
    assert megabytes < 25

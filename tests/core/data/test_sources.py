"""Every format gives the same rows, each with the place where a person will look for it."""

import csv
import gzip
import json
import os
import subprocess
import sys

import datasets
import pandas as pd
import pytest

from rlhf_core.data.sources import read_rows
from rlhf_core.errors import DataError

ROWS = [{"prompt": "Why?", "response": "NA"}, {"prompt": "1\n2", "response": "é“”"}]


def read(path, split="train", limit=0):
    return read_rows(str(path), split=split, subset="", limit=limit)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error(path, **options):
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return str(caught.value)


JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
NOT_UTF8 = "byte 0x{} is not UTF-8; save the file as UTF-8"
UNKNOWN = (
    ": this kind of file is not supported; use .jsonl, .json, .csv or .parquet, plain or as .gz"
)
CSV = 'prompt,response\nWhy?,NA\n"1\n2",é“”\n'


@pytest.mark.parametrize(
    ("name", "content", "unit", "numbers"),
    [
        ("a.jsonl", JSON_LINES, "line", [1, 2]),
        ("a.JSONL", "\ufeff" + JSON_LINES.replace("\n", "\r\n"), "line", [1, 2]),
        ("a.json", JSON_LINES, "line", [1, 2]),
        ("a.json", json.dumps(ROWS, indent=2), "row", [1, 2]),
        ("a.json", json.dumps({"version": 1, "data": ROWS}), "row", [1, 2]),
        ("a.json", json.dumps({"rows": ROWS, "n": [1]}, indent=2), "row", [1, 2]),
        ("a.jsonl.gz", gzip.compress(JSON_LINES.encode(), mtime=0), "line", [1, 2]),
        ("a.csv", CSV, "line", [2, 3]),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0), "line", [2, 3]),
    ],
)
def test_text_formats_give_the_same_rows(tmp_path, name, content, unit, numbers):
    found = read(write(tmp_path / name, content))
    assert [row for _, row in found.rows] == ROWS
    assert [number for number, _ in found.rows] == numbers
    assert found.unit == unit
    assert found.source == str(tmp_path / name)
    assert not found.unreadable


def test_parquet_gives_the_same_rows_with_lists_and_nulls(tmp_path):
    rows = [
        {**ROWS[0], "votes": ["a", "b"], "margin": 0.5},
        {**ROWS[1], "votes": None, "margin": None},
    ]
    pd.DataFrame(rows).astype(object).to_parquet(tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert found.rows[0] == (1, rows[0])
    assert found.rows[1][1]["votes"] is None
    assert found.unit == "row"


@pytest.fixture
def saved(tmp_path):
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    parts = {"train": dataset, "test": dataset.select([1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    return tmp_path


def test_a_saved_data_set_gives_the_rows_of_its_split(saved):
    assert [row for _, row in read(saved / "one").rows] == ROWS
    assert [row for _, row in read(saved / "two").rows] == ROWS
    test = read(saved / "two", split="test")
    assert test.rows == [(1, ROWS[1])]
    assert test.source == f"{saved / 'two'} (test)"


def test_a_split_that_is_not_there_is_named_with_those_that_are(saved):
    assert error(saved / "two", split="dev") == (
        f"{saved / 'two'} has no split 'dev'; it has: train, test"
    )
    assert error(saved / "one", split="dev") == f"{saved / 'one'} has no split 'dev'; it has: train"


def test_blank_lines_count_and_separators_inside_a_text_do_not(tmp_path):
    # U+2028 is a line separator to str.splitlines, and a legal character of a JSON string.
    text = '\n{"prompt": "a\u2028b"}\n  \n\n{"prompt": "c"}'
    assert read(write(tmp_path / "a.jsonl", text)).rows == [
        (2, {"prompt": "a\u2028b"}),
        (5, {"prompt": "c"}),
    ]


def test_a_csv_record_is_found_where_it_begins(tmp_path):
    # line 1 header, 2-4 first record, 5 blank, 6-7 second record, 8 third
    text = 'prompt,response\n"a\nb\nc",1\n\n"d\ne",2\nf,3\n'
    found = read(write(tmp_path / "a.csv", text))
    assert [(number, row["response"]) for number, row in found.rows] == [
        (2, "1"),
        (6, "2"),
        (8, "3"),
    ]


def test_a_csv_cell_may_be_long_and_the_module_keeps_its_limit(tmp_path):
    before = csv.field_size_limit(1000)
    try:
        found = read(write(tmp_path / "a.csv", "prompt\n" + "x" * 200_000))
        assert len(found.rows[0][1]["prompt"]) == 200_000
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        (
            "a.jsonl",
            '{"a": 1}\n\n{"a" 2}\n',
            ", line 3: not valid JSON (Expecting ':' delimiter at column 6)",
        ),
        ("a.jsonl", '{"a": 1}\n["a"]', ", line 2: is not a JSON object with fields"),
        (
            "a.jsonl",
            '{"a": 1}\n' + "[" * 100_000,
            ", line 2: not valid JSON (maximum recursion depth",
        ),
        ("a.json", '[{"a": 1}, 3]', ", row 2: is not a JSON object with fields"),
        ("a.csv", "a,b\n1,2\n3\n", ", line 3: has 1 cells, but the header has 2"),
    ],
)
def test_an_unreadable_row_is_named_and_the_others_are_read(tmp_path, name, content, place):
    found = read(write(tmp_path / name, content))
    assert len(found.rows) == 1
    [fault] = found.unreadable
    assert str(fault).startswith(f"{tmp_path / name}{place}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', ", line 2: " + NOT_UTF8.format("e9")),
        ("a.csv", b"\xff\xfea\x00", ", line 1: " + NOT_UTF8.format("ff")),
        (
            "a.csv",
            'a,b\n1,2\n3,"4\n5,6\n',
            ", line 3: not valid CSV (unexpected end of data); check the quotes of this record",
        ),
        ("a.csv", "a,a\n1,2\n", ", line 1: a column name occurs twice in the header; rename one"),
        (
            "a.json",
            '[{"a": 1},\n{"a" 2}]',
            ", line 2: not valid JSON (Expecting ':' delimiter at column 6)",
        ),
        (
            "a.jsonl.gz",
            b"not zipped",
            ": cannot be read (Not a gzipped file (b'no')); check the file",
        ),
        ("a.parquet", b"PAR0", ": not a Parquet file ("),
        ("a.txt", "a", UNKNOWN),
        ("a", "a", UNKNOWN),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(tmp_path, name, content, message):
    assert error(write(tmp_path / name, content)).startswith(f"{tmp_path / name}{message}")


def test_a_missing_file_is_answered_with_the_nearest_names(tmp_path):
    write(tmp_path / "preferences.jsonl", "")
    wanted = tmp_path / "preference.jsonl"
    assert error(wanted) == (
        f"there is no file {wanted}; did you mean {tmp_path / 'preferences.jsonl'}?"
    )
    assert error(tmp_path / "x.csv") == f"there is no file {tmp_path / 'x.csv'}"
    nowhere = tmp_path / "no" / "x.csv"
    assert (
        error(nowhere) == f"there is no file {nowhere}: there is no folder {nowhere.parent} either"
    )


def test_a_folder_that_is_no_data_set_says_what_to_name(tmp_path):
    assert error(tmp_path) == (
        f"{tmp_path} is a folder that was not written by save_to_disk; "
        "name a file in it, or save the data set with Dataset.save_to_disk"
    )


def test_a_hub_data_set_without_network_is_one_sentence(tmp_path):
    """In a process of its own: the hub library reads the switch when it is imported."""
    code = (
        "from rlhf_core.data.sources import read_rows\n"
        "from rlhf_core.errors import DataError\n"
        "try: read_rows('nobody/nothing', split='train', subset='', limit=0)\n"
        "except DataError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (
        "'nobody/nothing' is not a local file or folder, and cannot be loaded from the Hugging "
        "Face hub (Couldn't reach 'nobody/nothing' on the Hub (OfflineModeIsEnabled)); check the "
        "name, the "
        "split 'train' and the subset, and that this machine reaches the hub or has the data set "
        "in its cache\n"
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "one"])
def test_the_limit_keeps_the_first_rows(saved, name):
    frame = pd.DataFrame([*ROWS, *ROWS])
    frame.to_json(saved / "a.jsonl", orient="records", lines=True)
    frame.to_json(saved / "a.json", orient="records")
    frame.to_csv(saved / "a.csv", index=False)
    frame.to_parquet(saved / "a.parquet")
    assert [row for _, row in read(saved / name, limit=1).rows] == ROWS[:1]
    assert [row for _, row in read(saved / name, limit=2).rows] == ROWS

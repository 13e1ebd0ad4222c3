"""Parquet files and save_to_disk folders that are damaged, or hold what Python cannot."""

import json
import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_core.data import columnar
from rlhf_core.data.sources import read_rows
from rlhf_core.errors import DataError

ROWS = [{"prompt": f"Say {n}", "answers": [f"{n}", "no"], "margin": n / 2} for n in range(40)]


def read(path, split="train", limit=0):
    return read_rows(str(path), split=split, subset="", limit=limit)


def error(path, **options):
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return str(caught.value).removeprefix(f"{path}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("saved") / "set"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder, num_shards=2)
    return folder


def test_a_folder_of_several_files_gives_what_the_package_reads(saved):
    theirs = datasets.load_from_disk(str(saved)).to_list()
    assert [row for _, row in read(saved).rows] == theirs == ROWS
    assert [number for number, _ in read(saved, limit=30).rows] == list(range(1, 31))


def test_columns_that_are_stored_as_json_are_decoded(tmp_path):
    features = datasets.Features({"extra": datasets.Json()})
    made = datasets.Dataset.from_list([{"extra": {"a": [1, "b"]}}], features=features)
    made.save_to_disk(tmp_path / "set")
    assert [row for _, row in read(tmp_path / "set").rows] == made.to_list()


@pytest.mark.parametrize("seed", range(24))
def test_a_changed_byte_is_harmless_or_refused(saved, tmp_path, seed):
    """In this process: it must not die of it."""
    rng = random.Random(seed)
    files = sorted(saved.iterdir())
    copied = tmp_path / "set"
    copied.mkdir()
    for file in files:
        (copied / file.name).write_bytes(file.read_bytes())
    target = copied / rng.choice(files).name
    data = bytearray(target.read_bytes())
    for _ in range(rng.choice((1, 4))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    target.write_bytes(data)
    try:
        found = read(copied)
    except DataError as refused:
        said = str(refused)
    else:
        said = f"{copied}"
        assert len(found.rows) + len(found.unreadable) == len(ROWS)
    assert said.startswith(str(copied))


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("state.json", "[]", "/state.json is damaged (it is not an object)"),
        ("state.json", "", "/state.json is damaged (Expecting value"),
        ("state.json", '{"_data_files": [{"filename": "../x"}]}', "/state.json is damaged: its"),
        ("state.json", '{"_data_files": 3}', "/state.json is damaged: its"),
        ("state.json", '{"_data_files": [{"filename": "no.arrow"}]}', " is incomplete: no.arrow"),
        ("dataset_info.json", None, "/dataset_info.json is damaged (it is missing)"),
        ("data-00000-of-00002.arrow", None, " is incomplete: data-00000-of-00002.arrow is missing"),
        ("data-00000-of-00002.arrow", "", ": is damaged ("),
    ],
)
def test_each_file_of_a_folder_is_named(saved, tmp_path, file, content, reason):
    copied = tmp_path / "set"
    copied.mkdir()
    for each in saved.iterdir():
        (copied / each.name).write_bytes(each.read_bytes())
    (copied / file).unlink()
    if content is not None:
        (copied / file).write_text(content)
    assert error(copied).startswith(reason)


def test_splits_are_names(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["../../etc"]}')
    assert error(tmp_path) == "/dataset_dict.json is damaged: it lists no splits; save it again"


def parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_a_date_that_python_does_not_have_is_a_fault_of_its_row(tmp_path):
    at = pa.array([0, 2**61, 60], pa.timestamp("us"))
    path = parquet(tmp_path / "a.parquet", prompt=["a", "b", "c"], at=at)
    found = read(path)
    assert [number for number, _ in found.rows] == [1, 3]
    [fault] = found.unreadable
    reason = "holds a timestamp[us] that cannot be read (date value out of range)"
    assert str(fault) == f"{path}, row 2, field 'at': {reason}"


def test_bytes_that_are_no_text_are_a_fault_of_their_row(tmp_path):
    text = pa.array([b"a", b"\xff\xfe"], pa.binary()).view(pa.string())
    found = read(parquet(tmp_path / "a.parquet", prompt=text))
    assert [row for _, row in found.rows] == [{"prompt": "a"}]
    assert found.unreadable[0].field == "prompt"
    assert "holds a string that cannot be read ('utf-8' codec" in found.unreadable[0].reason


def test_a_time_zone_that_there_is_not_is_a_fault(tmp_path):
    at = pa.array([0], pa.timestamp("s", tz="Mars/Phobos"))
    [fault] = read(parquet(tmp_path / "a.parquet", prompt=["a"], at=at)).unreadable
    assert (fault.number, fault.field) == (1, "at")


def test_a_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    index = pa.array([0] * 4_000, pa.int32())
    text = pa.DictionaryArray.from_arrays(index, pa.array(["A" * 1_000_000]))
    path = parquet(tmp_path / "a.parquet", prompt=text)
    assert path.stat().st_size < 2_000_000
    reason = error(path)
    assert "unpacks to more than 256 MiB and 100 times its size" in reason
    assert len(read(path, limit=2).rows) == 2  # what fits can be read


def test_what_kills_the_reader_does_not_kill_us(tmp_path, monkeypatch):
    """A reader that crashes, hangs or says nothing, in place of one that Arrow makes do so."""
    path = parquet(tmp_path / "a.parquet", prompt=["a"])
    for program, reason in {
        "import os; os.kill(os.getpid(), 11)": ": is damaged: reading it crashes the reader",
        "import os; os.kill(os.getpid(), 24)": ": takes more than 6 s to read, so it is damaged",
        "print('is odd'); raise SystemExit(1)": ": is odd",
    }.items():
        script = tmp_path / "reader.py"
        script.write_text(program)
        monkeypatch.setattr(columnar, "__file__", str(script))
        assert error(path).startswith(reason)


def test_a_column_name_that_occurs_twice_is_refused(tmp_path):
    pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), tmp_path / "a.parquet")
    assert "a column name occurs twice; rename one" in error(tmp_path / "a.parquet")


def test_deeply_nested_rows_are_faults(tmp_path):
    deep: object = "x"
    for _ in range(200):
        deep = [deep]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": deep}) + '\n{"prompt": "b"}\n')
    found = read(tmp_path / "a.jsonl")
    assert [number for number, _ in found.rows] == [2]
    assert str(found.unreadable[0]).endswith("more than 100 deep in each other")

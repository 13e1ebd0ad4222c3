"""A pseudonym in files and databases: found in every form, told from others, and taken out."""

import gzip
import json
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from contextlib import closing

import pandas as pd
import pytest

from rlhf_core.errors import UserError
from tasks.feedback.erasure import databases, documents
from tasks.feedback.erasure.names import Name
from tasks.feedback.erasure.places import Places
from tasks.record.work_folder import work_folder
from tasks.settings import Settings, StoreSettings

P01 = Name("p01", telling=True, others=["p01-7f3a", "p010"])
GOOD = Name("good", telling=False)


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("p01", True),
        ("by p01.", True),
        ('{"annotator": "p01"}', True),
        ("p01, p02", True),
        ("feedback/p01/x", True),
        ("p01\n", True),
        ("(p01)", True),
        ("p010", False),
        ("xp01", False),
        ("p01-7f3a", False),  # somebody else
        ("p01-7f3b", True),  # nobody, so it is an ending
        ("votes-p01.csv", True),
        ("p_p01", False),
        ("P01", False),
    ],
)
def test_a_name_is_told_from_longer_ones(text, there):
    assert P01.stands_in(text) is there
    assert P01.stands_in_bytes(text.encode()) is there


def test_a_name_that_could_be_a_piece_of_an_id():
    found = Name("beef", telling=True)
    assert found.stands_in("by beef.")
    assert not found.stands_in("6e1f-beef-4200")


@pytest.mark.parametrize("name", ["Zoë O'Hara", 'quote"d', "a&b", "日本", "with space"])
@pytest.mark.parametrize("write", [str, json.dumps, lambda text: json.dumps(json.dumps(text))])
def test_a_name_is_found_as_it_is_escaped(name, write):
    content = f"x {write(name)} y".encode()
    found = Name(name, telling=True)
    assert found.stands_in_bytes(content)
    blank = found.overwritten(content)
    assert len(blank) == len(content)
    assert not found.stands_in_bytes(blank)


def test_bytes_that_are_no_text_stay():
    content = b"\xff\xfe p01 \x80\x00"
    assert P01.overwritten(content) == b"\xff\xfe xxx \x80\x00"


@pytest.mark.parametrize(
    ("name", "telling"),
    [
        ("w0042", True),
        ("p003-7f3a", True),
        ("Wilhelmina", True),
        ("annotator", False),  # this program says so itself
        ("Gold", False),
        ("12", False),
        ("2024", False),
        ("ab", False),
        ("hotel", False),  # stands in the texts
        ("shop", False),  # is a project
    ],
)
def test_whether_a_word_can_be_told_from_others(name, telling):
    found = Name.of(name, ["The hotel was good.", "Nice"], ["shop", "shop-policy"])
    assert found.telling is telling


ROWS = [
    {"prompt": "p01 is a room", "annotator": "p01", "vote": "a"},
    {"prompt": "x", "annotator": "p010", "vote": "b"},
]


def test_rows_of_the_person_are_left_out_of_tables(tmp_path):
    frame = pd.DataFrame(ROWS)
    rest = [ROWS[1]]
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "a.json", orient="records")
    frame.to_json(tmp_path / "split.json", orient="split")
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert documents.has(path, P01), path
        assert documents.clean(path, P01) == "rows left out", path
        assert not documents.has(path, P01), path
    assert pd.read_json(tmp_path / "a.jsonl", lines=True).to_dict("records") == rest
    assert json.loads((tmp_path / "a.json").read_text()) == rest
    assert pd.read_json(tmp_path / "split.json", orient="split").to_dict("records") == rest
    assert pd.read_csv(tmp_path / "a.csv").to_dict("records") == rest
    assert pd.read_parquet(tmp_path / "a.parquet").to_dict("records") == rest


def test_a_common_word_is_taken_out_only_where_annotators_are_named(tmp_path):
    rows = [
        {"prompt": "good", "response_a": "good", "annotator": "ada", "topic": "good"},
        {"prompt": "x", "response_a": "y", "annotator": "good", "topic": "z"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.log").write_text("a good day\n")
    assert documents.clean(tmp_path / "a.jsonl", GOOD) == "rows left out"
    assert json.loads((tmp_path / "a.jsonl").read_text()) == rows[0]
    assert documents.clean(tmp_path / "a.log", GOOD) == "common word"
    assert (tmp_path / "a.log").read_text() == "a good day\n"


def test_what_people_compare_stays_in_a_table_of_another(tmp_path):
    row = {"prompt": "ask p01", "annotator": "ada"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert documents.without(row, P01) == row


@pytest.mark.parametrize("kind", ["zip", "gz", "tar", "binary"])
def test_what_is_packed_is_found_and_deleted(tmp_path, kind):
    path = tmp_path / f"file.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", "by p01 " * 99)
    elif kind == "gz":
        path.write_bytes(gzip.compress(b"by p01 " * 99))
    elif kind == "tar":
        (tmp_path / "a.txt").write_text("by p01")
        with tarfile.open(path, "w") as archive:
            archive.add(tmp_path / "a.txt", "a.txt")
    else:
        path.write_bytes(b"\0\1 p01 \0")
    assert documents.has(path, P01)
    assert documents.clean(path, P01) == "deleted"
    assert not path.exists()


def test_a_file_that_is_not_what_it_says(tmp_path):
    (tmp_path / "a.json").write_text("{by p01")
    (tmp_path / "a.gz").write_bytes(b"by p01")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 by p01")
    (tmp_path / "b.json").write_text("[" * 100_000 + "p01")
    for path in sorted(tmp_path.iterdir()):
        documents.clean(path, P01)
        assert not path.exists() or not documents.has(path, P01)
    assert (tmp_path / "a.json").read_text() == "{by xxx"


def test_whoever_appends_to_a_log_loses_nothing(tmp_path):
    path = tmp_path / "server.log"
    with path.open("a") as log:
        log.write("by p01\n")
        log.flush()
        assert documents.clean(path, P01) == "overwritten"
        log.write("more\n")
    assert path.read_text() == "by xxx\nmore\n"


def test_a_name_across_two_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 10)
    (tmp_path / "a.log").write_bytes(b"x" * 7 + b" p01 " + b"x" * 9)
    assert documents.has(tmp_path / "a.log", P01)


def test_a_database_is_written_anew(tmp_path):
    path = tmp_path / "prefect.db"
    with sqlite3.connect(path) as base:
        base.execute("PRAGMA journal_mode=WAL")
        base.execute("CREATE TABLE run (id TEXT PRIMARY KEY, parameters JSON, name VARCHAR)")
        base.execute("CREATE TABLE tag (k TEXT, v TEXT, PRIMARY KEY (k, v)) WITHOUT ROWID")
        base.execute(
            "INSERT INTO run VALUES ('1', ?, 'p010')",
            (json.dumps({"config": {"by": "p01", "people": ["p01", "p010"]}}),),
        )
        base.execute("INSERT INTO run VALUES ('2', '{broken p01', 'by p01')")
        base.executemany("INSERT INTO tag VALUES ('who', ?)", [("p01",), ("(erased)",)])
        base.execute("INSERT INTO run VALUES ('3', '{}', 'p01 p01 p01')")
        base.execute("DELETE FROM run WHERE id = '3'")
    base.close()
    done = databases.clean_file(path, P01)
    assert done.cells == {"run": 3, "tag": 1}
    with sqlite3.connect(path) as base:
        rows = base.execute("SELECT parameters, name FROM run ORDER BY id").fetchall()
        tags = [row[0] for row in base.execute("SELECT v FROM tag ORDER BY v")]
    assert json.loads(rows[0][0]) == {"config": {"by": "(erased)", "people": ["p010"]}}
    assert rows[0][1] == "p010"
    assert rows[1] == ("{broken (erased)", "by (erased)")
    assert tags[0] == "(erased)"
    assert tags[1].startswith("erased-")
    base.close()
    assert not any(P01.stands_in_bytes(file.read_bytes()) for file in tmp_path.iterdir())


def test_a_database_of_postgres(postgres):
    url = postgres.create()
    from sqlalchemy import create_engine, make_url, text

    engine = create_engine(url)
    with engine.begin() as base:
        base.execute(text("CREATE TABLE run (id INT PRIMARY KEY, parameters JSONB, name TEXT)"))
        base.execute(text("""INSERT INTO run VALUES (1, '{"by": "p01", "n": "p010"}', 'p01')"""))
    done = databases.clean(make_url(url), P01)
    assert done.cells == {"run": 2}
    with engine.begin() as base:
        row = base.execute(text("SELECT parameters, name FROM run")).one()
    assert tuple(row) == ({"by": "(erased)", "n": "p010"}, "(erased)")
    engine.dispose()
    postgres.drop(url)


def test_a_database_that_somebody_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(databases, "WAIT_SECONDS", 0.1)
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE t (a TEXT)")
    held = sqlite3.connect(path, isolation_level=None)
    held.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match="cannot be searched or written"):
        databases.clean_file(path, P01)
    held.execute("ROLLBACK")
    held.close()


# ---- the home ----


def places(tmp_path, **more):
    return Places(Settings.model_validate({"RLHF_HOME": tmp_path}), StoreSettings(), **more)


def test_folders_of_stopped_stages_go_and_those_in_use_stop_the_erasure(tmp_path):
    folder = tmp_path / "work" / "reward_model-1"
    with work_folder(folder, kept=True):
        (folder / "inputs").mkdir()
        (folder / "inputs" / "votes.jsonl").write_text('{"annotator": "p01"}\n')
        with pytest.raises(UserError, match=r"a process works in .*reward_model-1"):
            places(tmp_path).clean(P01)
        assert folder.exists()
        (folder / "lock").touch()
        kept = (folder / "inputs" / "votes.jsonl").read_text()
    folder.mkdir(parents=True)
    (folder / "votes.jsonl").write_text(kept)
    found = places(tmp_path).clean(P01)
    assert found.files == {"work/reward_model-1": "deleted"}
    assert not folder.exists()


def test_files_of_models_are_left_and_said(tmp_path):
    model = tmp_path / "mlflow" / "artifacts" / "shop" / "models" / "m-1" / "artifacts"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"\0" * 8)
    (model / "tokenizer.json").write_text('{"vocab": {"p01": 3}}')
    (model / "README.md").write_text("trained on p01\n")
    found = places(tmp_path).clean(P01)
    place = "mlflow/artifacts/shop/models/m-1/artifacts"
    assert found.files == {f"{place}/README.md": "overwritten"}
    assert list(found.left) == [f"{place}/tokenizer.json"]
    assert places(tmp_path).search(P01) == [f"{place}/tokenizer.json"]


def test_of_two_people_of_one_name_only_one_goes(tmp_path):
    for name in ("mine", "theirs"):
        folder = tmp_path / "mlflow" / "artifacts" / name
        folder.mkdir(parents=True)
        (folder / "table.json").write_text('[{"annotator": "p01"}]')
    found = places(tmp_path, own=["mlflow/artifacts/mine/"]).clean(P01)
    assert list(found.files) == ["mlflow/artifacts/mine/table.json"]
    assert list(found.left) == ["mlflow/artifacts/theirs/table.json"]


def test_links_lead_nowhere(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("by p01")
    home = tmp_path / "home"
    home.mkdir()
    (home / "link.txt").symlink_to(outside)
    assert places(home).clean(P01).files == {}
    assert outside.read_text() == "by p01"


VISIT = """
import sqlite3, sys
visitor = sqlite3.connect(sys.argv[1])
visitor.execute("SELECT * FROM votes").fetchall()
visitor.close()
"""


@pytest.mark.parametrize("file", ["feedback/feedback.db", "mlflow/mlflow.db"])
def test_a_search_leaves_the_locks_of_databases_that_are_open(tmp_path, file):
    """SQLite deletes the log of a database when the last one who has it open closes it. Who has
    given up their locks does not count: the next write would then destroy the file."""
    path = tmp_path / file
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as base:
        base.execute("PRAGMA journal_mode=WAL")
        base.execute("CREATE TABLE votes (annotator TEXT)")
        base.execute("INSERT INTO votes VALUES ('ada')")
        base.commit()
        places(tmp_path).clean(P01)
        assert places(tmp_path).search(P01) == []
        subprocess.run([sys.executable, "-c", VISIT, str(path)], check=True)
        assert path.with_name(f"{path.name}-wal").exists()


@pytest.mark.parametrize("text", ["p01", "Zoë\n日本", 'quote"d'])
def test_another_process_sees_the_same(tmp_path, text):
    name = Name(text, telling=True, others=[f"{text}-7f3a"])
    hers, theirs = tmp_path / "hers\udc80 é.txt", tmp_path / "theirs.txt"
    hers.write_bytes(f"by {text}.".encode(errors="surrogateescape"))
    theirs.write_text(f"by {text}-7f3a.", errors="surrogateescape")
    paths = [hers, theirs, tmp_path / "gone.txt"]
    assert databases.look_apart(paths, name) == {
        hers: documents.Look(is_sqlite=False, may_have=True, has=True),
        theirs: documents.Look(is_sqlite=False, may_have=True, has=False),
        paths[2]: documents.Look(is_sqlite=False, may_have=False, has=False),
    }

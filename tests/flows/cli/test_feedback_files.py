"""`rlhf feedback import` and `export` as typed: what is printed, and what a mistake says."""

import json

import pytest

ROW = {"prompt": "P", "response_a": "x", "response_b": "y", "vote": 1, "judge": "w1", "took": 3}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sentence(result) -> str:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    return result.stderr


def test_votes_go_in_and_come_out(feedback, tmp_path):
    write(tmp_path / "v.jsonl", ROW, {**ROW, "vote": 0, "judge": "w2"}, {**ROW, "vote": 2})
    options = ("--votes", "a=1", "--votes", "b=0", "--votes", "tie=2", "--fields")
    mapped = (*options, "annotator=judge", "--fields", "seconds=took", "--licence", "CC0")
    result = feedback("import", "demo", "v.jsonl", *mapped)
    assert result.exit_code == 0, result.output
    assert "v.jsonl: read 3 rows as rows that data.preferences reads." in result.stdout
    assert "3 votes on 1 pair: 3 new, 0 there already" in result.stdout
    again = feedback("import", "demo", "v.jsonl", *mapped)
    assert "0 new, 3 there already" in again.stdout

    result = feedback("export", "demo", "pairs.jsonl", "--form", "pairs")
    assert result.exit_code == 0, result.output
    assert "pairs.jsonl: wrote 2 rows as prompt, chosen, rejected." in result.stdout
    assert "1 tie and 2 times that votes took cannot be written as" in result.stdout
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 2
    assert "is there already; --force replaces it" in sentence(
        feedback("export", "demo", "pairs.jsonl")
    )
    feedback("snapshot", "demo")
    result = feedback("export", "demo", "all.parquet", "--snapshot", "latest")
    assert "all.parquet: wrote 3 rows as raw votes." in result.stdout


def test_a_file_that_is_bad_makes_no_project(feedback, tmp_path):
    write(tmp_path / "v.jsonl", {**ROW, "vote": "a"}, {**ROW, "vote": "?"})
    said = sentence(feedback("import", "demo", "v.jsonl"))
    assert "v.jsonl, line 2, field 'vote': '?' is not a vote" in said
    assert "--votes says what other values mean" in said
    assert "leave it out with --on-bad-row drop" in said
    assert "there is no feedback project 'demo'" in sentence(feedback("export", "demo", "x.jsonl"))
    result = feedback("import", "demo", "v.jsonl", "--on-bad-row", "drop", "--ask", "2")
    assert "In the queue: 1 pair (1 new)" in result.stdout
    assert "Left out: 1 bad rows (unknown vote)." in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("import", "demo", "none.jsonl"), "there is no file none.jsonl"),
        (("import", "demo", "v.jsonl", "--fields", "prompt"), "--fields takes OURS=THEIRS"),
        (("import", "demo", "v.jsonl", "--votes", "win=1"), "'win' is no vote"),
        (("import", "demo", "v.jsonl", "--form", "excel"), "there is no form 'excel'"),
        (
            ("import", "demo", "v.jsonl", "--fields", "note=a", "--fields", "note=b"),
            "--fields maps 'note' twice",
        ),
        (("import", "demo", "v.jsonl", "--gold", ""), "is empty: pass a value"),
    ],
)
def test_a_mistake_is_a_sentence(feedback, tmp_path, arguments, said):
    write(tmp_path / "v.jsonl", ROW)
    assert said in sentence(feedback(*arguments))

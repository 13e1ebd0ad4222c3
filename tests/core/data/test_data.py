"""Prepared tables on disk, and the rule that gives each prompt its side."""

import shutil

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.data.pairs import with_winners
from rlhf_core.data.prepared import (
    COLUMNS,
    canonical_prompt,
    digest,
    falls_to_eval,
    prompt_key,
    read_table,
    training_texts,
    write_table,
)
from rlhf_core.errors import DataError

USER = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "Because."}


def preferences():
    rows = [
        # texts that a careless reader takes for numbers, dates and nothing
        (
            *("007", "1.50", "2020-01-01", "null", "tie", "b", "é\u2028“"),
            *(True, 1 / 3, "2020-01-01", "1e5"),
        ),
        ("b", [USER, GOOD, USER], "", "\n\ttab", "b", "", "", False, 0.0, "", "x"),
    ]
    frame = pd.DataFrame(rows, columns=list(COLUMNS["preferences"]), dtype=object)
    return frame.astype({"gold": bool, "margin": float})


def test_a_table_comes_back_as_it_was_written(tmp_path):
    write_table(preferences(), tmp_path, "preferences", "eval")
    assert (tmp_path / "preferences.eval.jsonl").read_bytes().count(b"\n") == 2
    found = read_table(tmp_path, "preferences", "eval")
    pd.testing.assert_frame_equal(found, preferences())


def test_only_the_prepared_columns_are_written(tmp_path):
    frame = pd.DataFrame({"prompt": [[USER]], "id": ["1"], "key": ["Why?"]})
    write_table(frame, tmp_path, "prompts", "train")
    text = (tmp_path / "prompts.train.jsonl").read_text(encoding="utf-8")
    assert text == '{"id": "1", "prompt": [{"role": "user", "content": "Why?"}]}\n'


def test_votes_of_an_earlier_version_are_read_with_the_winner_as_side_a(tmp_path):
    # As 0.1.0 wrote them: the winner first, and in a tie the first answer.
    (tmp_path / "preferences.train.jsonl").write_text(
        '{"id": "p-1", "prompt": "Why?", "chosen": "yes", "rejected": "no", "tie": false, '
        '"margin": 0.25, "annotator": "ann"}\n'
        '{"id": "p-2", "prompt": [{"role": "user", "content": "Why?"}], "chosen": "1", '
        '"rejected": "2", "tie": true, "margin": 0.0, "annotator": ""}\n',
        encoding="utf-8",
    )
    found = read_table(tmp_path, "preferences", "train")
    unknown = {"shown_first": "", "gold": False, "time": "", "source": ""}
    assert found.to_dict("records") == [
        {"id": "p-1", "prompt": "Why?", "response_a": "yes", "response_b": "no", "vote": "a"}
        | {"annotator": "ann", "margin": 0.25}
        | unknown,
        {"id": "p-2", "prompt": [USER], "response_a": "1", "response_b": "2", "vote": "tie"}
        | {"annotator": "", "margin": 0.0}
        | unknown,
    ]
    assert list(found) == list(COLUMNS["preferences"])
    assert found.dtypes[["gold", "margin"]].tolist() == [bool, float]
    outcomes = with_winners(found)[["chosen", "rejected", "tie"]].to_numpy().tolist()
    assert outcomes == [["yes", "no", False], ["1", "2", True]]


def test_a_table_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError) as caught:
        read_table(tmp_path, "prompts", "train")
    path = tmp_path / "prompts.train.jsonl"
    assert str(caught.value) == f"there is no prepared table {path}; prepare the data first"


def test_the_digest_tells_tables_apart_and_ignores_the_report(tmp_path):
    one, same = tmp_path / "one", tmp_path / "same"
    one.mkdir()
    write_table(preferences(), one, "preferences", "train")
    write_table(preferences(), one, "preferences", "eval")
    shutil.copytree(one, same)
    (same / "validation.json").write_text("{}")
    first = digest(one)
    assert digest(same) == first
    assert len(first) == 16
    (same / "preferences.eval.jsonl").rename(same / "preferences.test.jsonl")
    assert digest(same) != first
    path = one / "preferences.train.jsonl"
    path.write_bytes(path.read_bytes().replace(b"007", b"008"))
    assert digest(one) != first


def test_a_digest_depends_on_where_a_byte_stands(tmp_path):
    for name, content in (("a.jsonl", b"12"), ("b.jsonl", b"3")):
        (tmp_path / name).write_bytes(content)
    first = digest(tmp_path)
    for name, content in (("a.jsonl", b"1"), ("b.jsonl", b"23")):
        (tmp_path / name).write_bytes(content)
    assert digest(tmp_path) != first


def test_prompt_keys_are_equal_where_the_question_is():
    assert prompt_key(" Why\n\n so? ") == prompt_key("Why so?") == "Why so?"
    assert prompt_key([USER]) == prompt_key("Why? ")
    assert prompt_key([USER, GOOD, USER]) != prompt_key([USER])
    assert prompt_key([USER, GOOD, USER]) == prompt_key([dict(reversed(USER.items())), GOOD, USER])
    assert prompt_key("why?") != prompt_key("Why?")
    assert canonical_prompt("Why? ") != canonical_prompt("Why?")


def test_a_side_worked_out_elsewhere():
    # printf '0\0Why?' | b2sum -l 64   gives 67a5ecf46d32bacb; 0x67a5… / 2^64 = 0.40487…
    assert not falls_to_eval("Why?", 0, 0.4048)
    assert falls_to_eval("Why?", 0, 0.4049)


@settings(deadline=None)  # the machine may be busy
@given(st.text(), st.integers(0, 2**32))
def test_a_larger_share_keeps_what_a_smaller_one_had(key, seed):
    sides = [falls_to_eval(key, seed, fraction) for fraction in (0.0, 0.1, 0.5, 0.9, 1.0)]
    assert sides == sorted(sides)
    assert (sides[0], sides[-1]) == (False, True)


def test_the_share_that_falls_to_evaluation_is_the_fraction():
    # 10,000 draws with p = 0.1: standard deviation 0.003, four of them on either side.
    share = sum(falls_to_eval(f"prompt {n}", 0, 0.1) for n in range(10_000)) / 10_000
    assert share == pytest.approx(0.1, abs=0.012)


def test_another_seed_splits_otherwise():
    one, other = ([falls_to_eval(f"prompt {n}", s, 0.5) for n in range(100)] for s in (0, 1))
    assert one != other


def test_training_texts_hold_all_that_is_said():
    rows = [("p", "r"), ([USER, GOOD, USER], "R")]
    frame = pd.DataFrame(rows, columns=["prompt", "response"])
    assert list(training_texts(frame)) == ["p\nr", "Why?\nBecause.\nWhy?\nR"]

"""Columns of the user's that stay beside each vote."""

import json
from dataclasses import replace

import pytest
from pydantic import ValidationError

from rlhf_core.data.formats import parse
from rlhf_core.data.prepared import digest, read_table
from rlhf_core.data.sources import SourceRows
from rlhf_core.errors import DataError
from rlhf_core.settings.data import DataConfig, LengthLimits
from rlhf_core.settings.model import ModelConfig
from rlhf_core.stages.prepare import prepare_data, reading_of
from rlhf_core.work import Work

PAIR = {"prompt": "p", "response_a": "A", "response_b": "B", "vote": "a"}


def table(*rows, keep=("topic",)):
    source = SourceRows("f.jsonl", "line", list(enumerate(rows, 1)))
    reading = replace(reading_of(DataConfig(), "preferences"), keep=keep)
    return parse(source, "preferences", {}, reading)


def test_values_are_texts_and_what_is_missing_is_empty():
    rows = [PAIR | {"topic": value} for value in ("art", 3, True, None, "")]
    found = table(*rows, PAIR, PAIR | {"topic": "x"})
    assert found.faults == []
    kept = [one["topic"] for one in found.frame["kept"]]
    assert kept == ["art", "3", "True", "", "", "", "x"]
    assert found.unread == []  # a column that is kept is read


def test_a_path_is_a_column_and_every_vote_of_a_row_has_it():
    row = {**PAIR, "votes": ["a", "b"], "meta": {"user": {"age": 7}}}
    assert (
        table(row, keep=("meta.user.age",)).frame["kept"].tolist() == [{"meta.user.age": "7"}] * 2
    )


def test_a_list_is_no_value():
    [fault] = table(PAIR | {"topic": ["a", "b"]}).faults
    assert (
        str(fault) == "f.jsonl, line 1, field 'topic': is a list, not a value to keep beside a vote"
    )


def test_a_column_that_is_not_there_is_said():
    with pytest.raises(DataError, match=r"has no field 'topik', which data\.preferences\.keep"):
        table(PAIR | {"topic": "x"}, keep=("topik",))


def test_an_answer_a_row_has_no_column_of_a_vote():
    rated = {"prompt": "p", "response": "A", "score": 1, "topic": "x"}
    with pytest.raises(DataError, match="a vote is made of two rows; remove keep"):
        table(rated)


def test_demonstrations_have_no_kept_columns():
    with pytest.raises(ValidationError, match=r"demonstrations\.keep has no meaning"):
        DataConfig.model_validate({"demonstrations": {"keep": ["topic"]}})


def test_prompts_that_come_from_other_tables_have_no_columns():
    with pytest.raises(ValidationError, match=r"prompts\.path is empty"):
        DataConfig.model_validate({"prompts": {"keep": ["topic"]}})


def prepared(tmp_path, name, prompts=None, **settings):
    rows = [PAIR | {"prompt": f"ask {n}", "topic": f"t{n % 2}"} for n in range(20)]
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(
        source="files",
        preferences={"path": str(path), "ignore": [] if settings else ["topic"], **settings},
        prompts={} if prompts is None else {"path": str(path), **prompts},
        eval_fraction=0.3,
    )
    limits = LengthLimits(prompt=50, sft=50, reward=50, response=50)
    sections = {"model": ModelConfig(), "limits": limits}
    prepare_data(config, Work(outputs={"data": tmp_path / name}, sections=sections))
    return tmp_path / name


def test_prepared_votes_keep_them_and_others_stay_as_they_were(tmp_path):
    data = prepared(tmp_path, "kept", keep=["topic"])
    for split in ("train", "eval"):
        votes = read_table(data, "preferences", split)
        numbers = [int(prompt.split()[1]) for prompt in votes["prompt"]]
        assert [kept["topic"] for kept in votes["kept"]] == [f"t{n % 2}" for n in numbers]
    assert "kept" not in read_table(data, "demonstrations", "train")
    plain = prepared(tmp_path, "plain")
    assert "kept" not in read_table(plain, "preferences", "train")
    assert "kept" not in (plain / "preferences.train.jsonl").read_text()
    assert digest(plain) != digest(data)


def test_prepared_prompts_keep_them_and_others_stay_as_they_were(tmp_path):
    data = prepared(tmp_path, "kept", prompts={"keep": ["topic"]})
    for split in ("train", "eval"):
        table = read_table(data, "prompts", split)
        numbers = [int(prompt.split()[1]) for prompt in table["prompt"]]
        assert [kept["topic"] for kept in table["kept"]] == [f"t{n % 2}" for n in numbers]
    # Columns of votes belong to the votes, not to the prompts that are taken from them.
    votes = prepared(tmp_path, "votes", keep=["topic"])
    plain = prepared(tmp_path, "plain")
    for split in ("train", "eval"):
        files = [folder / f"prompts.{split}.jsonl" for folder in (votes, plain)]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert b"kept" not in files[0].read_bytes()


def test_a_list_is_no_value_beside_a_prompt():
    source = SourceRows("f.jsonl", "line", [(1, {"prompt": "p", "topic": ["a"]})])
    reading = replace(reading_of(DataConfig(), "prompts"), keep=("topic",))
    [fault] = parse(source, "prompts", {}, reading).faults
    assert str(fault).endswith("is a list, not a value to keep beside a prompt")

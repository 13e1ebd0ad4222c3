"""Votes of any value, scores, ranks and ratings, margins by side, and who voted."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
from pydantic import ValidationError

from rlhf_core.data.formats import parse
from rlhf_core.data.sources import SourceRows, read_rows
from rlhf_core.settings.data import DataConfig, TableConfig
from rlhf_core.stages.prepare import reading_of

PAIR = {"prompt": "p", "response_a": "A", "response_b": "B"}


def table(*rows, names=None, votes=None, **reading):
    config = DataConfig(preferences={"votes": votes or {}})
    source = SourceRows("f.jsonl", "line", list(enumerate(rows, 1)))
    known = replace(reading_of(config, "preferences"), **reading)
    return parse(source, "preferences", names or {}, known)


def column(found, name="vote"):
    assert [str(fault) for fault in found.faults] == []
    return found.frame[name].tolist()


@pytest.mark.parametrize(
    ("values", "votes", "expected"),
    [
        (["model_a", "Model_B", "tie (bothbad)"], {}, ["a", "b", "tie"]),
        (["response_a", "response_b"], {}, ["a", "b"]),
        (
            ["left", "right", "both"],
            {"a": "left", "b": "right", "tie": ["both"]},
            ["a", "b", "tie"],
        ),
        ([1, 0, 1.0, "1", "0.0"], {"a": 1, "b": 0}, ["a", "b", "a", "a", "b"]),
        ([True, False, "True", "false"], {"a": True, "b": False}, ["a", "b", "a", "b"]),
        (["yes", "no"], {"a": True, "b": False}, ["a", "b"]),  # YAML reads yes as true
        ([-2, 0, 3], {"a": [-3, -2, -1], "tie": 0, "b": [1, 2, 3]}, ["a", "tie", "b"]),
        (["a", "b"], {"b": "a", "a": "b"}, ["b", "a"]),
    ],
)
def test_values_of_votes_are_mapped(values, votes, expected):
    assert column(table(*(PAIR | {"vote": value} for value in values), votes=votes)) == expected
    [found] = [table(PAIR | {"votes": [{"vote": value} for value in values]}, votes=votes)]
    assert column(found) == expected


@pytest.mark.parametrize("value", ["left", 1, 0, True, "1", "first", "", "c", {"a": 1}, "x" * 999])
def test_a_value_that_is_not_mapped_is_a_bad_row_that_names_the_setting(value):
    [fault] = table(PAIR | {"vote": value}).faults
    assert fault.category == "unknown vote"
    assert str(fault).endswith(
        "data.preferences.votes says what other values mean, e.g. {a: 1, b: 0}"
    )
    assert len(str(fault)) < 300


@pytest.mark.parametrize(
    ("a", "b", "vote", "expected"),
    [
        ("left", "right", "left", "a"),
        ("right", "left", "left", "b"),  # the column that is called left
        ("right", "left", "Right", "a"),
        ("b", "a", "a", "b"),
        ("x.first", "x.second", "second", "b"),
        ("x.first", "x.second", "x.first", "a"),
    ],
)
def test_a_vote_may_be_the_name_of_a_column(a, b, vote, expected):
    row = {"prompt": "p", "vote": vote, "shown_first": vote, "x": {"first": "A", "second": "B"}}
    row |= {a: "A", b: "B"}
    found = table(row, names={"response_a": a, "response_b": b})
    assert column(found) == [expected]
    assert column(found, "shown_first") == [expected]
    assert column(found, "response_a") == ["A"]


def test_values_that_are_mapped_to_no_vote_or_to_two_are_refused_by_the_settings():
    with pytest.raises(
        ValidationError, match="'left' is not a vote; write the vote first, 'a', 'b"
    ):
        TableConfig(votes={"left": "a"})
    with pytest.raises(
        ValidationError, match="the value '1' is listed twice; it can mean one vote"
    ):
        TableConfig(votes={"a": [1, "1.0"]})


def test_votes_in_a_list_are_read_by_mapped_names():
    entries = [{"user": {"id": 3}, "said": "b"}, {"user": {"id": None}, "said": "tie"}]
    names = {"votes": "ballots.all", "vote": "said", "annotator": "user.id"}
    found = table(PAIR | {"ballots": {"all": entries}}, names=names)
    assert column(found) == ["b", "tie"]
    assert column(found, "annotator") == ["3", ""]
    assert column(table(PAIR | {"votes": '[["w1", "a"], ["w2", "b"]]'}), "annotator") == [
        "w1",
        "w2",
    ]


# --- scores, ranks, ratings


@pytest.mark.parametrize(
    ("scores", "expected", "margin"),
    [
        ({"score_a": 3, "score_b": 1.5}, "a", 1.5),
        ({"score_a": "-1", "score_b": "2"}, "b", 3.0),
        ({"score_a": 2, "score_b": 2}, "tie", 0.0),
        ({"score_a": True, "score_b": False}, "a", 1.0),
        ({"score_a": -2}, "b", 2.0),  # one signed number: the other is 0
        ({"score_b": -2}, "a", 2.0),
    ],
)
def test_scores_of_two_answers_say_who_won(scores, expected, margin):
    assert column(table(PAIR | scores)) == [expected]
    assert column(table(PAIR | scores), "margin") == [0.0]  # a score is no reward
    assert column(table(PAIR | scores, score_margin=0.5), "margin") == [margin * 0.5]


@pytest.mark.parametrize("score", ["good", math.inf, [1]])
def test_what_is_no_score_is_a_bad_row(score):
    [fault] = table(PAIR | {"score_a": score, "score_b": 1}).faults
    assert (fault.field, fault.category) == ("score_a", "bad score")
    [fault] = table(PAIR | {"score_a": 1, "score_b": math.nan}, PAIR | {"score_a": 1}).faults[1:]
    assert str(fault) == "f.jsonl, line 2, field 'score_b': is missing"


def test_ranked_answers_become_every_pair_of_them():
    answers = [{"answer": "x", "rank": 2}, {"answer": "y", "rank": 1}, {"answer": "z", "rank": 2}]
    found = table({"prompt": "p", "answers": answers}, score_margin=2.0)
    columns = ["id", "response_a", "response_b", "vote", "margin"]
    assert found.frame[columns].to_numpy().tolist() == [
        ["f-1-1-2", "x", "y", "b", 2.0],
        ["f-1-1-3", "x", "z", "tie", 0.0],
        ["f-1-2-3", "y", "z", "a", 2.0],
    ]
    beside = {"id": "q", "prompt": "p", "answers": ["x", "y"], "ranks": [2, 1]}
    found = table(beside, names={"rank": "ranks"})
    assert found.frame[["id", "vote"]].to_numpy().tolist() == [["q-1-2", "b"]]
    assert table({"prompt": "p", "answers": answers[:1]}).skipped == {"fewer than two answers": 1}
    [fault] = table({"prompt": "p", "answers": [*answers, {"answer": "w"}]}).faults
    assert str(fault) == "f.jsonl, line 1, field 'answers': the rank of answer 4 is missing"


def rated(prompt, response, score, **more):
    return {"prompt": prompt, "response": response, "score": score, **more}


def test_rated_answers_are_compared_with_others_to_the_same_prompt():
    rows = [rated("p", "x", 1), rated("q", "y", 2), rated("p", "z", 3), rated("p", "w", 3)]
    found = table(*rows, score_margin=1.0)
    columns = ["id", "prompt", "response_a", "response_b", "vote", "margin"]
    assert found.frame[columns].to_numpy().tolist() == [
        ["f-1+f-3", "p", "x", "z", "b", 2.0],
        ["f-1+f-4", "p", "x", "w", "b", 2.0],
    ]
    assert found.skipped == {"no other answer to the prompt that is rated otherwise": 1}
    # What one annotator rates 1 and another 3 are two scales.
    apart = table(rated("p", "x", 1, annotator="u"), rated("p", "z", 3, annotator="v"))
    assert apart.frame.empty
    assert apart.skipped == {"no other answer to the prompt that is rated otherwise": 2}


def test_many_answers_to_one_prompt_do_not_become_a_pair_for_each_two():
    found = table(*(rated("p", f"r{n}", n) for n in range(1000)))
    assert len(found.frame) <= 15 * 1000
    assert not found.skipped
    answers = [{"answer": f"r{n}", "rank": n} for n in range(1000)]
    assert len(table({"prompt": "p", "answers": answers}).frame) <= 15 * 1000
    root = {"id": "0", "parent": "", "role": "user", "text": "q"}
    replies = [
        {"id": f"{n}", "parent": "0", "role": "assistant", "text": f"r{n}", "rank": n}
        for n in range(1, 1001)
    ]
    assert len(table(root, *replies).frame) <= 15 * 1000
    chain = [
        {"id": f"{n}", "parent": f"{n - 1}" if n else "", "text": "t", "rank": 0}
        | {"role": "assistant" if n % 2 else "user"}
        for n in range(20_000)
    ]
    reasons = table(*chain).skipped
    assert reasons["replies without a way to the root of their tree"] > 9_000


# --- trees


def test_a_tree_that_is_broken_or_goes_round_is_counted():
    def node(name, parent, role, rank=None):
        return {"id": name, "parent": parent, "role": role, "text": f"t{name}", "rank": rank}

    rows = [
        node("1", None, "user"),
        node("2", "1", "assistant", 0),
        node("3", "1", "assistant", 0),
        node("4", "9", "assistant", 0),
        node("5", "6", "user"),
        node("6", "5", "assistant", 0),
    ]
    found = table(*rows)
    assert column(found) == ["tie"]
    assert column(found, "id") == ["2+3"]
    assert found.skipped == {"replies without a way to the root of their tree": 2}
    [fault] = table(*rows, node("7", "1", "tool")).faults
    assert str(fault) == (
        "f.jsonl, line 7, field 'role': has the role 'tool'; it must be system, user or assistant"
    )


# --- margins


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # Without a sign: for the winner of each vote.
        ([{"vote": "b", "margin": 2}, {"vote": "a", "margin": 1}], [2.0, 1.0]),
        ([{"votes": ["a", "b", "a", "tie"], "margin": 2}], [2.0, 2.0, 2.0, 2.0]),
        # With signs: positive for a, negative for b.
        ([{"vote": "b", "margin": -2}, {"vote": "a", "margin": 1}], [2.0, 1.0]),
        ([{"votes": ["b", "a", "b"], "margin": "-0.5"}], [0.5, 0.0, 0.5]),
        ([{"votes": ["a", "b"], "margin": -3}], [0.0, 3.0]),
        ([{"vote": "tie", "margin": -3}, {"vote": "b", "margin": math.nan}], [0.0, 0.0]),
    ],
)
def test_a_margin_is_for_the_side_that_it_favours(rows, expected):
    assert column(table(*(PAIR | row for row in rows)), "margin") == expected


def test_a_margin_against_the_votes_is_a_bad_row():
    cast = [(["b"], -1), (["a"], -2), (["a", "b", "b"], "1.5")]
    faults = table(*(PAIR | {"votes": votes, "margin": margin} for votes, margin in cast)).faults
    assert [str(fault) for fault in faults] == [
        "f.jsonl, line 2, field 'margin': -2 favours 'response_b' by its sign, but 'response_a' "
        "won the vote",
        "f.jsonl, line 3, field 'margin': 1.5 favours 'response_a' by its sign, but 'response_b' "
        "won the vote",
    ]
    assert {fault.category for fault in faults} == {"bad margin"}


def test_a_margin_that_favours_the_rejected_answer_is_a_bad_row():
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    found = table(row | {"margin": 1}, row | {"margin": -1})
    [fault] = found.faults
    assert fault.reason == "-1 favours the rejected answer by its sign"
    assert found.frame["margin"].tolist() == [1.0]


# --- who voted

WHO = [17.0, 23, math.nan, None, "w1", "17"]
NAMES = ["17", "23", "", "", "w1", "17"]


def test_an_annotator_is_the_same_in_every_form():
    rows = [PAIR | {"vote": "a", "annotator": who} for who in WHO]
    assert column(table(*rows), "annotator") == NAMES
    as_list = table(PAIR | {"votes": [[who, "a"] for who in WHO]})
    assert column(as_list, "annotator") == NAMES
    as_objects = table(PAIR | {"votes": [{"annotator": who, "vote": "a"} for who in WHO]})
    assert column(as_objects, "annotator") == NAMES
    chosen = [{"prompt": "p", "chosen": "A", "rejected": "B", "annotator": who} for who in WHO]
    assert column(table(*chosen), "annotator") == NAMES


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_an_annotator_is_the_same_in_every_file_that_pandas_writes(suffix, tmp_path):
    frame = pd.DataFrame([PAIR | {"vote": "a", "annotator": who} for who in (17, 23, None)])
    assert frame["annotator"].dtype == float  # one is missing, so pandas has made floats of them
    path = tmp_path / f"votes.{suffix}"
    if suffix == "csv":
        frame.to_csv(path, index=False)
    elif suffix == "parquet":
        frame.to_parquet(path)
    else:
        path.write_text(
            "".join(json.dumps(row) + "\n" for row in frame.to_dict("records")), encoding="utf-8"
        )
    source = read_rows(str(path), split="train", subset="", limit=0)
    assert column(parse(source, "preferences", {}), "annotator") == ["17", "23", ""]


@pytest.mark.parametrize("who", ["\ud800", 0.5, True, [1], math.inf])
def test_what_is_no_name_is_a_bad_row_in_every_form(who):
    rows = [
        {"prompt": "p", "chosen": "A", "rejected": "B", "annotator": who},
        PAIR | {"votes": [[who, "a"]]},
        PAIR | {"votes": [{"annotator": who, "vote": "a"}]},
    ]
    for row in rows:
        [fault] = table(row).faults
        assert fault.category in ("broken text", "wrong type")
        assert fault.field in ("annotator", "votes")
        str(fault).encode()

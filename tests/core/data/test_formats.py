"""What each format of a row becomes, and how a bad row is named."""

import json
import math
from datetime import datetime

import pandas as pd
import pytest

from rlhf_core.data.formats import parse
from rlhf_core.data.sources import SourceRows, read_rows
from rlhf_core.errors import DataError

USER = {"role": "user", "content": "Why is the sky blue?"}
GOOD = {"role": "assistant", "content": "Rayleigh scattering."}
POOR = {"role": "assistant", "content": "It just is."}


def table(kind, *rows, names=None):
    return parse(SourceRows("my/file.jsonl", "line", list(enumerate(rows, 1))), kind, names or {})


def records(found):
    """The rows without the columns that are empty in most tests."""
    assert not found.faults
    plain = {"vote": "a", "margin": 0.0, "annotator": "", "ballot": 0}
    plain |= {"shown_first": "", "gold": False, "time": "", "source": "file.jsonl"}
    return [
        {name: value for name, value in row.items() if plain.get(name) != value}
        for row in found.frame.to_dict("records")
    ]


def pair(n, prompt, chosen, rejected, **more):
    answers = {"prompt": prompt, "response_a": chosen, "response_b": rejected}
    return {"id": f"file-{n}", **answers, **more}


# --- demonstrations and prompts


def test_demonstrations_of_texts_messages_and_dialogues():
    text = {"id": 7, "prompt": " p", "response": "r ", "unused": None}
    chat = {"id": "x", "prompt": [USER | {"name": None}], "response": "r"}
    assert records(table("demonstrations", text, chat)) == [
        {"id": "7", "prompt": " p", "response": "r "},
        {"id": "x", "prompt": [USER], "response": "r"},
    ]
    answer = {"prompt": [USER], "response": [GOOD]}
    asked = [{"id": "file-1", "prompt": [USER], "response": GOOD["content"]}]
    assert records(table("demonstrations", answer)) == asked
    assert records(table("demonstrations", {"messages": [USER, GOOD]})) == asked
    beside = {"messages": [USER, GOOD], "prompt": USER["content"]}
    assert records(table("demonstrations", beside)) == asked


def test_prompts_of_texts_and_messages():
    rows = [{"prompt": "p"}, {"prompt": [USER, GOOD, USER]}]
    assert records(table("prompts", *rows)) == [
        {"id": "file-1", "prompt": "p"},
        {"id": "file-2", "prompt": [USER, GOOD, USER]},
    ]


def test_mapped_names_are_read_and_named_in_errors():
    names = {"prompt": "question", "response": "answer"}
    row = {"question": "q", "answer": "a"}
    assert records(table("demonstrations", row, names=names)) == [
        {"id": "file-1", "prompt": "q", "response": "a"}
    ]
    [fault] = table("demonstrations", row, {"question": "q", "answer": 3}, names=names).faults
    assert str(fault) == "my/file.jsonl, line 2, field 'answer': is a number, not text"


# --- preferences


def test_a_pair_with_its_optional_fields():
    row = {
        "id": "i",
        "prompt": "p",
        "chosen": "c",
        "rejected": "r",
        "annotator": 3,
        "margin": "0.5",
        "gold": True,
        "time": "2026-03-01",
        "source": "forum",
    }
    assert table("preferences", row).frame.to_dict("records") == [
        {"id": "i", "prompt": "p", "response_a": "c", "response_b": "r", "vote": "a"}
        | {"shown_first": "", "annotator": "3", "gold": True, "margin": 0.5}
        | {"time": "2026-03-01", "source": "forum", "ballot": 0}
    ]


def test_the_optional_fields_may_be_null_or_an_empty_cell():
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    optional = ("id", "annotator", "margin", "gold", "time", "source")
    null, empty = dict.fromkeys(optional), dict.fromkeys(optional, "")
    nan = dict.fromkeys(optional, math.nan)  # as pandas writes it
    assert records(table("preferences", row | null, row | empty, row | nan)) == [
        pair(n, "p", "c", "r") for n in (1, 2, 3)
    ]


VOTED = {"prompt": "p", "response_a": "A", "response_b": "B"}


@pytest.mark.parametrize(
    ("row", "outcomes"),
    [
        # annotator, vote and seconds, as in the argument pairs
        (
            {"votes": [["w1", "a", 12], ["w2", "b", 9], ["w3", "tie", 30]]},
            [("w1", "a"), ("w2", "b"), ("w3", "tie")],
        ),
        ({"votes": [{"annotator": 1, "vote": "B"}, {"vote": " Tie "}]}, [("1", "b"), ("", "tie")]),
        ({"votes": ["b", "a"]}, [("", "b"), ("", "a")]),
        ({"vote": "b", "annotator": "w9"}, [("w9", "b")]),
        ({"preference": "tie"}, [("", "tie")]),
        ({"votes": ["a"], "vote": "b"}, [("", "a")]),
    ],
)
def test_each_vote_becomes_a_preference(row, outcomes):
    found = table("preferences", VOTED | row)
    assert not found.faults
    assert found.rows == 1
    columns = ["id", "response_a", "response_b", "vote", "annotator"]
    assert found.frame[columns].to_numpy().tolist() == [
        ["file-1", "A", "B", vote, annotator] for annotator, vote in outcomes
    ]


def test_a_mapped_label_goes_before_votes_that_are_there_too():
    row = VOTED | {"votes": ["a", "a", "b"], "gold": "b"}
    [found] = records(table("preferences", row, names={"vote": "gold"}))
    assert found["vote"] == "b"


def test_anonymous_votes_are_told_apart_and_named_ones_are_not():
    votes = ["a", "b", "a", ["w1", "a"], ["w1", "a"]]
    frame = table("preferences", VOTED | {"votes": votes}).frame
    assert frame["ballot"].tolist() == [1, 1, 2, 0, 0]


def test_a_pair_without_votes_is_skipped_with_its_reason():
    found = table("preferences", VOTED | {"votes": []}, VOTED | {"votes": ["a"]})
    assert found.skipped == {"no votes": 1}
    assert len(found.frame) == 1


# A sample written by hand in the public format of HH-RLHF: no prompt, whole dialogues.
HH = [
    {
        "chosen": "\n\nHuman: Can eggs float?\n\nAssistant: Old ones do.\n\nThey hold air."
        "\n\nHuman: Why?\n\nAssistant: The shell lets gas in.",
        "rejected": "\n\nHuman: Can eggs float?\n\nAssistant: Old ones do.\n\nThey hold air."
        "\n\nHuman: Why?\n\nAssistant: I don't know.",
    },
    {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Bye\n\nAssistant: Bye!",
        "rejected": "\n\nHuman: Hi\n\nAssistant: What?\n\nHuman: Bye\n\nAssistant: Bye.",
    },
    {
        "chosen": "\n\nHuman: Human: and Assistant: are words\n\nAssistant: So they are.\n",
        "rejected": "\n\nHuman: Human: and Assistant: are words\n\nAssistant: No.",
    },
]


def test_dialogues_in_the_format_of_hh_rlhf(tmp_path):
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in HH), encoding="utf-8")
    found = parse(read_rows(str(path), split="train", subset="", limit=0), "preferences", {})
    eggs = [
        {"role": "user", "content": "Can eggs float?"},
        {"role": "assistant", "content": "Old ones do.\n\nThey hold air."},
        {"role": "user", "content": "Why?"},
    ]
    words = [{"role": "user", "content": "Human: and Assistant: are words"}]
    assert records(found) == [
        {
            "id": "hh-1",
            "prompt": eggs,
            "response_a": "The shell lets gas in.",
            "response_b": "I don't know.",
            "source": "hh.jsonl",
        },
        {"id": "hh-3", "prompt": words, "response_a": "So they are.", "response_b": "No."}
        | {"source": "hh.jsonl"},
    ]
    assert found.skipped == {"dialogues diverge before the last answer": 1}
    assert found.rows == 3


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, GOOD], "rejected": [USER, POOR]},
        {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, POOR]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, POOR]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [POOR]},
        {"prompt": [USER], "chosen": GOOD["content"], "rejected": POOR["content"]},
    ],
    ids=["no prompt", "ultrafeedback", "full dialogues", "answers alone", "answers as text"],
)
def test_pairs_of_messages(row):
    assert records(table("preferences", row)) == [pair(1, [USER], GOOD["content"], POOR["content"])]


def test_a_dialogue_keeps_what_stands_around_its_prompt():
    system = {"role": "system", "content": "Be brief."}
    row = {"prompt": f" {USER['content']}\n"}
    row |= {"chosen": [system, USER, GOOD], "rejected": [system, USER, POOR]}
    [found] = records(table("preferences", row))
    assert found["prompt"] == [system, USER]


# --- how a vote was cast


def cast(found):
    """Side shown first, gold, time and source of each vote."""
    assert not found.faults
    return found.frame[["shown_first", "gold", "time", "source"]].to_numpy().tolist()


def test_a_row_may_say_how_its_vote_was_cast():
    row = VOTED | {"vote": "b", "shown_first": " B ", "gold": "True"}
    row |= {"time": "2026-03-01T12:30Z", "source": 3}
    plain = VOTED | {"vote": "a"}
    assert cast(table("preferences", row, plain)) == [
        ["b", True, "2026-03-01T12:30Z", "3"],
        ["", False, "", "file.jsonl"],
    ]
    assert not table("preferences", row, plain).unread


def test_a_vote_in_a_list_may_say_it_itself_and_what_it_leaves_out_is_that_of_the_row():
    votes = [
        {"vote": "a", "shown_first": "a", "gold": False, "time": "2026-03-02"},
        {"vote": "b", "shown_first": None, "gold": None},
        {"vote": "tie", "shown_first": ""},  # says that it is not known
        ["w1", "a", 12],
    ]
    row = VOTED | {"votes": votes, "shown_first": "b", "gold": True, "time": "2026-03-01"}
    assert cast(table("preferences", row)) == [
        ["a", False, "2026-03-02", "file.jsonl"],
        ["b", True, "2026-03-01", "file.jsonl"],
        ["", True, "2026-03-01", "file.jsonl"],
        ["b", True, "2026-03-01", "file.jsonl"],
    ]


def test_a_time_of_a_parquet_file_is_written_as_text(tmp_path):
    when = datetime(2026, 3, 1, 12, 30)
    pd.DataFrame([VOTED | {"vote": "a", "time": when}]).to_parquet(tmp_path / "v.parquet")
    source = read_rows(str(tmp_path / "v.parquet"), split="train", subset="", limit=0)
    assert cast(parse(source, "preferences", {})) == [
        ["", False, "2026-03-01T12:30:00", "v.parquet"]
    ]


OTHER = {
    "shown_first": ("left", "'left' is not a side; a side is 'a' or 'b'"),
    "gold": ("b", "'b' is neither true nor false"),
    "time": (20260301, "20260301 is not a date and time such as 2026-03-01T12:30"),
    "source": ("x" * 300, f"'{'x' * 58}… is not a name"),
}
LIKE_OURS = {"shown_first": "a", "gold": True, "time": "2026-03-01", "source": "forum"}
NOT_READ = (
    "my/file.jsonl, line 3, field '{field}': {reason}, so the field is assumed to mean "
    "something else and is not read; if it is ours, map it in data.preferences.fields"
)


@pytest.mark.parametrize("field", OTHER)
def test_a_column_that_only_has_such_a_name_is_left_aside_and_said(field):
    value, reason = OTHER[field]
    rows = [VOTED | {"vote": "a", field: found} for found in (LIKE_OURS[field], None, value)]
    found = table("preferences", *rows)
    # Neither a bad row, nor half of the column.
    assert cast(found) == [["", False, "", "file.jsonl"]] * 3
    assert list(found.unread) == [NOT_READ.format(field=field, reason=reason)]


@pytest.mark.parametrize("field", ["shown_first", "gold", "time"])
def test_the_same_holds_for_the_votes_of_a_list(field):
    value, reason = OTHER[field]
    good, odd = ({"vote": "a", field: found} for found in (LIKE_OURS[field], value))
    found = table("preferences", *(VOTED | {"votes": [vote]} for vote in (good, good, odd)))
    assert cast(found) == [["", False, "", "file.jsonl"]] * 3
    assert list(found.unread) == [NOT_READ.format(field=field, reason=reason)]


@pytest.mark.parametrize(
    ("field", "value", "category", "reason"),
    [
        ("shown_first", "left", "unknown side", "'left' is not a side; a side is 'a' or 'b'"),
        ("shown_first", 1, "unknown side", "1 is not a side; a side is 'a' or 'b'"),
        ("gold", "b", "bad gold", "'b' is neither true nor false"),
        ("gold", 1, "bad gold", "1 is neither true nor false"),
        ("time", [1], "wrong type", "is neither text nor a number"),
        ("time", True, "wrong type", "is neither text nor a number"),
        ("source", {"a": 1}, "wrong type", "is neither text nor a whole number"),
        ("source", 0.5, "wrong type", "is neither text nor a whole number"),
        ("source", "\ud83d", "broken text", "has half of a surrogate pair"),
    ],
)
def test_a_mapped_field_is_read_and_what_is_wrong_in_it_is_a_bad_row(
    field, value, category, reason
):
    rows = [VOTED | {"vote": "a", "theirs": found} for found in (None, value)]
    found = table("preferences", *rows, names={field: "theirs"})
    [fault] = found.faults
    assert str(fault) == f"my/file.jsonl, line 2, field 'theirs': {reason}"
    assert fault.category == category
    assert len(found.frame) == 1
    assert not found.unread


def test_a_mapped_time_or_source_is_kept_as_it_came():
    names = {"time": "time", "source": "document"}
    times = (1700000000, 12.5, "yesterday", math.nan)
    rows = [VOTED | {"vote": "a", "time": t, "document": "x" * 300} for t in times]
    found = cast(table("preferences", *rows, names=names))
    assert [row[2] for row in found] == ["1700000000", "12.5", "yesterday", ""]
    assert {row[3] for row in found} == {"x" * 300}


def test_a_mapped_field_may_be_that_of_the_votes_in_a_list():
    votes = [{"vote": "a", "left": "b"}, {"vote": "a", "left": "right"}]
    rows = [VOTED | {"votes": [vote]} for vote in votes]
    found = table("preferences", *rows, names={"shown_first": "left"})
    assert found.frame["shown_first"].tolist() == ["b"]
    assert [str(fault) for fault in found.faults] == [
        "my/file.jsonl, line 2, field 'left': 'right' is not a side; a side is 'a' or 'b'"
    ]
    with pytest.raises(DataError, match=r"has no field 'first', which .* maps to 'shown_first'"):
        table("preferences", *rows, names={"shown_first": "first"})


def test_a_column_that_is_mapped_to_another_field_is_that_field_and_no_more():
    row = VOTED | {"vote": "a", "source": "w1", "time": "2026-03-01"}
    names = {"annotator": "source", "id": "time"}
    [found] = table("preferences", row, names=names).frame.to_dict("records")
    assert (found["annotator"], found["source"]) == ("w1", "file.jsonl")
    assert (found["id"], found["time"]) == ("2026-03-01", "")


def test_chosen_and_rejected_have_no_sides():
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "shown_first": "a"}
    found = table("preferences", row)
    assert records(found) == [pair(1, "p", "c", "r")]
    assert list(found.unread) == [
        "my/file.jsonl: chosen and rejected have no sides, so the field 'shown_first' is not read"
    ]
    with pytest.raises(DataError) as caught:
        table("preferences", row | {"first": "a"}, names={"shown_first": "first"})
    assert str(caught.value) == (
        "data.preferences.fields names 'first' of my/file.jsonl as the answer that was shown "
        "first, but chosen and rejected have no sides; use 'response_a', 'response_b' and "
        "'vote', or remove shown_first from the fields"
    )


def test_a_data_set_of_the_hub_is_the_source_of_its_rows():
    row = VOTED | {"vote": "a"}
    found = parse(SourceRows("Anthropic/hh-rlhf (train)", "row", [(1, row)]), "preferences", {})
    assert found.frame["source"].tolist() == ["hh-rlhf (train)"]


# --- bad rows

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
DIALOGUE = {"chosen": [USER, GOOD], "rejected": [USER, POOR]}
NO_DIALOGUE = (
    "is not a dialogue (messages, or turns that begin with 'Human:'/'Assistant:'), "
    "and the source has no prompt field"
)


VOTE = (
    "a vote is 'a', 'b' or 'tie', and data.preferences.votes says what other values mean, e.g. "
    "{a: 1, b: 0}"
)


@pytest.mark.parametrize(
    ("good", "bad", "category", "message"),
    [
        (PAIR, {"chosen": None}, "missing", "'chosen': is missing"),
        (PAIR, {"rejected": ...}, "missing", "'rejected': is missing"),
        (PAIR, {"chosen": 3}, "wrong type", "'chosen': is a number, not text"),
        (PAIR, {"chosen": True}, "wrong type", "'chosen': is a truth value, not text"),
        (PAIR, {"prompt": {"a": 1}}, "wrong type", "'prompt': is an object, not text"),
        (PAIR, {"prompt": ""}, "empty text", "'prompt': is empty"),
        (PAIR, {"chosen": " \n\t\u00a0"}, "empty text", "'chosen': is empty"),
        (PAIR, {"chosen": "x\ud83d"}, "broken text", "'chosen': has half of a surrogate pair"),
        (PAIR, {"annotator": 0.5}, "wrong type",
         "'annotator': is a number, not text or a whole number"),
        (PAIR, {"id": ["x"]}, "wrong type", "'id': is a list, not text or a whole number"),
        (PAIR, {"annotator": "w\ud83d"}, "broken text",
         "'annotator': has half of a surrogate pair"),
        (VOTED | {"votes": ["a"]}, {"votes": [["w\ud83d", "a"]]}, "broken text",
         "'votes': has half of a surrogate pair"),
        (PAIR, {"margin": "nan"}, "bad margin", "'margin': 'nan' is not a finite number"),
        (PAIR, {"margin": float("inf")}, "bad margin", "'margin': inf is not a finite number"),
        (PAIR, {"margin": "high"}, "bad margin", "'margin': 'high' is not a finite number"),
        (PAIR, {"margin": True}, "bad margin", "'margin': True is not a finite number"),
        (VOTED | {"votes": ["a"]}, {"votes": ["a", "c"]}, "unknown vote",
         "'votes': 'c' is not a vote; " + VOTE),
        (VOTED | {"votes": ["a"]}, {"votes": [["w1"]]}, "unknown vote",
         "'votes': ['w1'] is not a vote; " + VOTE),
        (VOTED | {"votes": ["a"]}, {"votes": [["w1", 1]]}, "unknown vote",
         "'votes': 1 is not a vote; " + VOTE),
        (VOTED | {"votes": ["a"]}, {"votes": "a"}, "wrong type",
         "'votes': is text, not a list of votes"),
        (VOTED | {"votes": ["a"]}, {"votes": None}, "missing", "'votes': is missing"),
        (VOTED | {"vote": "a"}, {"vote": None}, "missing", "'vote': is missing"),
        (VOTED | {"vote": "a"}, {"response_b": ""}, "empty text", "'response_b': is empty"),
        (DIALOGUE, {"chosen": "Hello."}, "bad messages", f"'chosen': {NO_DIALOGUE}"),
        (DIALOGUE, {"chosen": "\n\nHuman: Hi"}, "bad messages",
         "'chosen': does not end with an assistant message"),
        (DIALOGUE, {"chosen": "\n\nHuman: Hi\n\nAssistant: "}, "empty text",
         "'chosen': message 2 is empty"),
        (DIALOGUE, {"chosen": "\n\nAssistant: Hi"}, "bad messages",
         "'chosen': does not end with a user message to answer"),
        (DIALOGUE, {"chosen": []}, "empty text", "'chosen': is an empty list of messages"),
        (DIALOGUE, {"chosen": [USER, "x"]}, "bad messages",
         "'chosen': message 2 is not an object with role and content"),
        (DIALOGUE, {"chosen": [USER, {"role": "assistant"}]}, "bad messages",
         "'chosen': message 2 is not an object with role and content"),
        (DIALOGUE, {"chosen": [USER, {"role": "tool", "content": "x"}]}, "bad messages",
         "'chosen': message 2 has the role 'tool'; it must be system, user or assistant"),
        (DIALOGUE, {"chosen": [USER, {"role": "assistant", "content": ["x"]}]}, "wrong type",
         "'chosen': message 2 is a list, not text"),
        (DIALOGUE, {"rejected": [USER]}, "bad messages",
         "'rejected': does not end with an assistant message"),
        (DIALOGUE | {"prompt": [USER]}, {"prompt": [USER, GOOD]}, "bad messages",
         "'prompt': does not end with a user message to answer"),
        (DIALOGUE | {"prompt": [USER]}, {"prompt": "Other?"}, "bad messages",
         "'chosen': is a dialogue that does not contain the prompt"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_line_and_field(good, bad, category, message):
    row = {name: value for name, value in {**good, **bad}.items() if value is not ...}
    found = table("preferences", good, row, good)
    [fault] = found.faults
    assert str(fault) == f"my/file.jsonl, line 2, field {message}"
    assert fault.category == category
    assert len(found.frame) == 2


def test_unreadable_lines_are_faults_too_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p"}\n{"prompt": ""}\n?\n{"prompt": 1}\n', encoding="utf-8")
    found = parse(read_rows(str(path), split="train", subset="", limit=0), "prompts", {})
    assert [(fault.number, fault.category) for fault in found.faults] == [
        (2, "empty text"),
        (3, "unreadable"),
        (4, "wrong type"),
    ]
    assert found.rows == 4
    assert len(found.frame) == 1


@pytest.mark.parametrize(
    ("kind", "rows", "names", "message"),
    [
        ("prompts", [], {}, "f has no rows; check that it is the right file"),
        ("prompts", [{"q": "x", "n": 1}], {}, "f has no prompts: they need 'prompt', but its "
         "fields are: q, n; map the right ones in data.prompts.fields"),
        ("preferences", [{"chosen": "x"}], {}, "f has no preferences: they need 'chosen' and "
         "'rejected' (with 'prompt', or as whole dialogues), or 'prompt', 'response_a', "
         "'response_b' and 'votes' (or 'vote'), but its fields are: chosen; map the right ones in "
         "data.preferences.fields"),
        ("demonstrations", [{"response": "x"}], {}, "f has no demonstrations: they need 'prompt' "
         "and 'response', or 'messages', but its fields are: response; map the right ones in "
         "data.demonstrations.fields"),
        ("prompts", [{"q": "x"}], {"prompt": "question"}, "f has no field 'question', which "
         "data.prompts.fields maps to 'prompt'; its fields are: q"),
    ],
)  # fmt: skip
def test_a_source_without_the_fields_says_what_it_has_and_needs(kind, rows, names, message):
    with pytest.raises(DataError) as caught:
        parse(SourceRows("f", "line", list(enumerate(rows, 1))), kind, names)
    assert str(caught.value) == message


def test_a_file_of_another_format_gives_its_lines_as_faults(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("prompt,response\np,r\n", encoding="utf-8")
    source = read_rows(str(path), split="train", subset="", limit=0)
    found = parse(source, "demonstrations", {"prompt": "question"})
    assert [fault.number for fault in found.faults] == [1, 2]
    assert found.frame.empty


def test_the_columns_are_there_even_when_every_row_is_bad():
    frame = table("preferences", PAIR | {"chosen": ""}).frame
    assert isinstance(frame, pd.DataFrame)
    assert frame.empty
    assert "annotator" in frame.columns

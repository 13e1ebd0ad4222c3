"""Dialogues as people have them: other keys, parts, JSON or Python text in cells, tool calls."""

import csv
import json

import numpy as np
import pandas as pd
import pytest

from rlhf_core.data.formats import parse
from rlhf_core.data.forms.messages import messages, parsed, unpacked
from rlhf_core.data.forms.rows import Reading
from rlhf_core.data.sources import SourceRows, read_rows
from rlhf_core.data.vote_details import UnlikeError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": 'It\'s "why"\n{x}?'}
GOOD = {"role": "assistant", "content": "Because, [1]\ttrue: null."}
POOR = {"role": "assistant", "content": "No."}


def table(kind, *rows, **reading):
    source = SourceRows("f.jsonl", "line", list(enumerate(rows, 1)))
    return parse(source, kind, {}, Reading(**reading))


def test_messages_of_other_tools_are_read():
    sharegpt = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "p"},
        {"from": "gpt", "value": "r"},
    ]
    roles = [("system", "Be brief."), ("user", "p"), ("assistant", "r")]
    assert messages(sharegpt) == [{"role": role, "content": text} for role, text in roles]
    openai = [{"role": "developer", "content": "Be brief."}, {"role": "prompter", "content": "p"}]
    assert [message["role"] for message in messages(openai)] == ["system", "user"]


@pytest.mark.parametrize("empty", ["", "  \n", None, []])
def test_an_empty_system_message_is_none(empty):
    assert messages([{"role": "system", "content": empty}, USER]) == [USER]
    with pytest.raises(UnlikeError, match="message 1 is"):
        messages([{"role": "user", "content": empty}, USER])
    with pytest.raises(UnlikeError, match="has only an empty system message"):
        messages([{"role": "system", "content": empty}])


def test_content_in_parts_is_the_text_of_its_parts():
    parts = [{"type": "text", "text": "one "}, {"type": "input_text", "text": "two"}, {"text": "."}]
    assert messages([{"role": "user", "content": parts}])[0]["content"] == "one two."


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}},
         "message 1 has a part of type 'image_url'; only parts of text can be read"),
        ({"type": "image"}, "message 1 has a part of type 'image'; only parts of text can be read"),
        ({"type": "text", "text": "x", "image": "y"},
         "message 1 has a part of type 'image'; only parts of text can be read"),
        ({"type": ["text"], "text": "x"},
         "message 1 has a part of type ['text']; only parts of text can be read"),
        ({"type": "text", "text": None}, "message 1 part of text is missing"),
        ({"type": "text"}, "message 1 part of text is missing"),
        ({"type": "text", "text": 3}, "message 1 part of text is a number, not text"),
        ({"type": "text", "text": ""}, "message 1 is empty"),
        ({"type": "text", "text": "\ud800"}, "message 1 has half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_part_that_is_not_text_is_refused_by_name(part, reason):
    with pytest.raises(UnlikeError) as caught:
        messages([{"role": "user", "content": [part]}])
    assert str(caught.value) == reason


CALL = {"type": "function", "function": {"name": "find", "arguments": "{}"}}


@pytest.mark.parametrize("content", ["Let me look.", None, ...])
def test_a_tool_call_is_a_bad_row_whatever_stands_beside_it(content):
    answer = {"role": "assistant", "tool_calls": [CALL], "content": content}
    answer = {key: value for key, value in answer.items() if value is not ...}
    [fault] = table("demonstrations", {"messages": [USER, answer]}).faults
    assert str(fault) == (
        "f.jsonl, line 1, field 'messages': message 2 calls a tool ('tool_calls'), which cannot be "
        "trained on; `ignore: [tool_calls]` among the table's settings leaves it out"
    )


def test_what_a_message_has_beside_its_text_is_refused_or_left_out_on_purpose():
    filled = GOOD | {"name": "Ann", "weight": 0, "tool_calls": [], "refusal": None, "audio": {}}
    [fault] = table("demonstrations", {"messages": [USER, filled]}).faults
    assert fault.reason == (
        "message 2 has 'name', 'weight' beside role and content, which would be lost; `ignore: "
        "[name, weight]` among the table's settings leaves it out"
    )
    ignore = frozenset({"name", "weight"})
    found = table("demonstrations", {"messages": [USER, filled]}, ignore=ignore)
    assert found.frame["response"].tolist() == [GOOD["content"]]
    assert not found.faults


DIALOGUE = [SYSTEM, USER, GOOD]


@pytest.mark.parametrize(
    "cell",
    [
        json.dumps(DIALOGUE),
        json.dumps(DIALOGUE, indent=2),
        f"\n {json.dumps(DIALOGUE)} ",
        repr(DIALOGUE),
        str(np.array(DIALOGUE, dtype=object)),  # as pandas writes a column of arrays: no commas
    ],
    ids=["json", "indented", "spaces", "python", "numpy"],
)
def test_messages_written_as_text_are_messages(cell):
    assert unpacked(cell) == DIALOGUE


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        "[x] done",
        '{"a": 1}',
        '["role"]',
        "[]",
        "",
        "[{'text': 'x'}]",
        'Say [{"role": 1}]',
    ],
)
def test_other_text_stays_text(text):
    assert unpacked(text) == text
    found = table("demonstrations", {"prompt": "p", "response": text or "x"})
    assert found.frame["response"].tolist() == [text or "x"]


@pytest.mark.parametrize(
    "cell", ['[{"role": "user", "content": "p"', "[{'role': 'user', 'content': f()}]"]
)
def test_a_cell_that_begins_like_messages_and_breaks_off_is_a_bad_row(cell):
    [fault] = table("prompts", {"prompt": cell}, {"prompt": "p"}).faults
    assert (fault.number, fault.category) == (1, "bad messages")
    assert fault.reason.startswith("begins like messages in JSON or Python, but cannot be read")


def test_code_in_a_cell_is_not_run():
    assert parsed("__import__('os').getcwd()") is None
    assert parsed("[" * 100_000) is None


def test_a_csv_file_of_dialogues_is_read_as_one_of_json_lines(tmp_path):
    rows = [
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [POOR]},
        {"prompt": "plain", "chosen": "words", "rejected": "[no messages]"},
    ]
    with (tmp_path / "p.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row, dump in zip(rows, (json.dumps, str), strict=True):
            writer.writerow({name: dump(value) for name, value in row.items()})
    found = parse(
        read_rows(str(tmp_path / "p.csv"), split="train", subset="", limit=0), "preferences", {}
    )
    expected = table("preferences", *rows)
    columns = ["prompt", "response_a", "response_b", "vote"]
    pd.testing.assert_frame_equal(found.frame[columns], expected.frame[columns])
    assert not found.faults


def test_a_column_of_lists_of_texts_is_read_as_text_and_said():
    rows = [{"prompt": json.dumps([f"Why {n}?"])} for n in range(3)]
    found = table("prompts", *rows)
    assert found.frame["prompt"].tolist() == [row["prompt"] for row in rows]
    assert list(found.unread) == [
        "f.jsonl: the column 'prompt' holds lists or objects in JSON or Python that are no "
        "messages, "
        "so they are read as text with their brackets and quotes; if people did not write these, "
        "convert the column"
    ]
    assert not table("prompts", *rows, {"prompt": "Why?"}).unread
    assert not table("prompts", *({"prompt": f"{n}"} for n in range(3))).unread


def test_an_object_that_is_no_text_names_the_path_to_one():
    [fault] = table("prompts", {"prompt": {"n": 1, "text": "Why?"}}).faults
    assert fault.reason == (
        "is an object, not text; a dotted path in the fields reads a key of it, such as 'text'"
    )


def test_one_message_alone_is_a_dialogue_of_one():
    row = {"prompt": USER, "chosen": GOOD, "rejected": POOR}
    found = table("preferences", row)
    assert found.frame[["response_a", "response_b"]].to_numpy().tolist() == [
        [GOOD["content"], POOR["content"]]
    ]
    assert found.frame["prompt"].tolist() == [[USER]]


def test_a_prompt_in_the_format_of_hh_rlhf_is_a_dialogue():
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Why?\n\nAssistant:"
    [found] = table("prompts", {"prompt": prompt}).frame["prompt"]
    assert [(m["role"], m["content"]) for m in found] == [
        ("user", "Hi"),
        ("assistant", "Hello!"),
        ("user", "Why?"),
    ]
    whole = {"chosen": f"{prompt} Air.", "rejected": f"{prompt} No.", "prompt": prompt}
    assert table("preferences", whole).frame["response_a"].tolist() == ["Air."]
    for plain in ("Human: Hi", "Assistant:", "Write 'Human: x\n\nAssistant:'"):
        assert table("prompts", {"prompt": plain}).frame["prompt"].tolist() == [plain]


# --- prompts that two texts share


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Why? Air.", "Why? No.", ("Why?", " Air.", " No.")),
        ("Why? A light.", "Why? A lamp.", ("Why?", " A light.", " A lamp.")),
        ("Q: Why\nA: Air.", "Q: Why\nA: No.", ("Q: Why\nA:", " Air.", " No.")),
        ("Why\n\nAir", "Why\n\nNo", ("Why\n\n", "Air", "No")),
        ("3.5 or 3.6? One", "3.5 or 3.6? Two", ("3.5 or 3.6?", " One", " Two")),
        ("为什么？因为", "为什么？不", ("为什么？", "因为", "不")),
        ('He said "no." Yes', 'He said "no." Right', ('He said "no."', " Yes", " Right")),
    ],
)
def test_a_prompt_is_what_both_texts_share_up_to_a_safe_place(chosen, rejected, expected):
    found = table("preferences", {"chosen": chosen, "rejected": rejected})
    columns = ["prompt", "response_a", "response_b"]
    assert found.frame[columns].to_numpy().tolist() == [list(expected)]
    assert "up to its last end of a sentence or line, is taken as the prompt" in found.unread[0]


@pytest.mark.parametrize(
    ("chosen", "rejected", "field"),
    [
        ("Paris", "Rome", "chosen"),
        ("The city is Paris", "The city is Rome", "chosen"),
        ("Why? ", "Why? No.", "chosen"),
        ("Why? Air.", "Why? ", "rejected"),
    ],
)
def test_texts_without_a_safe_place_are_bad_rows(chosen, rejected, field):
    good = {"chosen": "Why? Air.", "rejected": "Why? No."}
    found = table("preferences", good, {"chosen": chosen, "rejected": rejected})
    [fault] = found.faults
    assert (fault.number, fault.field) == (2, field)
    assert len(found.frame) == 1

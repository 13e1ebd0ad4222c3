"""Columns, dotted paths and templates, and what is said of columns that are not read."""

import pytest

from rlhf_core.data.formats import parse
from rlhf_core.data.forms.fields import fill, find
from rlhf_core.data.forms.rows import Reading
from rlhf_core.data.sources import SourceRows
from rlhf_core.errors import DataError
from rlhf_core.settings.fields import names_in


def table(kind, *rows, names=None, **reading):
    source = SourceRows("f.jsonl", "line", list(enumerate(rows, 1)))
    found = parse(source, kind, names or {}, Reading(**reading))
    assert not found.faults, [str(fault) for fault in found.faults]
    return found


def prompts(found):
    return found.frame["prompt"].tolist()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("a", 1),
        ("b.c", "column"),  # a column of that name goes before the path
        ("b.d", 3),
        ("l.1.t", "two"),
        ("l.2.t", None),
        ("l.t", None),
        ("b.d.e", None),
        ("x", None),
    ],
)
def test_a_place_is_a_column_or_a_dotted_path(place, value):
    row = {"a": 1, "b.c": "column", "b": {"c": 2, "d": 3}, "l": [{"t": "one"}, {"t": "two"}]}
    assert find(row, place) == value


ALPACA = "Answer.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


@pytest.mark.parametrize(
    ("template", "texts", "filled"),
    [
        ("{p}", {"p": "x"}, "x"),
        ("Say: {p}!\n", {"p": "x"}, "Say: x!\n"),
        ("{p}\n{i}", {"p": "x", "i": "y"}, "x\ny"),
        ("{p}\n{i}", {"p": "x", "i": ""}, "x"),
        ("{s}\n\n{p}", {"p": "x", "s": ""}, "x"),
        ("{p} ({i})", {"p": "x", "i": ""}, "x ()"),  # the line has text of another name
        ("{p}\n{i}", {"p": "{i}", "i": "{p}"}, "{i}\n{p}"),  # a text is not a template
        ('{"q": "{p}"} {{p}} {}', {"p": "x"}, '{"q": "x"} {p} {}'),
        ("{a b.c-d/e}", {"a b.c-d/e": "x"}, "x"),
        (ALPACA, {"instruction": "I", "input": ""},
         "Answer.\n\n### Instruction:\nI\n\n### Response:\n"),
    ],
)  # fmt: skip
def test_a_template_is_filled_and_leaves_out_what_is_empty(template, texts, filled):
    assert set(names_in(template)) == texts.keys()
    assert fill(template, texts.__getitem__) == filled


ROW = {"q": "Why?", "more": "Be brief.", "a": "Air."}


def test_a_template_takes_any_column_and_a_field_may_be_one():
    names = {"prompt": "q", "response": "a"}
    for template in ("{prompt}\n{more}", "{q}\n{more}"):
        found = table("demonstrations", ROW, ROW | {"more": None}, names=names, template=template)
        assert prompts(found) == ["Why?\nBe brief.", "Why?"]
        assert not found.unread
    found = table("demonstrations", ROW, names={"prompt": "{q}\n{more}", "response": "{a} {a}"})
    assert found.frame[["prompt", "response"]].to_numpy().tolist() == [
        ["Why?\nBe brief.", "Air. Air."]
    ]
    assert not found.unread


def test_a_number_is_text_in_a_template_and_an_object_is_a_bad_row():
    rows = [{"prompt": "p", "n": 3}, {"prompt": "p", "n": {"x": 1}}]
    source = SourceRows("f.jsonl", "line", list(enumerate(rows, 1)))
    found = parse(source, "prompts", {}, Reading(template="{prompt} {n}"))
    assert prompts(found) == ["p 3"]
    assert [str(fault) for fault in found.faults] == [
        "f.jsonl, line 2, field 'n': is an object, not text that a template can take"
    ]


def test_a_source_that_lacks_what_the_template_names_says_so():
    found = table("prompts", {"prompt": "p"}, template="{prompt}\n{more}")
    assert prompts(found) == ["p"]
    assert found.lacks == {"more"}
    assert list(found.unread) == [
        "f.jsonl does not have more, which data.prompt_template names, so its prompts are without "
        "it"
    ]
    found = table("prompts", {"prompt": "p"}, template="{q}\n{more}")
    assert prompts(found) == ["p"]
    assert list(found.unread) == [
        "f.jsonl does not have q, more, which data.prompt_template is made of, so its prompts are "
        "used as they are"
    ]


def test_a_template_that_messages_do_not_take_reads_no_column():
    row = {"prompt": [{"role": "user", "content": "p"}], "more": "x"}
    found = table("prompts", row, template="{prompt}\n{more}")
    assert prompts(found) == [row["prompt"]]
    assert list(found.unread) == [
        "f.jsonl: its prompts are messages, to which data.prompt_template is not applied, so more "
        "is not read"
    ]
    assert not table("prompts", row, {"prompt": "p"}, template="{prompt}\n{more}").unread


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "p"}


@pytest.mark.parametrize(
    ("prompt", "reading", "expected"),
    [
        ("p", {}, "Be brief.\n\np"),
        ("p", {"template": "<{prompt}>"}, "Be brief.\n\n<p>"),
        ("p", {"template": "{prompt}\n({system})"}, "p\n(Be brief.)"),
        ("p", {"style": "chat"}, [SYSTEM, USER]),
        ("p", {"style": "chat", "template": "{prompt} {system}"},
         [{"role": "user", "content": "p Be brief."}]),
        ([USER], {}, [SYSTEM, USER]),
        ([SYSTEM, USER], {}, [SYSTEM, USER]),
    ],
)  # fmt: skip
def test_a_system_column_is_a_system_message(prompt, reading, expected):
    row = {"prompt": prompt, "system": "Be brief."}
    empty = row | {"system": " "}
    found = table("prompts", row, empty, **reading)
    assert prompts(found)[0] == expected
    alone = table("prompts", {"prompt": prompt}, **reading)
    assert prompts(found)[1] == prompts(alone)[0]
    asked = "{system}" in reading.get("template", "")
    assert [note[:56] for note in found.unread] == (
        [] if asked else ["f.jsonl: the column 'system' (1 of 2 rows filled) is put"]
    )
    assert prompts(table("prompts", row, ignore=frozenset({"system"}), **reading)) == prompts(alone)


def test_a_system_column_may_be_something_else_or_contradict():
    found = table("prompts", {"prompt": "p", "system": {"os": "linux"}})
    assert prompts(found) == ["p"]
    assert "line 1, field 'system': is not text, so the field is assumed" in found.unread[0]
    other = {"prompt": [SYSTEM, USER], "system": "Be long."}
    [fault] = parse(SourceRows("f", "line", [(1, other)]), "prompts", {}).faults
    assert str(fault) == (
        "f, line 1, field 'system': is another system message than that of the dialogue"
    )


UNREAD = {
    "input": "words",
    "count": 3,
    "digits": "12.5",
    "flag": "true",
    "tools": [{"name": "find"}],
    "empty": "",
    "nothing": None,
    "rows": [],
}


def test_columns_that_hold_text_and_are_not_read_are_named_with_how_many_are_filled():
    found = table("prompts", {"prompt": "p"} | UNREAD, {"prompt": "q", "input": " "})
    assert list(found.unread) == [
        "f.jsonl: the columns input (1 of 2 rows filled), tools (1 of 2 rows filled) hold text "
        'that is not read; data.prompt_template (such as "{prompt}\\n{input}") puts it into '
        "the prompt, "
        "data.prompts.fields reads it as another field, and data.prompts.ignore leaves it out "
        "without this note"
    ]
    assert not table(
        "prompts", {"prompt": "p"} | UNREAD, ignore=frozenset({"input", "tools"})
    ).unread


def test_keys_of_an_object_that_is_read_in_part_are_named_too():
    row = {"data": {"prompt": "p", "context": "words", "n": 1}}
    [note] = table("prompts", row, names={"prompt": "data.prompt"}).unread
    assert "the column data.context (1 of 1 rows filled) holds text that is not read" in note


def test_entries_of_a_list_beyond_those_that_are_mapped_are_said():
    row = {"l": [{"t": "p"}, {"t": "q"}]}
    found = table("prompts", row, {"l": [{"t": "p"}]}, names={"prompt": "l.0.t"})
    assert prompts(found) == ["p", "p"]
    assert list(found.unread) == [
        "f.jsonl: the list 'l' has more entries than data.prompts.fields reads in 1 of 2 rows; the "
        "others are not read"
    ]
    assert not table("prompts", row, names={"prompt": "{l.0.t} {l.1.t}"}).unread


def test_a_hostile_name_of_a_column_is_shown_short_and_without_control_characters():
    [note] = table("prompts", {"prompt": "p", "\x1b[31m" + "x" * 10_000: "words"}).unread
    assert "\x1b" not in note
    assert len(note) < 600
    [note] = table("prompts", {"prompt": "p"} | {f"c{n}": "words" for n in range(1000)}).unread
    assert "c11 (1 of 1 rows filled) and 988 more" in note


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"prompt": "q.text"}, "f.jsonl has no field 'q.text', which data.prompts.fields maps to"),
        ({"prompt": "{q}\n{more}"}, "f.jsonl has no field 'more', which data.prompts.fields maps"),
    ],
)
def test_a_place_that_no_row_has_is_an_error(names, message):
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        table("prompts", {"q": "p"}, names=names)


def test_a_mapped_field_that_has_no_meaning_here_is_an_error():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "who": "a"}
    with pytest.raises(DataError) as caught:
        table("preferences", row, names={"vote": "who"})
    assert str(caught.value) == (
        "data.preferences.fields maps 'vote', but f.jsonl is read by chosen and rejected, beside "
        "which it has no meaning; remove one of them from the fields"
    )
    with pytest.raises(DataError, match=r"score_margin is set, but f\.jsonl is read by chosen"):
        table("preferences", row, score_margin=1.0)
    with pytest.raises(
        DataError, match=r"votes says what values .* but f\.jsonl is read by chosen"
    ):
        table("preferences", row, votes={"1": "a"})
    # Two answers that are called chosen and rejected, with a vote of their own.
    names = {"response_a": "chosen", "response_b": "rejected", "vote": "who"}
    assert table("preferences", row | {"who": "b"}, names=names).frame["vote"].tolist() == ["b"]

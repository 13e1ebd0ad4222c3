"""Rows of random values in every form: each is an example, a bad row or a reason, never a crash."""

import json
import math
import random
from datetime import UTC, date, datetime
from decimal import Decimal

import pytest

from rlhf_core.data.formats import parse
from rlhf_core.data.forms.rows import Reading
from rlhf_core.data.forms.table import FORMS
from rlhf_core.data.prepared import COLUMNS
from rlhf_core.data.sources import SourceRows
from rlhf_core.errors import DataError
from rlhf_core.settings.fields import FIELDS, TABLE_KINDS

MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Air."}]
ATOMS = [
    *(None, True, False, 0, 1, -1, 17.0, 0.5, math.nan, math.inf, 10**30, Decimal(17), b"\xff"),
    *("", " ", "a", "b", "tie", "Why? Air.", "17.0", "nan", "\ud800", "\x1b[2J", "x" * 5000, "{p}"),
    *("\n\nHuman: Hi\n\nAssistant: Ho", "\n\nHuman: Hi\n\nAssistant:", "Human:", "[", "[{'role':"),
    *(date(2026, 3, 1), datetime(2026, 3, 1, tzinfo=UTC), [], {}, [[]], [None], (("a", 1),)),
    *(MESSAGES, MESSAGES[:1], MESSAGES[1], json.dumps(MESSAGES), str(MESSAGES)),
    *([{"role": "system", "content": ""}], [{"role": None, "content": None}], {"role": ["x"]}),
    *([{"from": "gpt", "value": [{"type": "text", "text": "x"}]}], [{"role": "user"}, "x"]),
    *([["w", "a"]], [{"vote": "a", "annotator": math.nan}], [{"answer": "x", "rank": 1}] * 2),
]


def value(random):
    if random.random() < 0.7:
        return random.choice(ATOMS)
    if random.random() < 0.5:
        return [random.choice(ATOMS) for _ in range(random.randrange(4))]
    keys = ("role", "content", "from", "value", "vote", "answer", "rank", "score", "type", "text")
    return {random.choice(keys): random.choice(ATOMS) for _ in range(random.randrange(4))}


FORMS_OF_ALL = [(kind, form) for kind in TABLE_KINDS for form in FORMS[kind]]


@pytest.mark.parametrize("style", ["text", "chat"])
@pytest.mark.parametrize(
    ("kind", "form"),
    FORMS_OF_ALL,
    ids=[f"{kind} {' '.join(sorted(form.needs))}" for kind, form in FORMS_OF_ALL],
)
def test_a_row_of_any_values_is_an_example_or_a_bad_row(kind, form, style):
    draw = random.Random(f"{kind}{sorted(form.needs)}")
    rows = []
    for n in range(300):
        row = {field: value(draw) for field in form.needs}
        row |= {field: value(draw) for field in FIELDS[kind] if draw.random() < 0.1}
        row |= {f"more{draw.randrange(3)}": value(draw)}
        rows.append((n, row))
    template = draw.choice(["{prompt}", "{prompt}\n{more1}", "{more1} {system}"])
    found = parse(SourceRows("f", "row", rows), kind, {}, Reading(template=template, style=style))
    assert len(found.frame) + len(found.faults) > 0
    for fault in found.faults:
        assert "\x1b" not in str(fault)
        assert len(str(fault)) < 600
        str(fault).encode()
    for note in found.unread:
        assert "\x1b" not in note
        note.encode()
    # What is kept can be written, and says something.
    for record in found.frame[list(COLUMNS[kind])].to_dict("records"):
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        for name in ("prompt", "response", "response_a", "response_b"):
            texts = record.get(name, "x")
            for text in [texts] if isinstance(texts, str) else [m["content"] for m in texts]:
                assert text.strip()


def test_random_names_of_fields_are_read_or_refused_in_a_sentence():
    draw = random.Random(7)
    places = [
        "a",
        "b.c",
        "b.0",
        "l.0",
        "l.9.x",
        "{a}",
        "{a}\n{b.c}",
        "{",
        "}",
        "",
        ".",
        "a.",
        "{{a}}",
    ]
    row = {"a": "Why? x", "b": {"c": "y", "0": "z"}, "l": ["u", {"x": 1}], "": "e", "{": "f"}
    outcomes = set()
    for _ in range(500):
        kind = draw.choice(TABLE_KINDS)
        chosen = draw.sample(FIELDS[kind], draw.randrange(1, 4))
        names = {field: draw.choice(places) for field in chosen}
        try:
            found = parse(SourceRows("f", "row", [(1, row)]), kind, names)
            outcomes.add("bad row" if found.faults else "read")
        except DataError:
            outcomes.add("refused")
    assert outcomes == {"read", "bad row", "refused"}

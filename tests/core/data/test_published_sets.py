"""Published data sets on small files of their shape: what their line of config makes of them."""

import json
import re
from pathlib import Path

import pytest
import yaml

from rlhf_core.data.formats import parse
from rlhf_core.data.forms.published import PUBLISHED
from rlhf_core.data.sources import read_rows
from rlhf_core.errors import DataError
from rlhf_core.settings.data import DataConfig
from rlhf_core.stages.prepare import reading_of

DATA_PAGE = Path(__file__).parents[3] / "docs" / "data.md"


def said(role, content):
    return {"role": role, "content": content}


ASK, GOOD, POOR = said("user", "Why?"), said("assistant", "Air."), said("assistant", "No.")
CHAT = [ASK]


def pref(prompt, a, b, vote, annotator=""):
    return {
        "prompt": prompt,
        "response_a": a,
        "response_b": b,
        "vote": vote,
        "annotator": annotator,
    }


def shown(prompt, response):
    return {"prompt": prompt, "response": response}


RATED = [
    {"prompt": "Why?", "response": "Air.", "helpfulness": 4, "correctness": 4},
    {"prompt": "Why?", "response": "No.", "helpfulness": 1, "correctness": 4},
    {"prompt": "How?", "response": "So.", "helpfulness": 2, "correctness": 4},
]
TREE = [
    {"message_id": "q", "parent_id": None, "text": "Why?", "role": "prompter", "rank": None},
    {"message_id": "x", "parent_id": "q", "text": "No.", "role": "assistant", "rank": 1},
    {"message_id": "y", "parent_id": "q", "text": "Air.", "role": "assistant", "rank": 0},
    {"message_id": "z", "parent_id": "y", "text": "And?", "role": "prompter", "rank": None},
    {"message_id": "w", "parent_id": "z", "text": "Light.", "role": "assistant", "rank": None},
]
DEEPER = {"text": "And?", "role": "prompter", "replies": [{"text": "Light.", "role": "assistant"}]}
REPLIES = [
    {"text": "No.", "role": "assistant", "rank": 1, "replies": []},
    {"text": "Air.", "role": "assistant", "rank": 0, "replies": [DEEPER]},
]
NESTED = [
    {
        "message_tree_id": "t",
        "tree_state": "ready",
        "prompt": {"text": "Why?", "role": "prompter", "replies": REPLIES},
    }
]
# Rows in the shape of each set, what becomes of them, and what is left out.
SHAPES = {
    ("Alpaca", "demonstrations"): (
        [
            {"instruction": "Sum up.", "input": "A day.", "output": "Day."},
            {"instruction": "Why?", "input": "", "output": "Air."},
        ],
        [shown("Sum up.\nA day.", "Day."), shown("Why?", "Air.")],
    ),
    ("ShareGPT", "demonstrations"): (
        [{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Air."}]}],
        [shown(CHAT, "Air.")],
    ),
    ("TRL prompt-completion", "demonstrations"): (
        [
            {"prompt": "Why?", "completion": " Air."},
            {"prompt": [ASK], "completion": [GOOD]},
        ],
        [shown("Why?", " Air."), shown(CHAT, "Air.")],
    ),
    ("OASST", "demonstrations"): (
        TREE,
        [shown(CHAT, "Air."), shown([ASK, GOOD, said("user", "And?")], "Light.")],
        {"replies that are not the best": 1},
    ),
    ("TRL implicit prompts", "preferences"): (
        [{"chosen": "Why? Air.", "rejected": "Why? No."}],
        [pref("Why?", " Air.", " No.", "a")],
    ),
    ("TRL implicit prompts, messages", "preferences"): (
        [{"chosen": [ASK, GOOD], "rejected": [ASK, POOR]}],
        [pref(CHAT, "Air.", "No.", "a")],
    ),
    ("HH-RLHF", "preferences"): (
        [
            {
                "chosen": "\n\nHuman: Why?\n\nAssistant: Air.",
                "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
            }
        ],
        [pref(CHAT, "Air.", "No.", "a")],
    ),
    ("UltraFeedback, binarized", "preferences"): (
        [{"prompt": "Why?", "chosen": [ASK, GOOD], "rejected": [ASK, POOR], "score_chosen": 8.5}],
        [pref(CHAT, "Air.", "No.", "a")],
    ),
    ("UltraFeedback with all completions", "preferences"): (
        [
            {
                "instruction": "Why?",
                "completions": [
                    {"model": "m", "response": "No.", "overall_score": 2.0},
                    {"model": "n", "response": "Air.", "overall_score": 8.5},
                ],
            }
        ],
        [pref("Why?", "No.", "Air.", "b")],
    ),
    ("Nectar", "preferences"): (
        [
            {
                "prompt": "\n\nHuman: Why?\n\nAssistant: ",
                "answers": [
                    {"answer": "Air.", "model": "m", "rank": 1.0},
                    {"answer": "No.", "model": "n", "rank": 3.0},
                    {"answer": "Light.", "model": "o", "rank": 3.0},
                ],
            }
        ],
        [
            pref(CHAT, "Air.", "No.", "a"),
            pref(CHAT, "Air.", "Light.", "a"),
            pref(CHAT, "No.", "Light.", "tie"),
        ],
    ),
    ("HelpSteer 2", "preferences"): (
        RATED,
        [pref("Why?", "Air.", "No.", "a")],
        {"no other answer to the prompt that is rated otherwise": 1},
    ),
    ("HelpSteer 3", "preferences"): (
        [
            {"context": [ASK], "response1": "Air.", "response2": "No.", "overall_preference": score}
            for score in (-3, 0, 1)
        ],
        [pref(CHAT, "Air.", "No.", vote) for vote in ("a", "tie", "b")],
    ),
    ("SHP", "preferences"): (
        [
            {"history": "Why?", "human_ref_A": "Air.", "human_ref_B": "No.", "labels": label}
            for label in (1, 0)
        ],
        [pref("Why?", "Air.", "No.", "a"), pref("Why?", "Air.", "No.", "b")],
    ),
    ("KTO", "preferences"): (
        [
            {"prompt": "Why?", "completion": "No.", "label": False},
            {"prompt": "How?", "completion": "So.", "label": True},
            {"prompt": "Why?", "completion": "Air.", "label": True},
            {"prompt": "Why?", "completion": "Light.", "label": True},
        ],
        [pref("Why?", "No.", "Air.", "b"), pref("Why?", "No.", "Light.", "b")],
        {"no other answer to the prompt that is rated otherwise": 1},
    ),
    ("Chatbot Arena", "preferences"): (
        [
            {"conversation_a": [ASK, GOOD], "conversation_b": [ASK, POOR], "winner": winner}
            for winner in ("model_a", "model_b", "tie", "tie (bothbad)")
        ],
        [pref(CHAT, "Air.", "No.", vote) for vote in ("a", "b", "tie", "tie")],
    ),
    ("OASST", "preferences"): (
        TREE,
        [pref(CHAT, "Air.", "No.", "a")],
        {"no other ranked reply to the message": 1},
    ),
    ("OASST trees", "demonstrations"): (
        NESTED,
        [shown(CHAT, "Air."), shown([ASK, GOOD, said("user", "And?")], "Light.")],
        {"replies that are not the best": 1},
    ),
    ("OASST trees", "preferences"): (
        NESTED,
        [pref(CHAT, "Air.", "No.", "a")],
        {"no other ranked reply to the message": 1},
    ),
    ("Orca pairs", "preferences"): (
        [
            {"system": "", "question": "Why?", "chosen": "Air.", "rejected": "No."},
            {"system": "Be brief.", "question": "Why?", "chosen": "Air.", "rejected": "No."},
        ],
        [pref("Why?", "Air.", "No.", "a"), pref("Be brief.\n\nWhy?", "Air.", "No.", "a")],
    ),
    ("PKU-SafeRLHF", "preferences"): (
        [{"prompt": "Why?", "response_0": "Air.", "response_1": "No.", "better_response_id": 1}],
        [pref("Why?", "Air.", "No.", "b")],
    ),
    ("OpenAI's summaries", "preferences"): (
        [
            {
                "info": {"post": "Why?", "id": "t3"},
                "summaries": [{"text": "Air.", "policy": "p"}, {"text": "No.", "policy": "q"}],
                "choice": 0,
            }
        ],
        [pref("Why?", "Air.", "No.", "a")],
    ),
    ("WebGPT", "preferences"): (
        [
            {"question": {"full_text": "Why?"}, "answer_0": "Air.", "answer_1": "No."}
            | {"score_0": score, "score_1": -score}
            for score in (0.5, 0.0)
        ],
        [pref("Why?", "Air.", "No.", "a"), pref("Why?", "Air.", "No.", "tie")],
    ),
    ("Label Studio", "preferences"): (
        [
            {
                "id": 7,
                "data": {"prompt": "Why?", "answer1": "Air.", "answer2": "No."},
                "annotations": [
                    {"completed_by": who, "result": [{"value": {"selected": side}}]}
                    for who, side in ((1, "left"), (2, "right"))
                ],
            }
        ],
        [pref("Why?", "Air.", "No.", "a", "1"), pref("Why?", "Air.", "No.", "b", "2")],
    ),
    ("Argilla", "preferences"): (
        [
            {
                "fields": {"instruction": "Why?", "response1": "Air.", "response2": "No."},
                "responses": {"preference": [{"value": "response2", "user_id": "u1"}]},
            }
        ],
        [pref("Why?", "Air.", "No.", "b", "u1")],
    ),
}


def settings_of(name, kind):
    """The line of config of a set; empty for a set that needs none."""
    return next((p.settings for p in PUBLISHED if (p.name, p.kind) == (name, kind)), "")


def read(path, kind, settings):
    table = yaml.safe_load(f"{{path: {path}, {settings}}}")
    config = DataConfig(source="files", **{kind: table})
    source = read_rows(str(path), split="train", subset="", limit=0)
    return parse(source, kind, config.table(kind).fields, reading_of(config, kind))


@pytest.mark.parametrize(("name", "kind"), SHAPES)
def test_a_published_set_is_read_by_its_line_of_config(name, kind, tmp_path):
    rows, expected, *left_out = SHAPES[name, kind]
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = read(path, kind, settings_of(name, kind))
    assert [str(fault) for fault in found.faults] == []
    assert found.frame[list(expected[0])].to_dict("records") == expected
    assert found.skipped == (left_out[0] if left_out else {})
    assert found.frame["id"].is_unique or kind == "preferences"


@pytest.mark.parametrize("known", PUBLISHED, ids=lambda known: f"{known.name} {known.kind}")
def test_without_its_line_the_error_has_the_line(known, tmp_path):
    path = tmp_path / "set.jsonl"
    rows = SHAPES[known.name, known.kind][0]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read(path, known.kind, "")
    assert f"by {{path: ..., {known.settings}}}" in str(caught.value)


def test_a_set_of_another_table_is_named_with_that_table(tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Air."}]
    path.write_text(json.dumps({"conversations": turns}) + "\n")
    with pytest.raises(DataError, match=r"ShareGPT, which data\.demonstrations reads by"):
        read(path, "preferences", "")


def test_the_page_lists_every_set_with_its_line():
    rows = re.findall(
        r"^\| ([^|]+) \| (demonstrations|preferences) \| (?:`([^|]+)`|nothing) \| [^|]+ \|$",
        DATA_PAGE.read_text(encoding="utf-8"),
        re.M,
    )
    assert {(name, kind): line for name, kind, line in rows} == {
        key: settings_of(*key) for key in SHAPES
    }
    assert {(known.name, known.kind) for known in PUBLISHED} <= SHAPES.keys()

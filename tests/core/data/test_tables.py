"""No prompt on two sides, whatever the tables hold."""

import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.data.assembly import assemble, fill, shared_prompts, split_by_prompt
from rlhf_core.data.formats import ParsedSource
from rlhf_core.data.prepared import COLUMNS
from rlhf_core.data.sources import Fault
from rlhf_core.settings.fields import TABLE_KINDS, TableKind

ANSWERS = {
    "demonstrations": {"response": "r"},
    "preferences": {"response_a": "c", "response_b": "r", "vote": "a", "annotator": ""},
    "prompts": {},
}


def source(kind, prompts, name="f"):
    """A parsed source; every row is distinct, so that none is dropped."""
    rows = [
        {"id": f"{name}-{n}", "prompt": prompt, "ballot": 0, **ANSWERS[kind]}
        for n, prompt in enumerate(prompts)
    ]
    for n, row in enumerate(rows):
        row.update({text: f"{text} {n}" for text in ("response", "response_a") if text in row})
    frame = pd.DataFrame(rows, columns=[*COLUMNS[kind], "ballot"], dtype=object)
    return ParsedSource(frame, name, len(rows), (), {})


def prompt_of(text, chat):
    return [{"role": "user", "content": text}] if chat else text


prompts = st.lists(st.builds(prompt_of, st.sampled_from("abcdefgh"), st.booleans()), max_size=12)


@settings(deadline=None)  # the machine may be busy
@given(
    st.fixed_dictionaries(dict.fromkeys(TABLE_KINDS, prompts)),
    st.integers(0, 100),
    st.floats(0.05, 0.95),
)
def test_a_prompt_is_on_one_side_in_all_tables(given_prompts, seed, fraction):
    tables = {kind: assemble(kind, {"": source(kind, given_prompts[kind])}) for kind in TABLE_KINDS}
    found = split_by_prompt(tables, fraction, seed)
    assert shared_prompts(found) == []
    for kind in TABLE_KINDS:
        sides = found[kind].frame.groupby("key")["split"].agg(set)
        assert all(side in ({"train"}, {"eval"}) for side in sides)
        assert len(found[kind].frame) == len(tables[kind].frame)


@settings(deadline=None)  # the machine may be busy
@given(prompts, prompts, prompts, st.integers(0, 100))
def test_evaluation_data_of_the_user_decide_for_the_other_tables(train, evaluation, free, seed):
    held = {prompt if isinstance(prompt, str) else prompt[0]["content"] for prompt in evaluation}
    taken = {prompt if isinstance(prompt, str) else prompt[0]["content"] for prompt in train}
    pairs: TableKind = "preferences"
    parts = {"train": source(pairs, train, "t"), "eval": source(pairs, evaluation, "e")}
    tables = {
        pairs: assemble(pairs, parts),
        "prompts": assemble("prompts", {"": source("prompts", free)}),
    }
    found = split_by_prompt(tables, 0.5, seed)
    assert shared_prompts(found) == sorted(held & taken)
    sides = found["prompts"].frame.set_index("key")["split"].to_dict()
    assert all(sides[key] == "eval" for key in held & sides.keys())
    assert all(sides[key] == "train" for key in (taken - held) & sides.keys())


def test_a_prompt_on_both_sides_is_not_dropped_as_a_duplicate():
    parts = {"train": source("prompts", ["a", "b"]), "eval": source("prompts", ["a"])}
    found = split_by_prompt({"prompts": assemble("prompts", parts)}, 0.5, 0)
    assert found["prompts"].dropped == {}
    assert shared_prompts(found) == ["a"]


def test_tables_that_were_not_brought_come_from_the_preferences():
    columns = ["id", "prompt", "response_a", "response_b", "vote", "annotator", "ballot"]
    rows = [
        ("1", "p", "A", "B", "a", "w1", 0),
        ("1", "p", "B", "A", "b", "w2", 0),  # the same answer won twice: one demonstration
        ("1", "p", "A", "B", "b", "w3", 0),  # the other one won once: another
        ("2", "q", "C", "D", "tie", "w1", 0),  # nobody won: no demonstration, but a prompt
    ]
    frame = pd.DataFrame(rows, columns=columns, dtype=object).assign(shown_first="")
    pairs = ParsedSource(frame, "f", 2, (), {})
    found = fill(split_by_prompt({"preferences": assemble("preferences", {"": pairs})}, 0.5, 0))
    assert list(found) == list(TABLE_KINDS)
    answers = found["demonstrations"].frame[["id", "prompt", "response"]].to_numpy().tolist()
    assert answers == [["1", "p", "A"], ["1", "p", "B"]]
    assert found["prompts"].frame[["id", "prompt"]].to_numpy().tolist() == [["1", "p"], ["2", "q"]]
    sides = pd.concat([table.frame for table in found.values()]).groupby("key")["split"].nunique()
    assert sides.to_dict() == {"p": 1, "q": 1}


def test_given_demonstrations_add_their_prompts():
    tables = {
        "preferences": assemble("preferences", {"": source("preferences", ["p"])}),
        "demonstrations": assemble("demonstrations", {"": source("demonstrations", ["q", " p"])}),
    }
    found = fill(split_by_prompt(tables, 0.5, 0))
    assert found["prompts"].frame["key"].tolist() == ["p", "q"]


def test_sources_of_a_table_are_joined_with_all_that_was_dropped():
    fault = Fault("f", "line", 3, "prompt", "empty text", "is empty")
    train = source("prompts", ["a", "b", "a"])
    train = ParsedSource(train.frame, "f", 4, [fault], {"no votes": 2})
    found = assemble("prompts", {"train": train, "eval": source("prompts", ["c"], "g")})
    assert found.source == "f and g"
    assert found.rows == 5
    assert found.dropped == {"duplicate": 1, "empty text": 1, "no votes": 2}
    assert found.bad_rows == ("f, line 3, field 'prompt': is empty",)
    assert found.side("train")["key"].tolist() == ["a", "b"]
    assert found.side("eval")["id"].tolist() == ["g-0"]

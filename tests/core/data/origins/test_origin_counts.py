"""Who and what is behind the prepared rows, counted beside the tables and never in their digest."""

import json
from collections import Counter

import pandas as pd
import pytest

from rlhf_core.data.formats import parse
from rlhf_core.data.forms.rows import Reading
from rlhf_core.data.origins.counts import (
    FILE,
    NOWHERE,
    Origin,
    Origins,
    count_tables,
    half_of,
)
from rlhf_core.data.origins.of_votes import OriginsOfVotes, file_beside, write_beside
from rlhf_core.data.pairs import select_votes, with_winners
from rlhf_core.data.prepared import SPLITS, digest, prompt_key, read_table
from rlhf_core.data.sources import SourceRows
from rlhf_core.errors import DataError
from rlhf_core.settings.data import DataConfig, LengthLimits
from rlhf_core.settings.model import FreshModelConfig, ModelConfig
from rlhf_core.stages.prepare import prepare_data
from rlhf_core.work import Work

SECTIONS = {
    "model": ModelConfig(fresh=FreshModelConfig(vocab_size=300)),
    "limits": LengthLimits(prompt=64, sft=128, reward=128, response=48),
}
LICENCES = ("MIT", "CC BY 4.0", "")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def vote(n):
    """Forty prompts with three votes each, by five people, from two places."""
    return {
        "prompt": f"Question {n // 3}?",
        "response_a": "yes indeed",
        "response_b": f"no {n // 3}",
        "vote": ("a", "b", "tie")[n % 7 % 3],
        "annotator": f"p{n % 5}",
        "source": ("forum", "shop")[n // 3 % 2],
        "licence": LICENCES[n // 3 % 3],
    }


@pytest.fixture
def prepared(tmp_path):
    def _prepare(seed=0, **tables):
        output = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        config = DataConfig(source="files", eval_fraction=0.3, **tables)
        report = prepare_data(config, Work(outputs={"data": output}, sections=SECTIONS, seed=seed))
        return output, Origins.read(output / FILE), report

    return _prepare


@pytest.fixture
def votes(tmp_path):
    return write(tmp_path / "votes.jsonl", [vote(n) for n in range(120)])


def rows(origins, table, **where):
    return sum(
        count.rows
        for count in origins.counts
        if count.table == table
        and all(
            value in found if isinstance(found := getattr(count, name), tuple) else value == found
            for name, value in where.items()
        )
    )


def test_votes_are_counted_as_the_tables_have_them(prepared, votes):
    output, origins, _ = prepared(preferences={"path": votes, "licence": "ODbL"})
    licence = {f"Question {n}?": LICENCES[n % 3] or "ODbL" for n in range(40)}
    for split in SPLITS:
        table = read_table(output, "preferences", split)
        expected = Counter(
            (row.annotator, row.source, licence[row.prompt]) for row in table.itertuples()
        )
        found = Counter()
        for count in origins.counts:
            if (count.table, count.split) == ("preferences", split):
                [source], [given] = count.sources, count.licences
                found[count.annotator, source, given] += count.rows
        assert found == expected
        assert getattr(origins.tables["preferences"], split) == len(table)


def test_a_half_is_that_of_the_reward_model(prepared, votes):
    output, origins, _ = prepared(preferences={"path": votes})
    table = read_table(output, "preferences", "train")
    for half in ("first_half", "second_half"):
        expected = select_votes(table, half)["annotator"].value_counts().to_dict()
        found = {p: rows(origins, "preferences", half=half, annotator=p) for p in expected}
        assert found == expected
        assert {half_of(prompt_key(p)) for p in select_votes(table, half)["prompt"]} == {half}
    assert rows(origins, "preferences", split="eval", half="") == origins.tables["preferences"].eval


def test_everybody_who_chose_an_answer_is_behind_the_demonstration_that_was_made_of_it(
    prepared, votes
):
    output, origins, _ = prepared(preferences={"path": votes})
    table = with_winners(read_table(output, "preferences", "train"))
    decided = table[~table["tie"]]
    pairs = decided[["annotator", "prompt", "chosen"]].drop_duplicates()
    for name, expected in pairs["annotator"].value_counts().items():
        assert rows(origins, "demonstrations", split="train", annotator=name) == expected
    # Several people chose the same, so that they have more than there are.
    assert rows(origins, "demonstrations", split="train") > origins.tables["demonstrations"].train
    asked = table[["annotator", "prompt"]].drop_duplicates()
    for name, expected in asked["annotator"].value_counts().items():
        assert rows(origins, "prompts", split="train", annotator=name) == expected
    assert origins.tables["demonstrations"].derived
    assert origins.tables["prompts"].derived


def test_tables_of_their_own_have_their_own_sources_and_nobody_s_votes(prepared, votes, tmp_path):
    answers = write(
        tmp_path / "answers.jsonl",
        [
            {"prompt": f"Other {n}?", "response": "r", "source": "wiki", "license": "CC BY-SA 3.0"}
            for n in range(30)
        ],
    )
    prompts = write(tmp_path / "ask.jsonl", [{"prompt": f"Ask {n}?"} for n in range(30)])
    _, origins, _ = prepared(
        preferences={"path": votes},
        demonstrations={"path": answers},
        prompts={"path": prompts, "licence": "CC0"},
    )
    assert rows(origins, "demonstrations", sources="wiki", licences="CC BY-SA 3.0") == 30
    assert rows(origins, "prompts", sources="ask.jsonl", licences="CC0") == 30
    assert {c.annotator for c in origins.counts if c.table != "preferences"} == {""}
    assert not origins.tables["prompts"].derived


def test_the_counts_change_no_table_and_no_digest(prepared, votes):
    output, _, report = prepared(preferences={"path": votes})
    other, _, _ = prepared(preferences={"path": votes, "licence": "ODbL"})
    assert digest(output) == digest(other)
    assert (output / FILE).read_bytes() != (other / FILE).read_bytes()
    again, _, _ = prepared(preferences={"path": votes})
    assert (output / FILE).read_bytes() == (again / FILE).read_bytes()
    before = digest(output)
    (output / FILE).unlink()
    assert digest(output) == before
    assert {"annotator", "p1"}.isdisjoint(report.tables["data_origins"].to_numpy().ravel())


def test_the_table_for_people_adds_up(prepared, votes):
    _, origins, report = prepared(preferences={"path": votes, "licence": "ODbL"})
    table = report.tables["data_origins"]
    assert list(table.columns) == ["table", "source", "licence", "train", "eval"]
    of_votes = table[table["table"] == "preferences"]
    assert of_votes["train"].sum() == origins.tables["preferences"].train
    assert set(of_votes["licence"]) == {"MIT", "CC BY 4.0", "ODbL"}


def test_tables_of_earlier_versions_have_annotators_and_sources_but_no_licences(prepared, votes):
    output, origins, _ = prepared(preferences={"path": votes})
    (output / FILE).unlink()
    old = count_tables(output)
    assert not old.licences_known
    assert old.tables == origins.tables

    def by_all_but_licences(found):
        counts = Counter()
        for c in found.counts:
            counts[c.table, c.split, c.half, c.annotator, c.sources] += c.rows
        return counts

    assert by_all_but_licences(old) == by_all_but_licences(origins)


def test_votes_of_version_0_1_0_are_counted(tmp_path):
    row = {"prompt": "Q?", "chosen": "yes", "rejected": "no", "tie": False, "annotator": "p1"}
    for split in SPLITS:
        write(tmp_path / f"preferences.{split}.jsonl", [row, {**row, "tie": True}])
    of = {"source": "answers chosen in the preferences", "train": 1, "eval": 1}
    told = {"preferences": {"source": "f", "train": 2, "eval": 2}, "demonstrations": of}
    (tmp_path / "validation.json").write_text(json.dumps({"tables": told}))
    found = count_tables(tmp_path)
    assert rows(found, "preferences", annotator="p1") == 4
    assert rows(found, "demonstrations", annotator="p1", split="train") == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "validation.json").unlink(),
        lambda folder: (folder / "validation.json").write_text("[]"),
        lambda folder: (folder / "preferences.eval.jsonl").write_text("{"),
        lambda folder: (folder / "preferences.eval.jsonl").write_text("{}\n"),
    ],
)
def test_tables_that_are_damaged_are_said_to_be(prepared, votes, damage):
    output, _, _ = prepared(preferences={"path": votes})
    damage(output)
    with pytest.raises(DataError, match="the prepared tables cannot be read"):
        count_tables(output)


@pytest.mark.parametrize("text", ["", "[]", '{"form": 1}', "\0"])
def test_a_file_of_counts_that_is_damaged_is_said_to_be(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match=r"origins\.json cannot be read .*; prepare the data again"):
        Origins.read(tmp_path / FILE)


# ---- the columns of a source ----

PAIR = {"prompt": "p", "response_a": "x", "response_b": "y", "vote": "a"}


def parsed(kind, *found, names=None, **reading):
    source = SourceRows("dir/f.jsonl", "line", list(enumerate(found, 1)))
    return parse(source, kind, names or {}, Reading(**reading))


def test_a_column_is_read_by_either_spelling_and_goes_before_the_setting():
    found = parsed("prompts", {"prompt": "p", "license": "MIT"}, {"prompt": "q"}, licence="CC0")
    assert [origin.licences for origin in found.origins] == [("MIT",), ("CC0",)]
    assert [origin.sources for origin in found.origins] == [("f.jsonl",)] * 2
    assert found.unread == []


@pytest.mark.parametrize("value", ["x" * 201, "two\nlines", ["MIT"], {"a": 1}, 1.5, True])
def test_a_column_of_other_content_is_noted_and_not_read(value):
    found = parsed("preferences", PAIR | {"licence": "MIT"}, PAIR | {"licence": value})
    assert [origin.licences for origin in found.origins] == [(), ()]
    [note] = found.unread
    assert note.startswith("dir/f.jsonl, line 2, field 'licence': ")
    assert note.endswith("if it is that, map 'licence' in data.preferences.fields")


def test_a_mapped_column_is_read_whatever_its_text_and_else_the_row_is_bad():
    names = {"licence": "meta.terms"}
    good = PAIR | {"meta": {"terms": "x" * 300}}
    bad = PAIR | {"meta": {"terms": ["MIT"]}}
    found = parsed("preferences", good, bad, PAIR, names=names)
    assert [origin.licences for origin in found.origins] == [("x" * 300,), ()]
    assert [str(fault) for fault in found.faults] == [
        "dir/f.jsonl, line 2, field 'meta.terms': is neither text nor a whole number"
    ]


def test_a_column_that_is_mapped_to_another_field_is_not_the_licence():
    found = parsed("preferences", PAIR | {"licence": "w1"}, names={"annotator": "licence"})
    assert found.origins == [Origin.of(("f.jsonl",), ())]
    assert found.frame["annotator"].tolist() == ["w1"]


def test_a_pair_of_two_rated_rows_has_the_licences_of_both():
    one = {"prompt": "p", "response": "x", "score": 1, "licence": "MIT", "source": "s1"}
    other = {"prompt": "p", "response": "y", "score": 2, "licence": "CC0", "source": "s2"}
    [origin] = parsed("preferences", one, other).origins
    assert origin == Origin.of(("s1", "s2"), ("MIT", "CC0"))


def test_replies_of_a_tree_have_the_licences_of_theirs():
    def message(id_, parent, role, rank, licence):
        known = {"id": id_, "parent": parent, "role": role, "text": f"text {id_}"}
        return {**known, "rank": rank, "licence": licence}

    tree = [
        message("q", "", "prompter", None, "CC0"),
        message("a", "q", "assistant", 0, "MIT"),
        message("b", "q", "assistant", 1, "ODbL"),
    ]
    [origin] = parsed("preferences", *tree).origins
    assert origin.licences == ("MIT", "ODbL")
    [origin] = parsed("demonstrations", *tree).origins
    assert origin.licences == ("MIT",)


# ---- beside a snapshot ----


def test_what_the_store_knows_is_joined_to_the_votes_by_their_pair(tmp_path):
    path = tmp_path / "shop-1.jsonl"
    known = Origin(("wiki", "ask"), ("MIT",), ("models:/m/1",), ("wiki",), ("MIT",))
    write_beside(path, [("pair1", known)], {"p1": "CC BY 4.0"})
    found = OriginsOfVotes.beside(path)
    votes = pd.DataFrame({"id": ["pair1", "pair1", "pair2"], "annotator": ["p1", "", "p1"]})
    own = Origin.of(("page",), ())
    assert found.of(votes, [own] * 3) == [
        Origin(
            ("wiki", "ask", "page"), ("MIT", "CC BY 4.0"), ("models:/m/1",), ("wiki",), ("MIT",)
        ),
        Origin(("wiki", "ask", "page"), ("MIT",), ("models:/m/1",), ("wiki",), ("MIT",)),
        Origin(("page",), ("CC BY 4.0",)),
    ]


def test_nothing_beside_a_file_of_votes_is_nothing_and_damage_is_said(tmp_path):
    path = tmp_path / "shop-1.jsonl"
    assert OriginsOfVotes.beside(path) is None
    for text in ("{", "3\n", '{"sources": []}\n'):
        file_beside(path).write_text(text)
        with pytest.raises(DataError, match=r"shop-1\.origins\.jsonl cannot be read"):
            OriginsOfVotes.beside(path)


def test_two_origins_beside_each_other_name_everything_once():
    one, other = Origin.of(("a", "b"), ("MIT",)), Origin.of(("b", "c"), ("MIT",))
    assert one.beside(other) == Origin.of(("a", "b", "c"), ("MIT",))
    assert one.beside(NOWHERE) == one

"""Files in the schemas that their publishers have, and what becomes of them in the store."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_core.errors import ConfigError, DataError
from tasks.feedback.forms.checks import MOST
from tasks.feedback.forms.incoming import import_file
from tasks.feedback.forms.known import FORMS
from tasks.feedback.forms.options import ImportOptions
from tasks.feedback.forms.outgoing import export_file
from tasks.feedback.store.audit import entries

SHARED = Path(__file__).parents[5] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")


def lines(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def first(path, count):
    """The first rows of a real file, read without our readers."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(next(file)) for _ in range(count)]


def votes(project, *, skips=False):
    """What counts, by winner and loser, so that the order in which a pair is kept is no matter."""
    return [
        (vote.prompt, vote.response_a, vote.response_b, vote.vote, vote.annotator or "")
        for vote in project.judgments.stream(skips=skips)
    ]


def got(project, path, **options):
    return import_file(project, str(path), ImportOptions(**options))


# ---- forms that people publish ----

HH = {
    "chosen": "\n\nHuman: Why is the sky blue?\n\nAssistant: Air scatters blue light.",
    "rejected": "\n\nHuman: Why is the sky blue?\n\nAssistant: Paint.",
}
SKY = [{"role": "user", "content": "Why is the sky blue?"}]
ULTRA = {
    "source": "evol_instruct",
    "instruction": "Name a prime.",
    "models": ["alpaca-7b", "gpt-4", "llama-2-7b-chat"],
    "correct_answers": ["None"],
    "completions": [
        {
            "annotations": {"helpfulness": {"Rating": rating, "Rationale": "..."}},
            "model": model,
            "principle": "helpfulness",
            "response": response,
            "fine-grained_score": score,
            "overall_score": score,
        }
        for model, response, rating, score in (
            ("alpaca-7b", "Nine.", "1", 2.0),
            ("gpt-4", "Seven.", "5", 9.0),
            ("llama-2-7b-chat", "Eleven.", "5", 9.0),
        )
    ],
}
HELPSTEER = [
    {
        "prompt": "Name a prime.",
        "response": response,
        "helpfulness": helpfulness,
        "correctness": 4,
        "coherence": 4,
        "complexity": 1,
        "verbosity": 1,
    }
    for response, helpfulness in (("Seven.", 4), ("Nine.", 1))
]
NECTAR = {
    "prompt": "\n\nHuman: Why is the sky blue?\n\nAssistant: ",
    "answers": [
        {"answer": "Air.", "model": "gpt-4", "rank": 1.0},
        {"answer": "Paint.", "model": "alpaca-7b", "rank": 3.0},
        {"answer": "Light.", "model": "mistral", "rank": 2.0},
    ],
    "turns": 1,
    "num_responses": 3,
    "source": ["lmsys-chat-1m"],
    "good_natured": True,
}
SHP = {
    "post_id": "qt3nxl",
    "domain": "askculinary_train",
    "upvote_ratio": 0.98,
    "history": "Why does bread rise?",
    "c_root_id_A": "hkh25sc",
    "created_at_utc_A": 1636822112,
    "score_A": 340,
    "human_ref_A": "Yeast makes gas.",
    "labels": 1,
    "seconds_difference": 238.0,
    "score_ratio": 9.7142857143,
    "score_B": 35,
    "human_ref_B": "It is magic.",
}
ARENA = {
    "question_id": "58210e39b3fd4441a2bd4a518bb44c2d",
    "model_a": "chatglm-6b",
    "model_b": "koala-13b",
    "winner": "tie (bothbad)",
    "judge": "arena_user_973",
    "conversation_a": [*SKY, {"role": "assistant", "content": "Paint."}],
    "conversation_b": [*SKY, {"role": "assistant", "content": "Ink."}],
    "turn": 1,
    "language": "English",
    "tstamp": 1682351591.1322,
}
PUBLISHED = {
    "hh-rlhf": ([HH], {(("Air scatters blue light.", ""), ("Paint.", ""), "a", 0.0)}),
    "ultrafeedback": (
        [ULTRA],
        {
            (("Nine.", "alpaca-7b"), ("Seven.", "gpt-4"), "b", 0.0),
            (("Nine.", "alpaca-7b"), ("Eleven.", "llama-2-7b-chat"), "b", 0.0),
            (("Seven.", "gpt-4"), ("Eleven.", "llama-2-7b-chat"), "tie", 0.0),
        },
    ),
    "helpsteer": (HELPSTEER, {(("Seven.", ""), ("Nine.", ""), "a", 0.0)}),
    "nectar": (
        [NECTAR],
        {
            (("Air.", "gpt-4"), ("Paint.", "alpaca-7b"), "a", 0.0),
            (("Air.", "gpt-4"), ("Light.", "mistral"), "a", 0.0),
            (("Paint.", "alpaca-7b"), ("Light.", "mistral"), "b", 0.0),
        },
    ),
    "shp": ([SHP], {(("Yeast makes gas.", ""), ("It is magic.", ""), "a", 0.0)}),
    "chatbot-arena": (
        [ARENA],
        {(("Paint.", "chatglm-6b"), ("Ink.", "koala-13b"), "both_bad", 0.0)},
    ),
}


@pytest.mark.parametrize("form", PUBLISHED)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_published_form_is_told_by_its_columns_and_read(plain, tmp_path, form, suffix):
    rows, expected = PUBLISHED[form]
    path = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        lines(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    found = got(plain, path)
    cast = {
        ((vote.response_a, vote.model_a), (vote.response_b, vote.model_b), vote.vote, vote.margin)
        for vote in plain.judgments.stream()
    }
    assert (found.form, cast) == (FORMS[form].title, expected)
    assert found.new_votes == len(expected)
    # asked for by its name it is the same, and is there already
    again = got(plain, path, form=form)
    assert (again.new_votes, again.there_already, again.new_pairs) == (0, len(expected), 0)


def test_scores_give_a_margin_only_where_one_is_asked_for(plain, tmp_path):
    path = lines(tmp_path / "ratings.jsonl", HELPSTEER)
    got(plain, path, score_margin=0.5)
    [vote] = plain.judgments.stream()
    assert (vote.vote, vote.margin) == ("a", 1.5)  # (4 - 1) * 0.5


def test_a_rating_table_may_come_in_as_pairs_to_be_labelled(plain, tmp_path):
    path = lines(tmp_path / "ratings.jsonl", HELPSTEER)
    found = got(plain, path, ask=2)
    assert (found.asked, found.new_pairs, found.votes) == (1, 1, 0)
    assert list(plain.judgments.stream()) == []
    [task] = plain.queue.lease(_annotator(plain))
    assert {task.left, task.right} == {"Seven.", "Nine."}
    assert got(plain, path, ask=2).new_pairs == 0


def test_pairs_that_nobody_has_voted_on_go_into_the_queue(plain, tmp_path):
    rows = [{"prompt": "Q?", "response_a": "x", "response_b": "y", "model_a": "m"}]
    assert got(plain, lines(tmp_path / "pairs.jsonl", rows), ask=3).asked == 1
    with pytest.raises(DataError, match="has no preferences"):
        got(plain, tmp_path / "pairs.jsonl")


def _annotator(project):
    from tasks.feedback.store.store import Store

    store = Store(project.database)
    return store.door.who(store.door.enter(project.people.invite())).annotator


# ---- what the store keeps and training does not ask ----

WHOLE = {
    "prompt": "Name a prime.",
    "response_a": "Seven.",
    "response_b": "Nine.",
    "model_a": "models:/demo-policy/3",
    "model_b": "models:/demo-policy/2",
    "licence": "CC BY 4.0",
    "topic": "numbers",
    "correct": "response_a",
    "votes": [
        {"annotator": "w1", "vote": "a", "seconds": 12.5, "note": "clear", "shown_first": "b"},
        {"annotator": "w2", "vote": "both_bad", "time": "2026-03-01T12:30:00Z"},
        {"annotator": "w3", "vote": "skip", "reason": "I do not know", "seconds": 3},
        {"annotator": "w4", "vote": "tie"},
    ],
}


def test_the_store_keeps_what_training_does_not_ask(project, tmp_path):
    path = lines(tmp_path / "whole.jsonl", [WHOLE])
    found = got(project, path, keep=["topic"], gold="correct", source="survey 3")
    assert (found.votes, found.skips, found.gold, found.unread) == (4, 1, 1, {})
    cast = {vote.annotator: vote for vote in project.judgments.stream(skips=True)}
    assert {name: vote.vote for name, vote in cast.items()} == {
        "w1": "a", "w2": "both_bad", "w3": "skip", "w4": "tie"
    }  # fmt: skip
    first = cast["w1"]
    assert (first.seconds, first.note, first.first, first.gold) == (12.5, "clear", "b", "a")
    assert (first.model_a, first.source, first.kept) == (
        "models:/demo-policy/3", "survey 3", {"topic": "numbers"}
    )  # fmt: skip
    assert cast["w2"].time == "2026-03-01T12:30:00Z"
    assert (cast["w3"].reason, cast["w3"].seconds) == ("I do not know", 3.0)
    from tasks.feedback.forms import stored

    [pair] = stored.pairs(project)
    assert (pair.pair.licence, pair.pair.a.licence) == ("CC BY 4.0", "CC BY 4.0")


def test_seconds_may_stand_in_the_list_of_a_vote(plain, tmp_path):
    row = {"prompt": "P", "response_a": "x", "response_b": "y", "votes": [["w1", "a", 7]]}
    got(plain, lines(tmp_path / "v.jsonl", [row]), fields={"seconds": "votes.2"})
    assert [vote.seconds for vote in plain.judgments.stream()] == [7.0]


def test_values_of_votes_are_mapped_also_to_both_bad_and_skip(plain, tmp_path):
    rows = [
        {"prompt": "P", "response_a": "x", "response_b": "y", "vote": value, "annotator": f"w{n}"}
        for n, value in enumerate((1, 0, 2, 3, 9))
    ]
    meanings = {"a": ["1"], "b": ["0"], "tie": ["2"], "both_bad": ["3"], "skip": ["9"]}
    got(plain, lines(tmp_path / "v.jsonl", rows), votes=meanings)
    cast = [vote.vote for vote in plain.judgments.stream(skips=True)]
    assert cast == ["a", "b", "tie", "both_bad", "skip"]
    with pytest.raises(ConfigError, match="means both 'a' and 'b'"):
        got(plain, tmp_path / "v.jsonl", votes={"a": ["1"], "b": ["1"]})


def test_a_number_of_a_pair_that_is_none_is_no_matter(plain, tmp_path):
    row = {"prompt": "P", "chosen": "x", "rejected": "y"}
    for n, number in enumerate(("9" * 40, "x", 7, {"a": 1}, "٣")):
        path = lines(tmp_path / f"{n}.jsonl", [{**row, "prompt": f"P{n}", "number": number}])
        assert got(plain, path, fields={"pair": "number"}).new_votes == 1


def test_three_anonymous_votes_that_say_the_same_are_three(project, tmp_path):
    row = {"prompt": "P", "response_a": "x", "response_b": "y", "votes": ["a", "a", "b", "a"]}
    path = lines(tmp_path / "v.jsonl", [row])
    assert got(project, path).new_votes == 4
    assert got(project, path).new_votes == 0


# ---- what is wrong, and what is left out ----


def test_a_bad_row_is_named_and_nothing_is_put_in(project, tmp_path):
    good = {"prompt": "P", "response_a": "x", "response_b": "y", "vote": "a"}
    path = lines(tmp_path / "v.jsonl", [good, {**good, "vote": "left?"}, {**good, "prompt": ""}])
    with pytest.raises(DataError) as caught:
        got(project, path)
    assert f"{path}, line 2, field 'vote': 'left?' is not a vote" in str(caught.value)
    assert "all 2 bad rows out with --on-bad-row drop" in str(caught.value)
    assert votes(project) == []
    assert list(entries(project.database, project.id)) == []
    found = got(project, path, on_bad_row="drop")
    assert (found.new_votes, found.left_out) == (
        1, {"bad rows (unknown vote)": 1, "bad rows (empty text)": 1}
    )  # fmt: skip
    assert any("line 3, field 'prompt': is empty" in text for text in found.bad_rows)


BAD = {
    "seconds": ({"seconds": -1}, "'seconds': is -1, not a number of seconds"),
    "seconds as text": ({"seconds": "soon"}, "--ignore seconds leaves the column out"),
    "null": ({"prompt": "a\0b"}, "'prompt': has a null character"),
    "name": (
        {"annotator": "w" * (MOST["annotator"] + 1)},
        f"'annotator': has {MOST['annotator'] + 1} characters; at most {MOST['annotator']} are",
    ),
    "mail": ({"annotator": "ann@example.org"}, "'annotator': is an e-mail address"),
    "note": ({"note": ["x"]}, "'note': is ['x'], not text"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_value_that_the_store_cannot_keep_is_a_bad_row(project, tmp_path, case):
    values, message = BAD[case]
    row = {"prompt": "P", "response_a": "x", "response_b": "y", "vote": "a", **values}
    with pytest.raises(DataError) as caught:
        got(project, lines(tmp_path / "v.jsonl", [row]))
    assert message in str(caught.value)


def test_nobodys_name_gets_into_the_store(plain, tmp_path):
    rows = [
        {"prompt": "P", "response_a": "x", "response_b": f"y{n}", "vote": "a", "annotator": who}
        for n, who in enumerate(("ann@example.org", "ann@example.org", "bob"))
    ]
    path = lines(tmp_path / "v.jsonl", rows)
    got(plain, path, who="hashed")
    names = [vote.annotator for vote in plain.judgments.stream()]
    assert names[0] == names[1] != names[2]
    assert not any("ann" in name or "bob" in name for name in names)
    assert got(plain, path, who="hashed").new_votes == 0  # the same person again


def test_columns_that_are_not_read_are_listed(plain, tmp_path):
    row = {"prompt": "P", "chosen": "x", "rejected": "y", "strict": True, "tags": ["a"], "none": ""}
    found = got(plain, lines(tmp_path / "v.jsonl", [row, {**row, "prompt": "Q", "tags": []}]))
    assert found.unread == {"strict": 2, "tags": 1}
    assert "Columns that were not read, with their filled rows: strict (2), tags (1)." in (
        found.lines()
    )


def test_identical_answers_are_left_out_and_counted(plain, tmp_path):
    rows = [{"prompt": "P", "chosen": "x", "rejected": other} for other in ("x ", "y")]
    found = got(plain, lines(tmp_path / "v.jsonl", rows))
    assert (found.new_votes, found.left_out) == (1, {"pairs of identical answers": 1})


def test_an_unknown_form_says_what_was_found_and_what_is_known(plain, tmp_path):
    path = lines(tmp_path / "v.jsonl", [{"text": "x", "label": 1}])
    with pytest.raises(DataError, match=r"its fields are: text, label; map .* in --fields"):
        got(plain, path)
    with pytest.raises(DataError, match=r"there is no form 'nectars'; there are: auto, votes"):
        got(plain, path, form="nectars")
    with pytest.raises(DataError, match=r"is no Nectar file: it has no field answers, prompt; its"):
        got(plain, path, form="nectar")
    with pytest.raises(DataError, match="has no field 'right', which --gold names"):
        got(plain, path, gold="right")
    with pytest.raises(DataError, match="fields maps 'colour', which is no field of ours"):
        got(plain, path, fields={"colour": "label"})


def test_an_import_that_was_killed_is_completed_and_nothing_is_doubled(project, tmp_path):
    rows = [
        {"prompt": f"P{n}", "response_a": "x", "response_b": "y", "vote": "a", "annotator": "w"}
        for n in range(700)
    ]
    path = lines(tmp_path / "v.jsonl", rows)
    script = (
        "import os, signal, sys\n"
        "from tasks.feedback.forms import incoming\n"
        "from tasks.feedback.store.database import open_database\n"
        "from tasks.feedback.store.store import Store\n"
        "store = Store(open_database(sys.argv[1]))\n"
        "calls = []\n"
        "def kill(done, total):\n"
        "    calls.append(done)\n"
        "    if calls.count(total) == 1 and 500 <= done < total:\n"  # in the second pass, half way
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "incoming.import_file(store.project('demo'), sys.argv[2], progress=kill)\n"
    )
    url = project.database.engine.url.render_as_string(hide_password=False)
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, url, path],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])},
        capture_output=True,
    )
    assert done.returncode == -9, done.stderr.decode()
    half = len(votes(project))
    assert 0 < half < 700
    found = got(project, path)
    assert (found.new_votes, found.there_already) == (700 - half, half)
    assert len(votes(project)) == 700


def test_an_import_is_in_the_log(plain, tmp_path):
    path = lines(tmp_path / "v.jsonl", [HH])
    import_file(plain, path, by="ann")
    [entry] = entries(plain.database, plain.id)
    assert (entry.actor, entry.action, entry.details["new votes"]) == ("ann", "import", 1)


# ---- real files ----


@needs_shared
def test_argument_pairs_come_back_to_the_letter(store, tmp_path):
    project, other = store.project("one", make=True), store.project("two", make=True)
    path = SHARED / "argument-pairs-5annotators-dev.jsonl"
    found = got(
        project,
        path,
        fields={"seconds": "votes.2"},
        gold="gold",
        keep=["debate"],
        licence="CC BY 4.0",
        limit=40,
    )
    rows = first(path, 40)
    cast = [vote for row in rows for vote in row["votes"]]
    assert (found.votes, found.gold) == (len(cast), sum(row["gold"] is not None for row in rows))
    kept = list(project.judgments.stream())
    assert sorted((vote.annotator, vote.seconds) for vote in kept) == sorted(
        (who, float(seconds)) for who, _, seconds in cast
    )
    assert sum(vote.vote == "tie" for vote in kept) == sum(vote == "tie" for _, vote, _ in cast)
    export_file(project, str(tmp_path / "out.jsonl"))
    got(other, tmp_path / "out.jsonl")
    assert other.snapshots.take().digest == project.snapshots.take().digest


@needs_shared
def test_pandalm_has_three_annotators_and_two_models(plain):
    path = SHARED / "pandalm-pairs-3annotators.jsonl"
    found = got(plain, path, gold="majority", on_bad_row="drop", limit=60)
    rows = first(path, 60)
    good = [row for row in rows if row["response_a"].strip() and row["response_b"].strip()]
    good = [row for row in good if row["response_a"].strip() != row["response_b"].strip()]
    assert found.left_out["bad rows (empty text)"] == sum(
        not row["response_a"].strip() or not row["response_b"].strip() for row in rows
    )
    cast = list(plain.judgments.stream())
    assert {vote.annotator for vote in cast} == {"ann1", "ann2", "ann3"}
    assert len(cast) >= 3 * len(good)
    assert {vote.model_a for vote in cast} == {row["model_a"] for row in good}


@needs_shared
def test_qa_feedback_is_six_comparisons_of_four_answers(plain):
    path = SHARED / "qa-feedback-4way-preferences.jsonl"
    found = got(plain, path, limit=20, on_bad_row="drop")
    rows = first(path, 20)
    said = [vote for row in rows for vote in row["preferences"]]
    assert found.form == "lists of answers with a vote for each pair"
    same = sum(found.left_out.values())
    cast = list(plain.judgments.stream())
    assert len(cast) + same == len(said) == 120
    whole, [one, other] = rows[0], rows[0]["pair_order"][1]
    expected = (whole["responses"][one - 1], whole["responses"][other - 1], "a")
    assert expected in {(vote.response_a, vote.response_b, vote.vote) for vote in cast}


@needs_shared
def test_a_table_of_ratings_without_a_prompt_gets_one(plain):
    path = SHARED / "sentiment-ratings-20annotators-product-reviews.jsonl"
    fields = {"response": "text", "score": "mean"}
    found = got(plain, path, prompt="Review it.", fields=fields, limit=6, ask=1)
    rows = first(path, 6)
    unlike = sum(
        one["mean"] != other["mean"] for n, one in enumerate(rows) for other in rows[n + 1 :]
    )
    assert found.asked == unlike

"""Exports of Label Studio and Argilla, in the shapes that these tools write; and files for them."""

import json
import xml.etree.ElementTree as ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_core.errors import DataError
from tasks.feedback.forms.incoming import import_file
from tasks.feedback.forms.options import ExportOptions, ImportOptions
from tasks.feedback.forms.outgoing import export_file
from tasks.feedback.store.records import Answer, Ballot, NewPair


def got(project, tmp_path, rows, name="export.json", **options):
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return import_file(project, str(path), ImportOptions(**options))


def cast(project):
    """Vote and details by annotator."""
    return {
        vote.annotator or "": (vote.vote, vote.first or "", vote.seconds, vote.note)
        for vote in project.judgments.stream(skips=True)
    }


# ---- Label Studio ----


def annotation(who, *results, **more):
    return {
        "id": 1000,
        "completed_by": who,
        "result": list(results),
        "was_cancelled": False,
        "ground_truth": False,
        "created_at": "2023-06-06T16:22:08.728353Z",
        "updated_at": "2023-06-06T16:22:08.728378Z",
        "draft_created_at": None,
        "lead_time": 4.288,
        "prediction": {},
        "result_count": 1,
        "unique_id": "f6f6c0b6",
        "import_id": None,
        "last_action": None,
        "task": 1,
        "project": 83,
        **more,
    }


def pairwise(side):
    return {
        "id": "Dx_aB91ISN",
        "type": "pairwise",
        "value": {"selected": side},
        "origin": "manual",
        "to_name": "answer1,answer2",
        "from_name": "comparison",
    }


def choices(name, choice):
    return {
        "id": "t5sp3TyXPo",
        "type": "choices",
        "value": {"choices": [choice]},
        "to_name": "prompt",
        "from_name": name,
    }


def note(text):
    return {
        "type": "textarea",
        "value": {"text": [text]},
        "to_name": "prompt",
        "from_name": "note",
    }


def task(*annotations, **more):
    return {
        "id": 1,
        "annotations": list(annotations),
        "file_upload": "0b1d.json",
        "drafts": [],
        "predictions": [],
        "data": {"prompt": "Name a prime.", "answer1": "Seven.", "answer2": "Nine."},
        "meta": {},
        "created_at": "2023-06-06T16:00:00.000000Z",
        "inner_id": 1,
        "total_annotations": len(annotations),
        "cancelled_annotations": 0,
        "project": 83,
        **more,
    }


def test_label_studio_with_pairwise(plain, tmp_path):
    rows = [
        task(
            annotation(10, pairwise("left")),
            annotation(11, pairwise("right"), note("Nine is odd")),
            annotation(12, was_cancelled=True),
            annotation({"id": 13, "email": "ann@example.org"}, choices("neither", "Tie")),
            annotation(14, choices("neither", "Both are bad")),
            annotation(15),
            drafts=[annotation(16, pairwise("left"))],
            predictions=[{"model_version": "m", "result": [pairwise("left")]}],
        )
    ]
    found = got(plain, tmp_path, rows)
    assert found.form == "Label Studio"
    assert cast(plain) == {
        "10": ("a", "a", 4.288, ""),
        "11": ("b", "a", 4.288, "Nine is odd"),
        "12": ("skip", "", 4.288, ""),
        "13": ("tie", "", 4.288, ""),
        "14": ("both_bad", "", 4.288, ""),
    }
    assert found.left_out == {
        "drafts of annotations": 1,
        "predictions of models": 1,
        "annotations without a choice": 1,
    }
    assert {vote.time for vote in plain.judgments.stream()} == {"2023-06-06T16:22:08.728353Z"}
    assert got(plain, tmp_path, rows).new_votes == 0


def test_a_side_and_a_tie_at_once_are_a_bad_row(plain, tmp_path):
    rows = [task(annotation(10, pairwise("left"), choices("neither", "Tie")))]
    with pytest.raises(DataError, match="'left and Tie' is not a vote"):
        got(plain, tmp_path, rows)


def test_the_ground_truth_is_the_right_answer(plain, tmp_path):
    rows = [
        task(annotation(1, pairwise("right"), ground_truth=True), annotation(2, pairwise("left")))
    ]
    assert got(plain, tmp_path, rows).gold == 1
    assert {vote.gold for vote in plain.judgments.stream()} == {"b"}


def test_label_studio_with_choices_of_ones_own(plain, tmp_path):
    data = {"question": "Q?", "response_1": "x", "response_2": "y", "source_id": "17"}
    rows = [
        task(
            annotation(1, choices("better", "First"), choices("tone", "rude")),
            annotation(2, choices("better", "Equal"), choices("tone", "kind")),
            data=data,
        )
    ]
    votes = {"a": ["First"], "b": ["Second"], "tie": ["Equal"]}
    found = got(plain, tmp_path, rows, votes=votes)
    assert {who: said[0] for who, said in cast(plain).items()} == {"1": "a", "2": "tie"}
    assert found.unread == {"data.source_id": 1}
    rows[0]["annotations"][0]["result"][0]["from_name"] = "preferred"
    rows[0]["annotations"][1]["result"][0]["from_name"] = "preferred"
    with pytest.raises(DataError, match=r"questions \(preferred, tone\); name .* vote=NAME"):
        got(plain, tmp_path, rows, votes=votes)
    got(plain, tmp_path, rows, votes=votes, fields={"vote": "preferred"})


def test_label_studio_with_texts_of_other_names(plain, tmp_path):
    rows = [task(annotation(1, pairwise("left")), data={"q": "Q?", "one": "x", "two": "y"})]
    with pytest.raises(DataError, match=r"its fields are: data.q, data.one, data.two; name it"):
        got(plain, tmp_path, rows)
    fields = {"prompt": "data.q", "response_a": "data.one", "response_b": "data.two"}
    assert got(plain, tmp_path, rows, fields=fields).new_votes == 1


def test_the_small_export_of_label_studio(plain, tmp_path):
    beside = {
        "annotation_id": 5,
        "created_at": "2023-06-06T16:22:08.728353Z",
        "updated_at": "2023-06-06T16:22:08.728378Z",
        "lead_time": 9.5,
    }
    data = {"prompt": "Name a prime.", "answer1": "Seven.", "answer2": "Nine.", "id": 1}
    rows = [
        {**data, "comparison": [{"selected": "left"}], "annotator": 1, **beside},
        {**data, "comparison": [{"selected": "right"}], "annotator": 2, **beside},
        {**data, "neither": "Both are bad", "note": "wrong", "annotator": 3, **beside},
    ]
    got(plain, tmp_path, rows)
    assert cast(plain) == {
        "1": ("a", "a", 9.5, ""),
        "2": ("b", "a", 9.5, ""),
        "3": ("both_bad", "", 9.5, "wrong"),
    }


# ---- Argilla ----

FIELDS = {"instruction": "Name a prime.", "response1": "Seven.", "response2": "Nine."}
ANN, BOB, CAT = (f"{n}d4c643-b364-4010-8ea9-20b23e972fd9" for n in (1, 2, 3))


def test_records_of_argilla_2(plain, tmp_path):
    rows = [
        {
            "id": "r1",
            "fields": FIELDS,
            "metadata": {},
            "suggestions": {"preference": {"value": "response2", "score": 0.9, "agent": "m"}},
            "responses": {
                "preference": [
                    {"value": "response1", "user_id": ANN},
                    {"value": "response2", "user_id": BOB},
                ],
                "note": [{"value": "odd", "user_id": BOB}],
            },
            "vectors": {},
            "_server_id": "d757be49-ad56-4da8-9f44-c878c62872e7",
        }
    ]
    found = got(plain, tmp_path, rows)
    assert found.form == "Argilla"
    assert {who: (said[0], said[3]) for who, said in cast(plain).items()} == {
        ANN: ("a", ""),
        BOB: ("b", "odd"),
    }


def test_flat_records_of_argilla_2_with_states(plain, tmp_path):
    rows = [
        {
            "id": "r1",
            "status": "completed",
            "_server_id": "d757be49",
            **FIELDS,
            "preference.responses": ["response2", "response1", "response1"],
            "preference.responses.users": [ANN, BOB, CAT],
            "preference.responses.status": ["submitted", "discarded", "draft"],
            "preference.suggestion": None,
        }
    ]
    for name in ("flat.json", "flat.parquet"):
        found = got(plain, tmp_path, rows, name, source="hub")
        assert {who: said[0] for who, said in cast(plain).items()} == {ANN: "b", BOB: "skip"}
        assert found.left_out == {"drafts of responses": 1}
    assert found.new_votes == 0


RANKING = [{"rank": 1, "value": "response2"}, {"rank": 1, "value": "response1"}]


@pytest.mark.parametrize(
    ("value", "vote"),
    [
        ([{"value": "response2", "rank": 1}, {"value": "response1", "rank": 2}], "b"),
        (RANKING, "tie"),
        (["response1", "response2"], "a"),
    ],
)
def test_rankings_of_argilla_1(plain, tmp_path, value, vote):
    rows = [
        {
            "fields": FIELDS,
            "responses": [
                {
                    "user_id": ANN,
                    "values": {"ranking": {"value": value}, "reason": {"value": "because"}},
                    "status": "submitted",
                },
                {"user_id": BOB, "values": None, "status": "discarded"},
            ],
            "metadata": {},
            "external_id": "x1",
            "suggestions": [],
        }
    ]
    got(plain, tmp_path, rows)
    assert cast(plain)[ANN][0] == vote


def test_a_ranking_of_three_is_every_two_of_them(plain, tmp_path):
    fields = {"prompt": "Q?", "response-1": "x", "response-2": "y", "response-3": "z"}
    ranks = [("response-2", 1), ("response-1", 2), ("response-3", 2)]
    value = [{"value": name, "rank": rank} for name, rank in ranks]
    rows = [
        {"id": "1", "fields": fields, "responses": {"order": [{"value": value, "user_id": ANN}]}}
    ]
    got(plain, tmp_path, rows)
    found = {
        (vote.response_a, vote.response_b, vote.vote, vote.annotator)
        for vote in plain.judgments.stream()
    }
    assert found == {("x", "y", "b", ANN), ("x", "z", "tie", ANN), ("y", "z", "a", ANN)}


def test_ratings_of_each_answer_on_the_hub_by_argilla_1(plain, tmp_path):
    def said(*ratings):
        return [{"user_id": who, "value": value, "status": "submitted"} for who, value in ratings]

    rows = [
        {
            **{"prompt": "Q?", "response-1": "x", "response-2": "y"},
            "rating-response-1": said((ANN, 4), (BOB, 2)),
            "rating-response-1-suggestion": 3,
            "rating-response-2": said((ANN, 1), (BOB, 2)),
            "rating-response-2-suggestion": None,
            **{"external_id": "1", "metadata": "{}"},
        }
    ]
    got(plain, tmp_path, rows, score_margin=1.0)
    found = {vote.annotator: (vote.vote, vote.margin) for vote in plain.judgments.stream()}
    assert found == {ANN: ("a", 3.0), BOB: ("tie", 0.0)}


def test_several_questions_are_not_guessed(plain, tmp_path):
    responses = {name: [{"value": "response1", "user_id": ANN}] for name in ("tone", "facts")}
    rows = [{"id": "1", "fields": FIELDS, "responses": responses}]
    with pytest.raises(DataError, match=r"several questions \(facts, tone\); name .* vote=NAME"):
        got(plain, tmp_path, rows)
    assert got(plain, tmp_path, rows, fields={"vote": "facts"}).new_votes == 1


def test_an_e_mail_address_is_no_annotator(plain, tmp_path):
    responses = {"preference": [{"value": "response1", "user_id": "ann@example.org"}]}
    rows = [{"id": "1", "fields": FIELDS, "responses": responses}]
    with pytest.raises(DataError, match="is an e-mail address"):
        got(plain, tmp_path, rows)
    got(plain, tmp_path, rows, who="hashed")
    assert not any("ann" in name for name in cast(plain))


# ---- out, labelled, and back ----


@pytest.fixture
def asked(plain):
    """Twenty pairs of two models that want votes, and one that has one."""
    a, b = (f"models:/demo-policy/{n}" for n in (3, 2))
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q?"}]
    plain.content.add(
        NewPair(chat if n == 0 else f"Q{n}?", Answer(f"x{n}", a), Answer(f"y{n}", b), wanted=1)
        for n in range(20)
    )
    done = NewPair("Done", Answer("x", a), Answer("y", b))
    plain.judgments.add([(done, [Ballot("a", "w1")])])
    return plain


def test_tasks_for_label_studio_come_back_as_votes_on_the_same_pairs(asked, tmp_path):
    options = ExportOptions(form="label-studio", only_open=True)
    made = export_file(asked, str(tmp_path / "tasks.json"), options)
    assert (made.rows, made.beside) == (20, [str(tmp_path / "tasks.config.xml")])
    assert "1 prompt that is a dialogue" in made.loss()
    text = (tmp_path / "tasks.json").read_text(encoding="utf-8")
    assert "demo-policy" not in text
    config = ElementTree.fromstring((tmp_path / "tasks.config.xml").read_text())
    shown = {tag.get("value") for tag in config.iter("Text")}
    assert shown == {"$prompt", "$answer1", "$answer2"}
    assert config.find(".//Pairwise").get("toName") == "answer1,answer2"
    rows = json.loads(text)
    assert 3 < sum(row["data"]["answer1"][0] == "x" for row in rows) < 17  # sides are drawn
    for row in rows:  # the annotator likes x, and knows no better
        side = "left" if row["data"]["answer1"][0] == "x" else "right"
        row["annotations"] = [annotation(7, pairwise(side))]
    found = got(asked, tmp_path, rows, "labelled.json")
    assert (found.new_votes, found.new_pairs) == (20, 0)
    votes = [vote for vote in asked.judgments.stream() if vote.annotator == "7"]
    assert {(vote.vote, vote.model_a) for vote in votes} == {("a", "models:/demo-policy/3")}
    assert {vote.first for vote in votes} == {"a", "b"}


def test_records_for_argilla_come_back_as_votes_on_the_same_pairs(asked, tmp_path):
    made = export_file(asked, str(tmp_path / "r.json"), ExportOptions(form="argilla"))
    assert made.rows == 21
    assert made.lost["vote"] == 1
    settings = json.loads((tmp_path / "r.settings.json").read_text())
    [question, _] = settings["questions"]
    labels = [option["value"] for option in question["settings"]["options"]]
    rows = json.loads((tmp_path / "r.json").read_text())
    assert set(rows[0]["fields"]) == {field["name"] for field in settings["fields"]}
    for row, label in zip(rows, labels * 6, strict=False):
        row["responses"] = {"preference": [{"value": label, "user_id": ANN}]}
    found = got(asked, tmp_path, rows, "labelled.json")
    assert (found.new_votes, found.new_pairs) == (21, 0)
    votes = [vote for vote in asked.judgments.stream() if vote.annotator == ANN]
    assert {vote.vote for vote in votes} == {"a", "b", "tie", "both_bad"}
    for vote in votes:  # "First" is a vote for what came first
        if vote.vote in ("a", "b"):
            told = rows[vote.judgment - votes[0].judgment]
            first = told["fields"]["response1"]
            winner = vote.response_a if vote.vote == "a" else vote.response_b
            assert (winner == first) == (told["responses"]["preference"][0]["value"] == "First")


def test_tasks_may_be_asked_about_in_another_project(asked, plain_store, tmp_path):
    export_file(asked, str(tmp_path / "r.json"), ExportOptions(form="argilla"))
    other = plain_store.project("other", make=True)
    assert import_file(other, str(tmp_path / "r.json"), ImportOptions(ask=1)).asked == 21

"""Votes on their way out: what each form carries, and what it says it cannot."""

import json

import pyarrow.parquet as pq
import pytest

from rlhf_core.data.formats import parse
from rlhf_core.data.sources import read_rows
from rlhf_core.errors import DataError, UserError
from tasks.feedback.forms.incoming import import_file
from tasks.feedback.forms.known import WRITTEN
from tasks.feedback.forms.options import ExportOptions, ImportOptions
from tasks.feedback.forms.outgoing import export_file
from tasks.feedback.store.records import Answer, Ballot, NewPair

CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And a prime?"},
]
# Texts that other readers would take for something else.
TRICKY = (
    "\n\nHuman: a dialogue?\n\nAssistant: no, a text",
    '[{"role": "user", "content": "messages?"}]',
    " spaces around \n",
    "a line\u2028separator, \x0b and \x7f",
    "NaN",
    "💥",
)


def fill(project):
    """Votes of every kind on texts of every kind."""
    seven = Answer("Seven.", "models:/demo-policy/3", {"temperature": 0.7}, "run", "CC0")
    nine = Answer("Nine.", "models:/demo-policy/2", {}, "run", "CC0")
    whole = NewPair("Name a prime.", seven, nine, "list", "MIT", {"topic": "numbers"}, "a")
    project.judgments.add(
        [
            (
                whole,
                [
                    Ballot("a", "w1", "b", 0.25, 12.5, "2026-03-01T12:30:00Z", "clear"),
                    Ballot("tie", "w2", "a", source="survey"),
                    Ballot("both_bad", "w3", note="both wrong"),
                    Ballot("skip", "w4", reason="I do not know"),
                    Ballot("a", "w1", "a", kind="repeat", time="2026-03-02"),
                    *(Ballot("b", ballot=n) for n in range(3)),
                ],
            ),
            (NewPair(CHAT, Answer("Two."), Answer("Four.")), [Ballot("b", "w1", seconds=0.1)]),
        ]
    )
    project.judgments.add(
        (NewPair(text, Answer(text), Answer(f"{text}!")), [Ballot("a", "w2")]) for text in TRICKY
    )
    project.content.add([NewPair("Nobody voted", Answer("x"), Answer("y"), wanted=1)])


@pytest.fixture
def full(plain):
    fill(plain)
    return plain


@pytest.mark.parametrize("name", ["votes.jsonl", "votes.jsonl.gz", "votes.json", "votes.parquet"])
def test_raw_votes_come_back_to_the_letter(plain_store, full, tmp_path, name):
    taken = full.snapshots.take().digest
    made = export_file(full, str(tmp_path / name))
    assert (made.rows, made.known) == (9 + len(TRICKY) + 1, 1)
    assert made.loss() == "1 pair without a vote cannot be written as raw votes."
    other = plain_store.project("other", make=True)
    found = import_file(other, str(tmp_path / name))
    assert (found.new_votes, found.skips, found.left_out) == (made.rows - 1, 1, {})
    assert other.gold.count() == 1
    assert other.snapshots.take().digest == taken

    def said(project):
        return [
            (vote.vote, vote.note, vote.reason, vote.kind, vote.kept)
            for vote in project.judgments.stream(skips=True)
        ]

    assert said(other) == said(full)
    # and what has left the store finds itself there again
    assert import_file(full, str(tmp_path / name)).new_votes == 0
    again = export_file(other, str(tmp_path / f"again-{name}"))
    assert again.rows == made.rows


def test_raw_votes_are_the_same_on_each_database(project, plain, tmp_path):
    fill(project)
    export_file(project, str(tmp_path / "votes.jsonl"))
    import_file(plain, str(tmp_path / "votes.jsonl"))
    assert plain.snapshots.take().digest == project.snapshots.take().digest


def test_training_reads_raw_votes(plain, tmp_path):
    ballots(plain, CHAT, ("x", "y", "a", 2), ("x", "y", "both_bad", 1), ("x", "y", "skip", 1))
    for name in ("votes.jsonl", "votes.parquet"):
        path = tmp_path / name
        export_file(plain, str(path))
        parsed = parse(read_rows(str(path), split="", subset="", limit=0), "preferences", {})
        [fault] = parsed.faults
        assert fault.reason.startswith("'skip' is not a vote")
        assert parsed.frame["vote"].tolist() == ["a", "a", "tie"]
        assert parsed.frame["prompt"].tolist() == [CHAT] * 3


def test_a_snapshot_is_written_as_it_was(full, tmp_path):
    taken = full.snapshots.take()
    pair = NewPair("Later", Answer("x"), Answer("y"))
    full.judgments.add([(pair, [Ballot("a")])])
    options = ExportOptions(snapshot=taken.digest[:8])
    made = export_file(full, str(tmp_path / "votes.jsonl"), options)
    assert made.rows == taken.votes + taken.known
    assert "Later" not in (tmp_path / "votes.jsonl").read_text()
    with pytest.raises(DataError, match="does not exist"):
        export_file(full, str(tmp_path / "other.jsonl"), ExportOptions(snapshot="feed"))
    assert not (tmp_path / "other.jsonl").exists()


def test_pairs_say_what_they_cannot_carry(full, tmp_path):
    path = tmp_path / "pairs.jsonl"
    made = export_file(full, str(path), ExportOptions(form="pairs"))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    # 9 votes on two pairs, without a tie, a vote for neither, a skip and a repeat
    assert made.rows == len(rows) == 5 + len(TRICKY) + 1
    assert rows[0] == {
        "prompt": "Name a prime.",
        "chosen": "Seven.",
        "rejected": "Nine.",
        "annotator": "w1",
        "margin": 0.25,
        "gold": True,
        "time": "2026-03-01T12:30:00Z",
        "source": "",
        "licence": "MIT",
        "chosen_model": "models:/demo-policy/3",
        "rejected_model": "models:/demo-policy/2",
    }
    assert rows[-1] == rows[0] | {"annotator": "gold", "margin": 0.0, "time": ""}
    assert made.loss() == (
        "1 tie, 1 vote for neither, 1 skip, 2 notes, 2 times that votes took, 1 side that was "
        "shown first, 4 answers' sampling settings, 4 pairs' kept columns and "
        "1 repeat cannot be written as prompt, chosen, rejected."
    )


def test_hh_rlhf_leaves_out_what_it_would_change(full, tmp_path):
    path = tmp_path / "hh.jsonl"
    system = [{"role": "system", "content": "Be brief."}, CHAT[0]]
    full.judgments.add([(NewPair(system, Answer("x"), Answer("y")), [Ballot("a")])])
    made = export_file(full, str(path), ExportOptions(form="hh-rlhf"))
    assert (made.lost["system"], made.lost["unlike"]) == (1, 1)
    source = read_rows(str(path), split="", subset="", limit=0)
    parsed = parse(source, "preferences", {})
    assert (parsed.faults, parsed.skipped) == ([], {})
    assert len(parsed.frame) == made.rows
    chat = parsed.frame[parsed.frame["prompt"].map(len) == 3]
    assert chat[["prompt", "response_a", "response_b"]].values.tolist() == [[CHAT, "Four.", "Two."]]


def ballots(project, prompt, *cast):
    """Cast votes: (winner's text, loser's text, vote, how many)."""
    for a, b, vote, count in cast:
        pair = NewPair(prompt, Answer(a, f"m-{a}"), Answer(b, f"m-{b}"))
        project.judgments.add([(pair, [Ballot(vote, f"w{n}") for n in range(count)])])


def read(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_sums_of_votes_are_ratings_ranks_and_scores(plain, tmp_path, suffix):
    # x beats y 3:1, y and z tie once, x beats z 2:0.
    ballots(
        plain, "Q",
        ("x", "y", "a", 3), ("x", "y", "b", 1), ("y", "z", "tie", 1), ("x", "z", "a", 2),
    )  # fmt: skip
    share = {"x": 5 / 6, "y": 1.5 / 5, "z": 0.5 / 3}  # by hand: wins and half of ties, of all

    def out(form):
        path = tmp_path / f"{form}.{suffix}"
        made = export_file(plain, str(path), ExportOptions(form=form))
        return read(path), made

    [row], made = out("ultrafeedback")
    scores = {one["response"]: one["overall_score"] for one in row["completions"]}
    assert scores == {name: round(1 + 9 * part, 4) for name, part in share.items()}
    assert row["models"] == ["m-x", "m-y", "m-z"]
    assert made.lost["single"] == 7
    rated, _ = out("helpsteer")
    assert {one["response"]: one["helpfulness"] for one in rated} == {
        name: round(4 * part, 4) for name, part in share.items()
    }
    [row], _ = out("nectar")
    assert row["prompt"] == "\n\nHuman: Q\n\nAssistant: "
    assert [(one["answer"], one["rank"]) for one in row["answers"]] == [
        ("x", 1.0), ("y", 2.0), ("z", 3.0)
    ]  # fmt: skip
    scored, made = out("shp")
    assert [
        (one["human_ref_A"], one["human_ref_B"], one["score_A"], one["score_B"], one["labels"])
        for one in scored
    ] == [("x", "y", 3, 1, 1), ("x", "z", 2, 0, 1)]
    assert (made.lost["undecided"], made.lost["tie"]) == (1, 1)


@pytest.mark.parametrize("form", ["ultrafeedback", "helpsteer", "nectar", "shp"])
def test_a_sum_is_read_as_the_form_that_it_is(plain_store, plain, tmp_path, form):
    ballots(plain, "Q", ("x", "y", "a", 3), ("y", "z", "b", 1))
    path = tmp_path / "sum.jsonl"
    export_file(plain, str(path), ExportOptions(form=form))
    other = plain_store.project("other", make=True)
    import_file(other, str(path))
    won = {
        (vote.response_a, vote.response_b) if vote.vote == "a" else
        (vote.response_b, vote.response_a)
        for vote in other.judgments.stream()
    }  # fmt: skip
    assert {("x", "y"), ("z", "y")} <= won


@pytest.mark.parametrize("form", WRITTEN)
def test_no_file_names_an_annotator_who_is_not_to_be_named(full, tmp_path, form):
    ending = "json" if form in ("label-studio", "argilla") else "jsonl"
    path = tmp_path / f"out.{ending}"
    options = ExportOptions(form=form, without_annotators=True)
    export_file(full, str(path), options)
    text = path.read_text(encoding="utf-8")
    assert not any(f'"w{n}"' in text for n in range(1, 5))
    if form == "votes":
        rows = [json.loads(line) for line in text.split("\n")[:-1]]
        assert [row["annotator"] for row in rows[:8]] == ["1", "2", "3", "4", "1", "", "", ""]


def test_no_file_has_an_identity(plain, tmp_path):
    token = plain.people.invite(name="Ann Example", email="ann@example.org")
    from tasks.feedback.store.store import Store

    Store(plain.database).door.enter(token)
    fill(plain)
    for form in WRITTEN:
        path = tmp_path / f"{form}.json"
        export_file(plain, str(path), ExportOptions(form=form))
        text = path.read_text(encoding="utf-8")
        assert "Ann Example" not in text
        assert "example.org" not in text


def test_a_file_is_replaced_only_when_told_so(full, tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_text("mine")
    with pytest.raises(UserError, match=r"is there already; --force replaces it"):
        export_file(full, str(path))
    assert path.read_text() == "mine"
    export_file(full, str(path), ExportOptions(force=True))
    assert path.read_text() != "mine"
    (tmp_path / "tasks.config.xml").write_text("mine")
    with pytest.raises(UserError, match=r"tasks.config.xml is there already"):
        export_file(full, str(tmp_path / "tasks.json"), ExportOptions(form="label-studio"))
    assert not (tmp_path / "tasks.json").exists()


def test_a_full_disk_leaves_what_was_there(full, tmp_path, monkeypatch):
    from tasks.feedback.forms import files

    path = tmp_path / "votes.jsonl"
    path.write_text("mine")

    def full_disk(file, rows):
        file.write("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_lines", full_disk)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        export_file(full, str(path), ExportOptions(force=True))
    assert path.read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir() if "part" in file.name) == []


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("x.csv", "votes", "this form is written to .jsonl"),
        ("x.parquet", "argilla", "this form is written to .json, .jsonl"),
        ("none/x.jsonl", "votes", "there is no"),
        ("x.jsonl", "nectars", "there is no form 'nectars'; there are: votes, pairs"),
    ],
)
def test_a_place_or_form_that_is_none_is_refused(full, tmp_path, name, form, message):
    with pytest.raises(UserError) as caught:
        export_file(full, str(tmp_path / name), ExportOptions(form=form))
    assert message in str(caught.value)


def test_settings_that_raw_votes_have_no_use_for_are_refused(full, tmp_path):
    path = str(tmp_path / "votes.jsonl")
    export_file(full, path)
    with pytest.raises(DataError, match="remove --score-margin"):
        import_file(full, path, ImportOptions(score_margin=1.0))


BAD = {
    "vote": ("c", "'vote': is 'c', not a, b, tie, both_bad, skip"),
    "shown_first": ("left", "'shown_first': is 'left', not nothing, a, b"),
    "prompt": (7, "'prompt': is neither text nor messages"),
    "response_a": (None, "'response_a': is not text"),
    "seconds": ("x", "'seconds': is 'x', not a number of seconds"),
    "margin": (True, "'margin': is True, not a finite number"),
    "kept": ([1], "'kept': is [1], not an object"),
    "sampling_a": ({"t": float("nan")}, "'sampling_a': cannot be written as JSON"),
    "sampling_b": ({"t": ["a\0"]}, "'sampling_b': has a null character"),
    "ballot": (-1, "'ballot': is -1, not a whole number"),
    "gold_answer": ("yes", "'gold_answer': is 'yes', not nothing, a, b, tie"),
}


@pytest.mark.parametrize("field", BAD)
def test_a_raw_vote_that_is_none_is_a_bad_row(plain, tmp_path, field):
    ballots(plain, "Q", ("x", "y", "a", 1))
    path = tmp_path / "votes.jsonl"
    export_file(plain, str(path))
    row = json.loads(path.read_text())
    value, message = BAD[field]
    path.write_text(json.dumps({**row, field: value}))
    with pytest.raises(DataError) as caught:
        import_file(plain, str(path))
    assert f"line 1, field {message}" in str(caught.value)

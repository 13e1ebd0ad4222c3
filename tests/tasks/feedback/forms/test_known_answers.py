"""Known answers and what no training may see, on their way into files and back."""

import json

import pyarrow.parquet as pq
import pytest

from rlhf_core.data.formats import parse
from rlhf_core.data.prepared import known_answers
from rlhf_core.data.sources import read_rows
from rlhf_core.errors import DataError
from rlhf_core.settings.fields import GOLD
from rlhf_core.training.annotators import VoteFacts
from tasks.feedback.forms.incoming import import_file
from tasks.feedback.forms.options import ExportOptions, ImportOptions
from tasks.feedback.forms.outgoing import export_file
from tasks.feedback.store.records import Answer, Ballot, NewPair

SUMS = ("ultrafeedback", "helpsteer", "nectar", "shp")


def pair(number, gold=None):
    return NewPair(f"Q{number}", Answer(f"good {number}"), Answer(f"bad {number}"), gold=gold)


def cast(*said, **more):
    return Ballot(*said, source="a survey", **more)


def fill(project):
    """Four pairs with an answer that is known, and one without."""
    project.judgments.add(
        [
            (pair(0, "a"), [cast("a", "ann", "a"), cast("b", "bob", "b", time="2026-01-01")]),
            (pair(1, "b"), [cast("a", "ann"), cast("skip", "bob")]),
            (pair(2, "tie"), [cast("a", "ann"), cast("b")]),
            (pair(3, "a"), [cast("tie", "ann")]),
            (pair(4), [cast("a", "ann")]),
            (pair(5, "a"), [cast("skip", "ann")]),
        ]
    )
    project.content.add([pair(6, "a")])


@pytest.fixture
def full(plain):
    fill(plain)
    return plain


def out(project, path, **options):
    return export_file(project, str(path), ExportOptions(**options))


def rows_of(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def right(project):
    """The text of the right answer to each pair with votes, or that it is a tie."""
    found = {}
    for vote in project.judgments.stream(skips=True):
        if vote.gold:
            words = {"a": vote.response_a, "b": vote.response_b}
            found[vote.prompt] = words.get(vote.gold, vote.gold)
    return found


# ---- training files ----


def test_a_training_file_that_is_imported_is_written_again_byte_by_byte(
    plain_store, full, tmp_path
):
    taken = full.snapshots.take()
    full.snapshots.write(taken.digest, tmp_path / "one.jsonl")
    other = plain_store.project("other", make=True)
    imported = import_file(other, str(tmp_path / "one.jsonl"))
    assert (imported.new_votes, imported.gold, other.gold.count()) == (7, 4, 4)
    assert imported.notes == []  # and no word of control questions without an answer
    assert right(other) == {"Q0": "good 0", "Q1": "bad 1", "Q2": "tie", "Q3": "good 3"}
    again = other.snapshots.take()
    assert (again.votes, again.known, again.annotators) == (taken.votes, taken.known, 2)
    other.snapshots.write(again.digest, tmp_path / "two.jsonl")
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert import_file(other, str(tmp_path / "two.jsonl")).new_votes == 0
    assert other.gold.count() == 4


def test_a_reward_model_takes_them_for_known_answers(full, tmp_path):
    full.snapshots.take()
    full.snapshots.write("latest", tmp_path / "votes.jsonl")
    source = read_rows(str(tmp_path / "votes.jsonl"), split="", subset="", limit=0)
    votes = parse(source, "preferences", {}).frame
    assert known_answers(votes).sum() == 4
    facts = VoteFacts.of(votes, GOLD)
    assert (facts.annotator == 0).sum() == 4
    assert set(facts.names[1:]) == {"(anonymous)", "ann", "bob"}
    assert facts.side[facts.annotator == 0].tolist() == [0] * 4


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"vote": "a"}, "field 'annotator': is 'gold', which is how known answers are called"),
        ({"vote": "both_bad", "gold": True}, "is no right answer; it is a, b or tie"),
    ],
)
def test_a_person_is_not_called_so_and_neither_is_everything_an_answer(plain, tmp_path, row, said):
    path = tmp_path / "votes.jsonl"
    whole = {"prompt": "Q", "response_a": "x", "response_b": "y", "annotator": " gold "}
    path.write_text(json.dumps(whole | row))
    with pytest.raises(DataError, match=said):
        import_file(plain, str(path))
    assert plain.gold.count() == 0
    if "gold" not in row:
        assert import_file(plain, str(path), ImportOptions(who="hashed")).new_votes == 1


def test_an_answer_that_the_store_has_stays(full, tmp_path):
    path = tmp_path / "votes.jsonl"
    answer = {"prompt": "Q0", "response_a": "good 0", "response_b": "bad 0"}
    path.write_text(json.dumps(answer | {"vote": "b", "annotator": "gold", "gold": True}))
    found = import_file(full, str(path))
    assert right(full)["Q0"] == "good 0"
    assert found.notes == [
        "1 known answer of the file is not the one that the project has, which stays; `rlhf "
        "feedback gold` changes it"
    ]


# ---- forms ----


@pytest.mark.parametrize("name", ["votes.jsonl", "votes.parquet"])
def test_raw_votes_have_known_answers_as_rows_and_come_back(plain_store, full, tmp_path, name):
    made = out(full, tmp_path / name)
    known = [row for row in rows_of(tmp_path / name) if row["annotator"] == GOLD]
    assert made.known == len(known) == 4
    assert f"{made.rows} rows as raw votes, 4 of them known answers." in made.lines()[0]
    assert {(row["prompt"], row["vote"], row["gold"]) for row in known} == {
        ("Q0", "a", True),
        ("Q1", "b", True),
        ("Q2", "tie", True),
        ("Q3", "a", True),
    }
    other = plain_store.project("other", make=True)
    import_file(other, str(tmp_path / name))
    assert other.snapshots.take().digest == full.snapshots.take().digest
    assert other.gold.count() == 5  # that of the pair which was only skipped stands beside the skip


def test_chosen_and_rejected_have_them_but_for_ties(plain_store, full, tmp_path):
    made = out(full, tmp_path / "pairs.jsonl", form="pairs", without_annotators=True)
    known = [row for row in rows_of(tmp_path / "pairs.jsonl") if row["annotator"] == GOLD]
    assert {(row["chosen"], row["gold"]) for row in known} == {
        ("good 0", True),
        ("bad 1", True),
        ("good 3", True),  # although the only vote on it is a tie
    }
    assert "1 right answer" in made.loss()
    other = plain_store.project("other", make=True)
    import_file(other, str(tmp_path / "pairs.jsonl"))
    assert right(other) == {"Q0": "good 0", "Q1": "bad 1"}
    assert other.gold.count() == 3


@pytest.mark.parametrize("form", ["hh-rlhf", *SUMS])
def test_forms_without_annotators_say_that_they_have_none(full, tmp_path, form):
    made = out(full, tmp_path / "out.jsonl", form=form)
    assert made.known == 0
    assert "4 right answers" in made.loss()


def test_a_snapshot_is_written_with_what_was_right_then(full, tmp_path):
    taken = full.snapshots.take()
    full.gold.mark([], "test")
    full.judgments.add([(pair(4, "a"), [Ballot("b", "bob")])])
    made = out(full, tmp_path / "votes.jsonl", snapshot=taken.digest)
    assert made.known == 4


# ---- what no training may see ----


@pytest.fixture
def held_out(full):
    """A project in which one pair with an answer is held out, and one was for judges."""
    [one] = full.content.add([NewPair("H", Answer("x"), Answer("y"), gold="a", wanted=2)])
    assert full.content.prioritise([(one.id, "hold_out")]) == 1
    judged = NewPair("J", Answer("x"), Answer("y"))
    full.content.add([judged], batch=full.content.batch("evaluation-1", "judge"))
    ballots = [Ballot("a", "ann"), Ballot("a", "bob"), Ballot("skip", "cem")]
    full.judgments.add([(NewPair("H", Answer("x"), Answer("y")), ballots), (judged, ballots[1:])])
    return full


@pytest.mark.parametrize("form", ["votes", "pairs", "hh-rlhf", *SUMS])
def test_no_form_has_what_no_training_may_see_unless_it_is_asked_for(held_out, tmp_path, form):
    raw = form == "votes"  # which has skips as well
    path = tmp_path / "out.jsonl"
    before = out(held_out, path, form=form)
    assert dict(before.kept_back) == {"hold-out": 2 + raw, "verdicts": 1 + raw}
    text = path.read_text()
    assert not {"H", "J"} & prompts(text)
    assert (
        f"Left out: {2 + raw} votes that measure what the order of the queue saves, and no "
        "training may see; --with hold-out writes them."
    ) in before.lines()
    assert "pairs without a vote" not in before.loss() or before.lost["unvoted"] == UNVOTED[raw]
    with_it = out(held_out, path, form=form, also=("hold-out",), force=True)
    assert dict(with_it.kept_back) == {"verdicts": 1 + raw}
    assert with_it.rows > before.rows
    everything = out(held_out, path, form=form, also=("hold-out", "verdicts"), force=True)
    assert dict(everything.kept_back) == {}
    assert everything.lost["unvoted"] == before.lost["unvoted"]


UNVOTED = {True: 1, False: 2}  # one was never shown, and one was only skipped


def prompts(text):
    return {
        word.strip()
        for line in text.split("\n")[:-1]
        for value in json.loads(line).values()
        if isinstance(value, str)
        for word in value.replace("Human:", "\n").split("\n")
    }


def test_raw_votes_of_a_project_with_a_hold_out_have_the_digest_of_its_snapshot(
    plain_store, held_out, tmp_path
):
    out(held_out, tmp_path / "votes.jsonl")
    other = plain_store.project("other", make=True)
    import_file(other, str(tmp_path / "votes.jsonl"))
    assert other.snapshots.take().digest == held_out.snapshots.take().digest


def test_known_answers_to_what_is_held_out_are_in_no_training_file(held_out, tmp_path):
    taken = held_out.snapshots.take()
    held_out.snapshots.write(taken.digest, tmp_path / "votes.jsonl")
    assert taken.known == 4
    assert not {"H", "J"} & {row["prompt"] for row in rows_of(tmp_path / "votes.jsonl")}


def test_what_is_no_such_votes_is_refused(full, tmp_path):
    with pytest.raises(DataError, match="--with takes hold-out or verdicts, not 'skips'"):
        out(full, tmp_path / "votes.jsonl", also=("skips",))
    assert not (tmp_path / "votes.jsonl").exists()

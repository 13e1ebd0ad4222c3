"""Votes go in once, snapshots stay what they are, and a digest says what the votes say."""

import json
import re

import pytest

from rlhf_core.errors import DataError
from tasks.feedback.store.database import open_database
from tasks.feedback.store.gold import KnownAnswer
from tasks.feedback.store.records import Answer, Ballot, NewPair, Vote
from tasks.feedback.store.store import Store


def pair(n, **more):
    return NewPair(f"p{n}", Answer(f"a{n}", "m/1"), Answer(f"b{n}", "m/2"), **more)


def turned(new: NewPair) -> NewPair:
    gold = {"a": "b", "b": "a"}.get(new.gold, new.gold)
    return NewPair(new.prompt, new.b, new.a, kept=new.kept, gold=gold)


def turned_ballot(ballot: Ballot) -> Ballot:
    other = {"a": "b", "b": "a"}
    return Ballot(
        other.get(ballot.vote, ballot.vote),
        ballot.annotator,
        other.get(ballot.first, ballot.first),
        time=ballot.time,
        source=ballot.source,
    )


# Of the votes below, as it was before training files had known answers.
OF_VOTES = "ad46c3fdaee48bf8"
VOTES = [
    (
        pair(n // 2, gold="a" if n < 4 else None, kept={"team": str(n % 3)}),
        [
            Ballot(
                ("a", "b", "tie", "both_bad")[n % 4],
                ("ann", "bob", "")[n % 3],
                ("a", "b", "")[n % 3],
                time=f"2026-01-01T00:00:{n:02d}",
                source="file",
            )
        ],
    )
    for n in range(24)
]


def lines(project, folder, which="latest"):
    project.snapshots.write(which, folder / "votes.jsonl")
    return (folder / "votes.jsonl").read_bytes()


def test_the_same_votes_are_the_same_digest_and_the_same_bytes(store, tmp_path):
    """In another database, in another order, in other chunks, with the answers exchanged."""
    one = store.project("one", make=True)
    one.judgments.add(VOTES)
    other_store = Store(open_database(f"sqlite:///{tmp_path / 'other.db'}"))
    other_store.project("some project before it", make=True).judgments.add(VOTES[:3])
    other = other_store.project("other", make=True)
    again = [(turned(new), [turned_ballot(ballot) for ballot in said]) for new, said in VOTES]
    other.judgments.add(reversed(again), chunk=5)
    assert one.snapshots.take().digest == other.snapshots.take().digest
    assert lines(one, tmp_path) == lines(other, tmp_path)
    other_store.close()


@pytest.mark.parametrize(
    "more",
    [
        (pair(1), [Ballot("a", "cem")]),
        (pair(99), [Ballot("tie")]),
        (pair(1, kept={"team": "9"}), [Ballot("a")]),
    ],
)
def test_another_vote_is_another_digest(project, more):
    project.judgments.add(VOTES)
    before = project.snapshots.take()
    assert project.judgments.add([more]) == 1
    after = project.snapshots.take()
    assert (before.digest == after.digest, after.new) == (False, True)
    assert project.snapshots.find(before.digest[:8]).digest == before.digest


def test_a_snapshot_stays_as_it_was(store, project, tmp_path):
    """Whatever is voted, undone or known to be right afterwards."""
    project.change("test", {"gold_every": 0})
    project.content.add([pair(100, wanted=1)])
    who = store.door.who(store.door.enter(project.people.invite())).annotator
    [task] = project.queue.lease(who)
    project.queue.vote(who, task.token, Vote("left", "k"))
    project.judgments.add(VOTES)
    taken = project.snapshots.take()
    before = lines(project, tmp_path)
    members = [vote.judgment for vote in project.snapshots.votes(taken.digest)]
    project.queue.undo(who)
    project.judgments.add([(pair(7), [Ballot("a", "new")])])
    project.gold.mark([KnownAnswer(pair(1), "b"), KnownAnswer(pair(8), "tie")], "test")
    assert lines(project, tmp_path, taken.digest) == before
    assert [vote.judgment for vote in project.snapshots.votes(taken.digest)] == members
    later = project.snapshots.take()
    assert later.digest != taken.digest
    assert later.votes == taken.votes - 1 + 1
    assert [one.digest for one in project.snapshots.all()] == [later.digest, taken.digest]


def test_votes_that_were_changed_by_hand_are_noticed(store, project, tmp_path):
    project.judgments.add(VOTES)
    taken = project.snapshots.take()
    with store.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE prompts SET digest = digest")  # nothing
        connection.exec_driver_sql("UPDATE annotators SET pseudonym = 'eve' WHERE id = 1")
    (tmp_path / "votes.jsonl").write_text("what was there")
    with pytest.raises(DataError, match="database was changed by hand"):
        project.snapshots.write(taken.digest, tmp_path / "votes.jsonl")
    assert (tmp_path / "votes.jsonl").read_text() == "what was there"
    assert len(list(tmp_path.glob(".*"))) == 0


def test_a_training_file_has_each_vote_once(store, project, tmp_path):
    """Control questions with gold true beside what is right, no repeats, and one vote of a
    person."""
    project.judgments.add(
        [
            (pair(1, gold="a"), [Ballot("b", "ann", "a", time="1")]),
            (pair(2), [Ballot("a", "ann", time="2"), Ballot("b", "ann", time="1")]),
            (pair(3), [Ballot("a", "ann"), Ballot("a", "ann", kind="repeat", time="2")]),
            (pair(4), [Ballot("both_bad"), Ballot("both_bad", ballot=1), Ballot("skip", "ann")]),
        ]
    )
    taken = project.snapshots.take()
    assert (taken.votes, taken.training, taken.pairs, taken.annotators) == (7, 5, 4, 1)
    assert taken.known == project.snapshots.find().known == project.snapshots.all()[0].known == 1
    rows = [json.loads(line) for line in lines(project, tmp_path).splitlines()]
    said = []
    for row in rows:
        words = {"a": row["response_a"], "b": row["response_b"]}
        voted = words.get(row["vote"], row["vote"])
        said.append((row["prompt"], row["annotator"], voted, row["gold"], row["time"]))
    assert sorted(said) == [
        ("p1", "ann", "b1", True, "1"),
        ("p1", "gold", "a1", True, ""),
        ("p2", "ann", "b2", False, "1"),
        ("p3", "ann", "a3", False, ""),
        ("p4", "", "both_bad", False, ""),
        ("p4", "", "both_bad", False, ""),
    ]


def test_a_known_answer_stands_once_before_the_votes_on_its_pair(project, tmp_path):
    """Whatever the sides, and whether people were right; nobody's time, side, margin or source."""
    people = [Ballot(v, f"p{n}", "a", 0.5, 3.0, "2026", source="file") for n, v in enumerate("abb")]
    for n, right in enumerate(("a", "b", "tie", None)):
        project.judgments.add([(pair(n, gold=right, kept={"team": "x"}), people)])
        project.judgments.add([(turned(pair(10 + n, gold=right)), people)])
    project.content.add([pair(99, gold="a", wanted=1)])  # nobody has voted on it
    taken = project.snapshots.take()
    rows = [json.loads(line) for line in lines(project, tmp_path).splitlines()]
    known = [row for row in rows if row["annotator"] == "gold"]
    assert taken.known == len(known) == 6
    assert taken.training == len(rows) - len(known) == 24
    ids = [row["id"] for row in rows]
    right = {}
    for row in known:
        assert ids.index(row["id"]) == rows.index(row)  # before the votes
        assert row["gold"] is True
        assert (row["shown_first"], row["margin"], row["time"], row["source"]) == ("", 0, "", "")
        assert row.get("team") == ("x" if len(row["prompt"]) == 2 else None)
        right[row["prompt"]] = {"a": row["response_a"], "b": row["response_b"]}.get(
            row["vote"], row["vote"]
        )
    assert right == {
        **{"p0": "a0", "p1": "b1", "p2": "tie"},
        **{"p10": "a10", "p11": "b11", "p12": "tie"},
    }


def test_a_snapshot_that_was_there_gets_the_answer_that_it_knew(project, tmp_path):
    """Digests do not depend on how files are written."""
    project.judgments.add(VOTES)
    taken = project.snapshots.take()
    assert taken.digest.startswith(OF_VOTES)
    assert taken.known == 2
    project.gold.mark([KnownAnswer(pair(5), "b")], "test")
    project.gold.mark([KnownAnswer(pair(1), "tie")], "test")  # another answer than before
    rows = [json.loads(line) for line in lines(project, tmp_path, taken.digest).splitlines()]
    known = {row["prompt"]: row for row in rows if row["annotator"] == "gold"}
    assert known.keys() == {"p0", "p1"}
    assert known["p1"][f"response_{known['p1']['vote']}"] == "a1"
    later = project.snapshots.take()
    assert later.digest != taken.digest
    assert later.known == 3


def test_nobody_is_called_as_known_answers_are(store, project, tmp_path):
    for name in ("gold", " gold "):
        with pytest.raises(DataError, match="called 'gold', and votes of this name are known"):
            project.judgments.add([(pair(1), [Ballot("a", name)])])
    # A store may have somebody who came in before that was refused.
    project.judgments.add([(pair(1, gold="a"), [Ballot("a", "ann"), Ballot("b", "bob")])])
    with store.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE annotators SET pseudonym = 'gold' WHERE id = 1")
    project.snapshots.take()
    rows = [json.loads(line) for line in lines(project, tmp_path).splitlines()]
    assert [(row["annotator"], row["gold"]) for row in rows if row["annotator"] == "gold"] == [
        ("gold", True),
        ("gold", False),
    ]


def test_an_import_says_what_it_did_with_each_vote(store, project):
    assert project.judgments.put(VOTES) == (24, 0, 0)
    assert project.judgments.put(VOTES) == (0, 24, 0)
    assert project.judgments.put([(pair(0), [Ballot("b", "ann", time="later")])]) == (1, 0, 1)
    project.change("test", {"gold_every": 0})
    project.content.add([pair(50, wanted=1)])
    person = store.door.who(store.door.enter(project.people.invite()))
    [task] = project.queue.lease(person.annotator)
    project.queue.vote(person.annotator, task.token, Vote("left", "k", time="2026-05-05"))
    kept = list(project.judgments.stream())[-1]
    exported = Ballot(kept.vote, kept.annotator, kept.first, time=kept.time, source="a file")
    assert project.judgments.put([(pair(50), [exported])]) == (0, 1, 0)  # it was cast here
    other = Ballot("tie", kept.annotator, time="2026-05-06")
    assert project.judgments.put([(pair(50), [other])]) == (1, 0, 1)


PROMPTS = [
    "NUL \0 in it",
    "\x1b[31m",
    "🦜" * 50_000,
    "﷽ مرحبا \u202e ab\u0301 \ufeff",
    [{"role": "user", "content": 'say "[]"'}, {"role": "assistant", "content": "\0"}],
    '[{"content": "x", "role": "user"}]',
    [{"content": "x", "role": "user"}],
]


def test_texts_come_out_as_they_went_in(project, tmp_path):
    votes = [(NewPair(text, Answer("\0x"), Answer("y\x1b")), [Ballot("a")]) for text in PROMPTS]
    assert project.judgments.add(votes) == len(PROMPTS)
    assert project.judgments.add(votes) == 0
    assert [vote.prompt for vote in project.judgments.stream()] == PROMPTS
    project.snapshots.take()
    rows = [json.loads(line) for line in lines(project, tmp_path).decode().split("\n")[:-1]]
    assert all({row["response_a"], row["response_b"]} == {"\0x", "y\x1b"} for row in rows)
    assert len({row["id"] for row in rows}) == len(PROMPTS)


@pytest.mark.parametrize(
    ("new", "ballot", "complaint"),
    [
        (NewPair("\ud800", Answer("a"), Answer("b")), Ballot("a"), "the prompt is broken text"),
        (NewPair(7, Answer("a"), Answer("b")), Ballot("a"), "neither text nor a list"),
        (NewPair([], Answer("a"), Answer("b")), Ballot("a"), "neither text nor a list"),
        (NewPair([{"role": "user"}], Answer("a"), Answer("b")), Ballot("a"), "a message"),
        (NewPair("p", Answer(None), Answer("b")), Ballot("a"), "answer a is of type NoneType"),
        (pair(1, kept={"vote": "b"}), Ballot("a"), "a column 'vote' cannot be kept"),
        (pair(1, kept={"n": 1}), Ballot("a"), "the kept column 'n' is of type int"),
        (pair(1), Ballot("c"), "'c' is no vote"),
        (pair(1), Ballot("a", first="left"), "'left' is no side"),
        (pair(1), Ballot("a", margin=float("inf")), "the margin of a vote"),
        (pair(1), Ballot("a", seconds=-2.0), "-2.0 seconds"),
        (pair(1), Ballot("a", "x" * 201), "an annotator is called"),
        (pair(1), Ballot("a", "a\nb"), "an annotator is called"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_nothing_of_it_stays(project, new, ballot, complaint):
    with pytest.raises(DataError, match=complaint):
        project.judgments.add([(pair(2), [Ballot("a")]), (new, [ballot])])
    assert list(project.judgments.stream()) == []


@pytest.mark.parametrize("which", ["", "%", "abc", "g" * 8, "0" * 65, "'; DROP TABLE x"])
def test_what_names_no_snapshot(project, which):
    with pytest.raises(DataError, match="names no snapshot"):
        project.snapshots.find(which)


def test_a_snapshot_that_is_not_there(project):
    with pytest.raises(DataError, match="has no votes yet"):
        project.snapshots.take()
    for which in ("latest", "abcd"):
        with pytest.raises(DataError, match=re.escape(f"'{which}' of the feedback project")):
            project.snapshots.find(which)


def test_answers_that_people_agree_on_become_control_questions(project):
    names = ("ann", "bob", "cem", "dan")
    project.judgments.add(
        [
            (pair(1), [Ballot("a", name) for name in names]),
            (pair(2), [Ballot("a" if name < "d" else "b", name) for name in names]),
            (pair(3), [Ballot("tie", "ann"), Ballot("both_bad", "bob"), Ballot("tie", "cem")]),
            (pair(4), [Ballot("a")] * 3),  # nobody knows who
        ]
    )
    assert project.gold.mark_agreed("test") == (2, 0, 0)
    assert project.gold.mark_agreed("test", share=0.75) == (1, 0, 0)
    found = {vote.prompt: vote.gold for vote in project.judgments.stream()}
    assert found == {"p1": "a", "p2": "a", "p3": "tie", "p4": ""}

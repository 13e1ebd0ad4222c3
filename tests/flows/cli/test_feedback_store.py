"""`rlhf feedback projects`, `snapshots`, `rules`, `gold` and `audit` as typed."""

import json

import pytest

from tasks.feedback.store.records import Answer, Ballot, NewPair
from tasks.feedback.store.store import Store


@pytest.fixture
def project(feedback):
    store = Store.open()
    made = store.project("demo", make=True)
    pair = NewPair("P", Answer("x"), Answer("y"), wanted=5)
    made.judgments.add([(pair, [Ballot("a", name) for name in ("ann", "bob", "cem")])])
    yield made
    store.close()


def refused(result) -> str:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def test_an_empty_store_says_how_to_begin(feedback):
    assert "rlhf feedback import NAME FILE" in feedback("projects").stdout
    assert "there is no feedback project 'demo'" in refused(feedback("snapshots", "demo"))


def test_projects_and_snapshots_are_listed(feedback, project):
    assert "rlhf feedback snapshot demo" in feedback("snapshots", "demo").stdout
    taken = project.snapshots.take()
    row = feedback("projects").stdout.splitlines()[3]
    assert [cell.strip() for cell in row.strip("│").split("│")][:5] == ["demo", "1", "3", "2", "1"]
    assert f" {taken.digest[:12]} " in feedback("snapshots", "demo").stdout


def test_rules_are_shown_and_changed(feedback, project, tmp_path):
    (tmp_path / "help.md").write_text("Read *twice*.\n")
    shown = feedback("rules", "demo", "--set", "votes_per_pair=3", "--guidelines", "help.md")
    assert "votes_per_pair: 3" in shown.stdout
    assert project.rules.guidelines == "Read *twice*.\n"
    assert project.rules.votes_per_pair == 3
    assert feedback("rules", "demo").stdout == shown.stdout
    assert '"votes_per_pair": "3"' in feedback("audit", "demo").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "votes_per_pair=none"], "the rule 'votes_per_pair' cannot be so"),
        (["--set", "votes=3"], "the rule 'votes' cannot be so"),
        (["--set", "nonsense"], "is no RULE=VALUE"),
        (["--guidelines", "absent.md"], "absent.md cannot be read"),
        (["--guidelines", "latin.md"], "latin.md is no text in UTF-8"),
    ],
)
def test_rules_that_cannot_be(feedback, project, tmp_path, arguments, said):
    (tmp_path / "latin.md").write_bytes(b"caf\xe9")
    before = project.rules
    assert said in refused(feedback("rules", "demo", *arguments))
    assert project.rules == before


def test_another_consent_needs_another_version(feedback, project, tmp_path):
    (tmp_path / "new.md").write_text("Something else.")
    store = Store(project.database)
    who = store.door.who(store.door.enter(project.people.invite())).annotator
    project.people.agree(who, version="1", text=project.rules.consent, licence="CC BY 4.0")
    assert "another consent_version" in refused(feedback("rules", "demo", "--consent", "new.md"))
    changed = feedback("rules", "demo", "--consent", "new.md", "--set", "consent_version=2")
    assert changed.exit_code == 0
    assert not project.people.has_agreed(who, project.rules.consent_version)


def test_control_questions_from_a_file_and_by_agreement(feedback, project, tmp_path):
    rows = [
        {"prompt": "P", "response_a": "y", "response_b": "x", "right": "b", "reason": "x is right"},
        {"prompt": "Q", "response_a": "1", "response_b": "2", "right": "tie"},
    ]
    (tmp_path / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = feedback("gold", "demo", "--file", "known.jsonl")
    assert first.stdout.startswith("2 new control questions, 0 with another answer")
    assert [vote.gold for vote in project.judgments.stream()] == ["a"] * 3
    again = feedback("gold", "demo", "--file", "known.jsonl")
    assert "2 as they were; 2 in all" in again.stdout
    pair = NewPair("R", Answer("x"), Answer("y"))
    project.judgments.add([(pair, [Ballot("b", name) for name in ("ann", "bob", "cem")])])
    assert feedback("gold", "demo", "--agreed", 3).stdout.startswith("1 new control questions")
    assert "audit" not in refused(feedback("gold", "demo"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "P"}\n', "line 1: a line has prompt, response_a"),
        ("\n{\n", "line 2: it is no JSON"),
        (
            '{"prompt": "P", "response_a": "x", "response_b": "y", "right": "left"}\n',
            "line 1: 'left' is no right answer",
        ),
        (
            '{"prompt": 7, "response_a": "x", "response_b": "y", "right": "a"}\n',
            "line 1: the prompt is neither text",
        ),
    ],
)
def test_a_file_of_known_answers_that_cannot_be(feedback, project, tmp_path, text, said):
    (tmp_path / "known.jsonl").write_text(text)
    assert said in refused(feedback("gold", "demo", "--file", "known.jsonl"))
    assert project.gold.count() == 0

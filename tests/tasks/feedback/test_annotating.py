"""What the page of an annotator asks the server for: tasks, votes, undo, progress. All blind."""

import json
import re
import time
from datetime import timedelta
from itertools import pairwise

import pytest
from fastapi.testclient import TestClient
from label_server import PLANTED, pair, signed_in
from sqlalchemy import select

from tasks.feedback.page import annotate
from tasks.feedback.page.app import create_app
from tasks.feedback.page.progress import Remaining
from tasks.feedback.store import clock
from tasks.feedback.store.records import Answer, NewPair, Progress
from tasks.feedback.store.tables import Annotator, Assignment, Judgment, Pair

URL = "http://127.0.0.1:4300"


def browser(store, session) -> TestClient:
    """A browser that is signed in, with the proof that its page has."""
    client = TestClient(create_app(store), base_url=URL, raise_server_exceptions=False)
    client.cookies.set(client.app.state.address.cookie, session)
    client.headers["X-CSRF-Token"] = store.door.who(session).csrf
    return client


@pytest.fixture
def ada(store, project):
    return browser(store, signed_in(store, project))


def tokens(answer) -> list[str]:
    return [task["task"] for task in answer.json()["tasks"]]


def key(number: int) -> str:
    return f"{number:032x}"


def cast(client, task, choice="left", number=1, **more):
    return client.post(
        "/api/votes", json={"task": task, "choice": choice, "key": key(number), **more}
    )


def judgments(store) -> list[Judgment]:
    with store.database.reading() as session:
        return list(session.scalars(select(Judgment).order_by(Judgment.id)))


def test_two_tasks_lie_on_the_desk_as_they_were_drawn(project, ada):
    project.content.add(pair(number) for number in range(5))
    first = ada.get("/api/tasks").json()
    assert len(first["tasks"]) == 2
    assert [ada.get("/api/tasks").json() for _ in range(5)] == [first] * 5


def test_a_vote_moves_the_desk_on_and_is_kept_with_everything(store, project, ada):
    project.content.add(pair(number) for number in range(3))
    task, following = tokens(ada.get("/api/tasks"))
    assert cast(ada, task, "right", seconds=3.25, note="נ 👍").status_code == 204
    assert tokens(ada.get("/api/tasks"))[0] == following
    (kept,) = judgments(store)
    assert (kept.seconds, kept.note) == (3.25, "נ 👍")
    assert kept.vote == {"a": "b", "b": "a"}[kept.first]


def test_the_same_key_twice_is_one_vote_and_another_key_is_told_why_not(store, project, ada):
    project.content.add(pair(number) for number in range(3))
    task, _ = tokens(ada.get("/api/tasks"))
    assert [cast(ada, task, number=7).status_code for _ in range(3)] == [204] * 3
    answer = cast(ada, task, number=8)
    assert answer.status_code == 409
    assert "already" in answer.json()["detail"]
    assert len(judgments(store)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"choice": "a"},
        {"choice": "best"},
        {"key": "x"},
        {"key": "0" * 65},
        {"task": "../../etc"},
        {"seconds": -1},
        {"seconds": 1e9},
        {"seconds": "long"},
        {"note": "x" * 4001},
        {"reason": "x" * 1001},
        {"annotator": 2},
        {"first": "a"},
    ],
)
def test_votes_are_typed_and_bounded(store, project, ada, change):
    project.content.add([pair(1)])
    (task,) = tokens(ada.get("/api/tasks"))
    vote = {"task": task, "choice": "left", "key": key(1), **change}
    answer = ada.post("/api/votes", json=vote)
    assert answer.status_code == 422
    assert next(iter(change)) in answer.json()["detail"]
    assert judgments(store) == []


@pytest.mark.parametrize("seconds", ["NaN", "Infinity", "-Infinity"])
def test_no_time_is_endless(store, project, ada, seconds):
    project.content.add([pair(1)])
    (task,) = tokens(ada.get("/api/tasks"))
    body = f'{{"task": "{task}", "choice": "left", "key": "{key(1)}", "seconds": {seconds}}}'
    answer = ada.post("/api/votes", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert judgments(store) == []


def test_a_task_of_somebody_else_takes_no_vote(store, project, ada):
    project.content.add([pair(1)])
    (task,) = tokens(ada.get("/api/tasks"))
    bob = browser(store, signed_in(store, project, "Bob"))
    assert cast(bob, task).status_code == 409
    assert judgments(store) == []


def test_undo_brings_the_same_task_back_with_the_same_sides(store, project, ada):
    project.content.add(pair(number) for number in range(4))
    before = ada.get("/api/tasks").json()["tasks"]
    cast(ada, before[0]["task"])
    answer = ada.post("/api/undo", json={"key": key(50)}).json()
    assert answer["undone"]
    assert answer["tasks"] == before


def test_an_undo_that_is_sent_twice_takes_one_vote_back(store, project, ada):
    project.content.add(pair(number) for number in range(4))
    first, second = tokens(ada.get("/api/tasks"))
    cast(ada, first, number=1)
    cast(ada, second, number=2)
    for _ in range(2):
        answer = ada.post("/api/undo", json={"key": key(50)})
        assert answer.json()["undone"]
        assert tokens(answer)[0] == second
    assert [j.vote == "withdrawn" for j in judgments(store)] == [False, False, True]
    assert tokens(ada.post("/api/undo", json={"key": key(51)}))[0] == first
    assert not ada.post("/api/undo", json={"key": key(52)}).json()["undone"]


def test_nothing_left_and_paused_are_told_apart(project, ada):
    assert ada.get("/api/tasks").json() == {"tasks": [], "paused": False}
    project.content.add([pair(1)])
    project.change("me", {"paused": True})
    assert ada.get("/api/tasks").json() == {"tasks": [], "paused": True}


def test_progress_counts_today_where_the_annotator_is(store, project, ada, monkeypatch):
    project.content.add(pair(number) for number in range(9))
    moment = clock.now()
    for number, ago in enumerate((30, 3, 0)):
        monkeypatch.setattr(clock, "now", lambda ago=ago: moment - timedelta(hours=ago))
        with store.database.writing() as session:  # sessions and leases are not the point here
            session.query(Assignment).update({"leased_until": moment + timedelta(days=9)})
        task = project.queue.lease(1)[0].token
        cast(ada, task, number=number)
    since = (moment - timedelta(hours=2)).isoformat()
    assert ada.get("/api/progress", params={"since": since}).json() == {
        "done": 3, "today": 1, "left": 6, "more": False}  # fmt: skip
    long_ago = (moment - timedelta(days=99)).isoformat()
    assert ada.get("/api/progress", params={"since": long_ago}).json()["today"] == 2
    assert ada.get("/api/progress", params={"since": "2024-01-01"}).status_code == 422


def all_kinds(project, pairs=60):
    """A project in which most tasks are control questions or repeats."""
    project.change("me", {"gold_every": 2, "repeat_every": 2})
    project.content.add(pair(number) for number in range(pairs))
    project.content.add(pair(1000 + number, wanted=0, gold="a") for number in range(pairs))


def test_nothing_that_is_sent_tells_models_runs_pairs_kinds_or_people(store, project, ada):
    all_kinds(project)
    bob = signed_in(store, project, "Bob-the-other")
    said, kinds = [], set()

    def note(answer):
        said.append(f"{answer.headers}\n{answer.text}")
        return answer

    note(ada.get("/"))
    for number in range(40):
        task = tokens(note(ada.get("/api/tasks")))[0]
        choice = ("left", "right", "tie", "both_bad", "skip")[number % 5]
        note(cast(ada, task, choice, number=number, reason="r" if choice == "skip" else ""))
        note(ada.get("/api/progress"))
        if number % 10 == 9:
            note(cast(ada, task, number=10_000 + number))
            note(ada.post("/api/undo", json={"key": key(20_000 + number)}))
            note(cast(ada, task, number=30_000 + number))
    note(ada.get("/api/session"))
    note(ada.get("/api/nothing"))
    with store.database.reading() as session:
        kinds = set(session.scalars(select(Assignment.kind)))
        names = set(session.scalars(select(Annotator.pseudonym)))
        pairs = set(session.scalars(select(Pair.digest)))
    assert kinds == {"fresh", "gold", "repeat"}
    whole = "\n".join(said)
    secrets = {*PLANTED, *names, *pairs, "Ottoline", "Bob-the-other", bob, project.name}
    assert [secret for secret in secrets if secret.lower() in whole.lower()] == []
    fields = set(re.findall(r'"(\w+)":', whole))
    known = {"tasks", "task", "prompt", "left", "right", "markdown", "plain", "paused", "undone",
             "done", "today", "more", "csrf", "owner", "detail"}  # fmt: skip
    assert fields == known


def test_all_kinds_of_tasks_have_one_shape(store, project, ada):
    all_kinds(project)
    shapes = {}
    for number in range(40):
        answer = ada.get("/api/tasks")
        task = answer.json()["tasks"][0]
        with store.database.reading() as session:
            kind = session.scalar(select(Assignment.kind).filter_by(token=task["task"]))
        shape = json.dumps({name: sorted(v) if isinstance(v, dict) else len(v)
                            for name, v in task.items()})  # fmt: skip
        headers = {name for name in answer.headers if name != "content-length"}
        shapes.setdefault(kind, set()).add((shape, *sorted(headers)))
        cast(ada, task["task"], number=number)
    assert set(shapes) == {"fresh", "gold", "repeat"}
    assert len(set.union(*shapes.values())) == 1


def test_what_is_left_does_not_tell_a_control_question(store, project, ada):
    """The true number stays as it is at one; what is told goes down by one each time."""
    all_kinds(project)
    told = []
    for number in range(20):
        told.append(ada.get("/api/progress").json()["left"])
        cast(ada, tokens(ada.get("/api/tasks"))[0], number=number)
    assert [a - b for a, b in pairwise(told)] == [1] * 19
    true = project.queue.progress(1).left
    assert true > told[-1]


def test_more_than_is_counted_stays_more():
    remaining = Remaining()
    assert remaining.tell((1, 1), Progress(0, 5000, more=True)) == (5000, True)
    assert remaining.tell((1, 1), Progress(9, 5000, more=True)) == (5000, True)


def test_what_is_left_is_counted_anew_after_a_while(monkeypatch):
    moment = clock.now()
    remaining = Remaining()

    def tell(minutes, done, left):
        monkeypatch.setattr(clock, "now", lambda: moment + timedelta(minutes=minutes))
        return remaining.tell((1, 1), Progress(done, left)).left

    assert tell(0, 0, 100) == 100
    assert tell(1, 5, 97) == 95
    assert tell(60, 9, 93) == 91  # too few tasks since
    assert tell(61, 10, 92) == 92
    assert tell(62, 12, 500) == 90
    assert tell(62, 102, 40) == 40  # none would be left
    assert tell(62 + 24 * 60, 102, 700) == 700


@pytest.mark.parametrize("work", [0.0, 0.006, 0.015])
def test_answers_leave_on_a_clock(work):
    """So a control question, which is looked up otherwise, takes as long as a fresh pair."""
    took = []
    for _ in range(5):
        start = time.monotonic()
        with annotate.on_the_clock():
            time.sleep(work)
        took.append(time.monotonic() - start)
    assert annotate.TICK <= min(took) < 1.3 * annotate.TICK


def test_answers_to_tasks_and_votes_leave_on_it(project, ada, monkeypatch):
    monkeypatch.setattr(annotate, "TICK", 0.2)
    project.content.add(pair(number) for number in range(3))
    start = time.monotonic()
    (task, _) = tokens(ada.get("/api/tasks"))
    cast(ada, task)
    cast(ada, task, number=2)  # which is refused
    ada.post("/api/undo", json={"key": key(3)})
    assert time.monotonic() - start >= 4 * 0.2


def test_the_page_says_the_question_and_no_name(project, store, ada):
    project.change("me", {"question": "Which <b>one</b>?", "guidelines": "Be *kind* <script>"})
    html = ada.get("/").text
    assert "Which &lt;b&gt;one&lt;/b&gt;?" in html
    assert "Be <em>kind</em> &lt;script&gt;" in html
    assert project.name not in html
    assert "style=" not in html
    assert re.findall(r"<script(?![^>]* src=)", html) == []
    assert re.findall(r"\son\w+=", html) == []


def test_owner_of_unsent_votes_stays_and_differs(store, project):
    session = signed_in(store, project)
    ada = browser(store, session)
    bob = browser(store, signed_in(store, project, "Bob"))
    owners = [client.get("/api/session").json()["owner"] for client in (ada, ada, bob)]
    assert owners[0] == owners[1] != owners[2]
    again = store.door.enter(project.people.invite(annotator=1))
    back = browser(store, again).get("/api/session").json()
    assert back["owner"] == owners[0]
    assert back["csrf"] != ada.get("/api/session").json()["csrf"]


def test_texts_of_any_kind_are_served(project, ada):
    chat = [{"role": "user", "content": "a\x1bb"}, {"role": "assistant", "content": "c"}]
    project.content.add([NewPair(chat, Answer(""), Answer("x" * 200_000), wanted=1)])
    (task,) = ada.get("/api/tasks").json()["tasks"]
    assert "(empty)" in task["left"]["plain"] + task["right"]["plain"]
    assert "U+001B" in task["prompt"]["markdown"]

"""The admin's pages on both databases: their numbers, what they change, and texts of strangers."""

import json
import re
from datetime import timedelta
from html.parser import HTMLParser

import pytest
from fastapi.testclient import TestClient

from rlhf_core.errors import UserError
from tasks.feedback.admin import loops, numbers
from tasks.feedback.admin.people import Roster
from tasks.feedback.admin.writings import changes, writings
from tasks.feedback.page.app import create_app
from tasks.feedback.store import clock
from tasks.feedback.store.records import Answer, Ballot, NewPair, Vote
from tasks.feedback.store.tables import Pair

XSS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</textarea></td></table><svg/onload=alert(1)>",
    "\"><iframe src=javascript:alert(1)>",
    "' onmouseover='alert(1)",
    "javascript:alert(1)",
    "{{ 90001 * 90001 }}{% raw %}",
    "<!--",
    "]]><script>alert(1)</script>",
    "\u202ereversed\u202c \x1b[2J",
    "&lt;script&gt;",
    "a\nb\r\nc",
]  # fmt: skip


def signed_in(store, project, role="admin") -> TestClient:
    client = TestClient(create_app(store), base_url="http://127.0.0.1:4300")
    client.post(f"/enter/{project.people.invite(role=role, name='Boss')}", json={})
    page = client.get("/consent").text
    client.headers["X-CSRF-Token"] = re.search(r'name="csrf" content="([^"]+)"', page)[1]
    return client


@pytest.fixture
def boss(store, project) -> TestClient:
    return signed_in(store, project)


def newcomer(store, project, name="") -> int:
    session = store.door.enter(project.people.invite(name=name))
    return store.door.who(session).annotator


def add(project, count, wanted=1, gold=None, **more):
    pairs = [
        NewPair(f"p{n}", Answer(f"yes {n}"), Answer(f"no {n}"), wanted=wanted, gold=gold)
        for n in range(count)
    ]
    return project.content.add(pairs, **more)


def cast(project, who, choice="left", count=1, seconds=None, **more):
    for n in range(count):
        (task, *_) = project.queue.lease(who, 1)
        key = f"{who}-{clock.now().timestamp()}-{n}-{more}"[:64].ljust(16, "0")
        project.queue.vote(who, task.token, Vote(choice, key, seconds, **more))


@pytest.fixture
def no_extras(project):
    """Fresh pairs only, so that each number can be worked by hand."""
    project.change("test", {"gold_every": 0, "repeat_every": 0})


def test_votes_are_counted_by_the_hour_and_day(store, project, no_extras, monkeypatch):
    who = newcomer(store, project)
    add(project, 20)
    project.judgments.add([(NewPair("old", Answer("x"), Answer("y")), [Ballot("a", "someone")])])
    now = clock.now().replace(hour=15, minute=30)
    for ago, count in ((timedelta(days=13), 2), (timedelta(days=1), 3), (timedelta(minutes=90), 1),
                       (timedelta(minutes=10), 4)):  # fmt: skip
        monkeypatch.setattr(clock, "now", lambda at=now - ago: at)
        cast(project, who, count=count)
    monkeypatch.setattr(clock, "now", lambda: now)
    cast(project, who, "skip", reason="odd")
    found = numbers.throughput(project)
    assert list(found.days.values()) == [2] + [0] * 11 + [3, 5]
    assert list(found.days)[-1] == now.date()
    assert found.hours[now.replace(minute=0, second=0, microsecond=0)] == 4
    assert sum(found.hours.values()) == 5  # those of 24 hours ago have just left
    assert (found.last_hour, found.people) == (4, 1)
    assert (found.total, found.imported) == (11, 1)


def test_the_queue_and_its_batches(store, project, no_extras):
    who = newcomer(store, project)
    batch = project.content.batch("first", "ask")
    add(project, 6, wanted=2, batch=batch)
    project.content.batch("empty", "judge")
    cast(project, who, count=2)
    other = newcomer(store, project)
    cast(project, other, count=1)
    project.queue.lease(who, 2)
    found = numbers.queue_state(project)
    assert (found.open, found.done, found.withdrawn) == (5, 1, 0)
    assert (found.missing, found.leased) == (9, 2)
    empty, first = numbers.batches(project)
    assert (first.name, first.kind, first.done, first.pairs, first.waits) == (
        *("first", "ask", 1, 6, False),
    )
    assert (empty.done, empty.pairs) == (0, 0)
    project.content.withdraw(batch)
    assert numbers.queue_state(project).withdrawn == 5


def test_what_came_of_somebodys_work(store, project, no_extras):
    """Gold: 2 of 3 passed. One vote is taken back, so it does not count."""
    who = newcomer(store, project, "Ann")
    add(project, 5, gold="a")
    for task_choice in (True, True, False):
        (task,) = project.queue.lease(who, 1)
        is_left = task.left.startswith("yes")
        side = "left" if is_left == task_choice else "right"
        project.queue.vote(who, task.token, Vote(side, f"{task.token}"[:32], 2.0))
    cast(project, who, "skip", seconds=10.0, reason="unclear")
    cast(project, who, "left", seconds=30.0)
    project.queue.undo(who)
    (ann,) = Roster(project).people()
    assert (ann.name, ann.votes, ann.skips) == ("Ann", 3, 1)
    assert (ann.gold_passed, ann.gold) == (2, 3)
    assert (ann.repeats_agreed, ann.repeats) == (0, 0)
    assert ann.seconds == 2.0
    assert abs(ann.last - clock.now()) < timedelta(minutes=1)


def test_repeats_are_compared_with_the_first_vote(store, project):
    """Three repeats, whose sides are exchanged; the answers are the same in two of them."""
    project.change("test", {"gold_every": 0, "repeat_every": 1})
    who = newcomer(store, project)
    add(project, 40)
    first, agreed, repeats = {}, 0, 0
    while repeats < 3:
        (task,) = project.queue.lease(who, 1)
        texts = frozenset((task.left, task.right))
        again = texts in first
        wanted = first.get(texts, task.left)
        if again:
            repeats += 1
            if repeats == 3:
                wanted = next(iter(texts - {wanted}))
            else:
                agreed += 1
        first[texts] = wanted
        side = "left" if task.left == wanted else "right"
        project.queue.vote(who, task.token, Vote(side, task.token))
    (person,) = Roster(project).people()
    assert (person.repeats_agreed, person.repeats) == (agreed, repeats) == (2, 3)


def test_many_people_and_notes_come_in_pages(store, project, boss, no_extras):
    with store.database.writing() as session:
        from tasks.feedback.store.tables import Annotator

        session.add_all(
            Annotator(project_id=project.id, pseudonym=f"imported-{n}", via="import",
                      created_at=clock.now())
            for n in range(3000)
        )  # fmt: skip
    who = newcomer(store, project)
    add(project, 120)
    for n in range(120):
        cast(project, who, note=f"note {n} " + "x" * 3000)
    roster = Roster(project)
    assert roster.count() == 3002
    page = boss.get("/admin/people", params={"number": 3})
    assert page.status_code == 200
    assert "Page 4 of 61" in page.text
    assert len(page.content) < 300_000
    assert page.text.count('"row">imported-') == 50
    assert len(boss.get("/admin/people", params={"search": "imported-1"}).content) < 300_000
    assert "Nobody is called like this" in boss.get("/admin/people?search=%25").text
    seen, before = [], None
    while True:
        found = writings(project, before=before)
        seen += [said.note.split()[1] for said in found]
        if len(found) < 50:
            break
        before = found[-1].id
    assert seen == [str(n) for n in reversed(range(120))]
    shown = boss.get("/admin/notes")
    assert len(shown.content) < 300_000
    assert shown.text.count('class="written"') == 50
    assert [said.note[:7] for said in writings(project, search="NOTE 77 ")] == ["note 77"]
    for page in ("/admin/people?number=99999", "/admin/notes?before=1", "/admin?number=5",
                 "/admin/log?before=1"):  # fmt: skip
        assert boss.get(page).status_code == 200
    for page in ("/admin/people?number=-1", f"/admin/notes?before={10**30}", "/admin/notes?what=x",
                 "/admin/people?number=x", f"/admin/people?search={'x' * 300}"):  # fmt: skip
        assert boss.get(page).status_code == 422


class Acting(HTMLParser):
    """What of a page could act: scripts, handlers, foreign addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            leads = name in ("href", "src", "action", "formaction")
            if name.startswith("on") or name == "style" or (leads and not value.startswith("/")):
                self.found.append((tag, name, value))
        inline = tag == "script" and "src" not in dict(attrs)
        if inline or tag in ("img", "iframe", "object", "base"):
            self.found.append(tag)


def test_texts_of_strangers_stay_texts(store, project, boss, no_extras):
    add(project, 2 * len(XSS))
    for evil in XSS:
        who = newcomer(store, project, evil)
        cast(project, who, note=evil)
        cast(project, who, "skip", reason=evil)
        project.content.batch(evil, "ask")
        project.change(evil, {"question": evil, "guidelines": evil, "consent": evil})
        project.people.invite(name=evil, by=evil)
        for page in ("/admin", "/admin/people", "/admin/notes", "/admin/rules", "/admin/log",
                     "/consent"):  # fmt: skip
            answer = boss.get(page, params={"search": evil})
            assert answer.status_code == 200, page
            parser = Acting()
            parser.feed(answer.text)
            parser.found.remove(("a", "href", "#main"))
            assert parser.found == [], (page, evil)
            assert "8100180001" not in answer.text  # a template in a template
        found = [(said.note, said.reason) for said in writings(project, search=evil)]
        assert {(evil, ""), ("", evil)} <= set(found)


def test_what_the_buttons_change(store, project, boss):
    roster = Roster(project)
    link = boss.post("/admin/invite", json={"name": " Ann ", "role": "annotator", "days": 2})
    address = link.json()["link"]
    assert address.startswith("http://127.0.0.1:4300/enter/")
    (open_link,) = roster.links()
    assert (open_link.name, open_link.role) == ("Ann", "annotator")
    assert abs(open_link.expires - clock.now() - timedelta(days=2)) < timedelta(minutes=1)
    assert address.rpartition("/")[2] not in boss.get("/admin/people").text  # it was shown once
    session = store.door.enter(address.rpartition("/")[2])
    ann = store.door.who(session).annotator
    assert roster.links() == []
    for wrong in ({"days": 0}, {"days": 1e9}, {"role": "king"}, {"name": "x" * 201}, {"evil": 1},
                  {"days": None}):  # fmt: skip
        assert boss.post("/admin/invite", json=wrong).status_code == 422, wrong

    back = boss.post(f"/admin/people/{ann}/link", json={}).json()["link"].rpartition("/")[2]
    assert store.door.who(store.door.enter(back)).annotator == ann  # the same person
    boss.post(f"/admin/people/{ann}/state", json={"state": "left"})
    assert store.door.who(session) is None
    assert boss.post(f"/admin/people/{ann}/link", json={}).status_code == 422
    boss.post(f"/admin/people/{ann}/forget", json={})
    assert [person.name for person in roster.people()] == ["Boss", ""]

    me = roster.people()[0].id
    for action, form in (("state", {"state": "left"}), ("role", {"role": "annotator"}),
                         ("sign-out", {})):  # fmt: skip
        answer = boss.post(f"/admin/people/{me}/{action}", json=form)
        assert (answer.status_code, "lock yourself out" in answer.text) == (422, True)
    boss.post("/admin/pause", json={"paused": True})
    assert project.rules.paused
    assert "nobody is asked" in boss.get("/admin").text
    boss.post("/admin/pause", json={"paused": "false"})
    assert not project.rules.paused
    said = [(change.action, change.subject) for change in changes(project)]
    assert {"invite", "state left", "forget", "rules"} <= {action for action, _ in said}


def test_rules_are_checked_before_they_are_kept(project, boss):
    before = project.rules
    for wrong in (
        {"votes_per_pair": 0},
        {"votes_per_pair": None},
        {"question": ""},
        {"lease_minutes": -1},
        {"gold_every": 1.5},
        {"no_such_rule": 1},
        {"licence": "other"},  # without a new version
    ):
        answer = boss.post("/admin/rules", json=wrong)
        assert answer.status_code == 422, wrong
        assert len(answer.json()["detail"]) < 200
    assert project.rules == before
    whole = {**before.model_dump(), "question": "Which is kinder?", "votes_per_pair": 3}
    del whole["paused"]
    assert boss.post("/admin/rules", json=whole).json() == {"reload": True}
    assert project.rules == before.model_copy(
        update={"question": "Which is kinder?", "votes_per_pair": 3}
    )
    (entry, *_) = changes(project)
    assert entry.details == {"question": "Which is kinder?", "votes_per_pair": 3}


def test_the_votes_can_be_downloaded(store, project, boss, no_extras):
    who = newcomer(store, project, "Ann with a name")
    add(project, 3)
    cast(project, who, count=2)
    cast(project, who, "tie")
    answer = boss.get("/admin/votes.jsonl")
    assert answer.headers["content-disposition"] == 'attachment; filename="demo-votes.jsonl"'
    assert "Ann" not in answer.text
    rows = [json.loads(line) for line in answer.text.splitlines()]
    assert [row["prompt"] for row in rows] == ["p0", "p1", "p2"]
    pairs = boss.get("/admin/votes.jsonl?form=pairs").text.splitlines()
    assert [json.loads(line)["prompt"] for line in pairs] == ["p0", "p1"]  # a tie has no winner
    assert boss.get("/admin/votes.jsonl?form=../x").status_code == 422
    assert [change.action for change in changes(project)][:2] == ["export", "export"]


def test_agreement_is_shown_with_intervals(store, project, boss, no_extras):
    """Two people on 12 pairs: they agree on 11, so 91.7 % of the pairs of votes are equal."""
    assert "There are no votes yet" in boss.get("/admin/agreement").text
    add(project, 12, wanted=2)
    for who in (newcomer(store, project), newcomer(store, project)):
        for n in range(12):
            (task,) = project.queue.lease(who, 1)
            wanted = "no" if who % 2 and n == 7 else "yes"
            side = "left" if task.left.startswith(wanted) else "right"
            project.queue.vote(who, task.token, Vote(side, task.token, 3.0))
    shown = boss.get("/admin/agreement").text
    assert re.search(r"Two people say the same</h2><p class=.figure.>\s*91.7 %", shown)
    assert "24 votes on 12 pairs by 2 annotators" in shown
    whole = boss.get("/admin/agreement/report.html")
    assert whole.headers["content-disposition"].startswith("attachment")
    assert "<html" in whole.text
    add(project, 13)  # one more
    cast(project, newcomer(store, project), "skip")
    assert boss.get("/admin/agreement").status_code == 200


def test_a_judge_is_shown_apart_from_people_with_its_audit(store, project, boss, no_extras):
    """Of 20 pairs that it answered, people have 10, the audit, and contradict it on one."""
    assert "Judge" not in boss.get("/admin").text
    pairs = [NewPair(f"prompt {n}", Answer("yes"), Answer("no")) for n in range(20)]
    votes = [Ballot("a", "judge:m", first=side, kind="machine") for side in "ab"]
    project.judgments.add((pair, votes) for pair in pairs)
    project.judgments.add(
        (pair, [Ballot("b" if n == 4 else "a", "ann", first="a")])
        for n, pair in enumerate(pairs[:10])
    )
    with project.database.writing(project.id) as session:
        for n, row in enumerate(session.query(Pair).order_by(Pair.id)):
            row.arm = "audit" if n < 10 else "judge"
    shown = boss.get("/admin/agreement").text
    assert "10 votes on 10 pairs by 1 annotator" in shown
    assert "judge:m answers 10 pairs alone, of the 20 that it was asked about" in shown
    assert re.search(r"people contradict it on 10 % \[\d, \d\d\] of 10 audited pairs", shown)
    assert '<th scope="row">judge:m</th><td>20</td><td>10</td>' in shown
    overview = boss.get("/admin").text
    assert "10 pairs are answered by a machine alone, and 10 more by people too" in overview
    people = boss.get("/admin/people").text
    assert "judge:m" not in people
    assert "ann" in people
    machine = Roster(project).find("judge:m")
    answer = boss.post(f"/admin/people/{machine}/link", json={}, headers=boss.headers)
    assert answer.status_code >= 400


def test_the_user_of_this_machine_is_one_person(store, project):
    roster = Roster(project)
    ids = set()
    for _ in range(2):
        for role in ("annotator", "admin"):
            who = store.door.who(store.door.enter(roster.own_link("me", role)))
            assert who.role == role
            ids.add(who.annotator)
    assert len(ids) == 2
    assert roster.find(roster.people()[0].pseudonym) in ids
    with pytest.raises(UserError, match="Nobody in the project demo is called 'x'"):
        roster.find("x")


def test_what_follows_a_batch_is_shown_and_stopped(store, project, boss, no_extras):
    about = {"people": {}, "by": "", "round": 2, "asked": True}
    problem = "the deployment <b>retrain/demo</b> is paused"
    waits = {**about, "then": "retrain/demo", "problem": problem}
    first, second = (project.content.batch(name, "ask", waits) for name in ("one", "two"))
    project.content.batch("plain", "ask", {**about, "then": ""})
    add(project, 2, batch=first)
    shown = boss.get("/admin").text
    assert shown.count("Round 2; then <code>retrain/demo</code>") == 2
    assert "the deployment &lt;b&gt;retrain/demo&lt;/b&gt; is paused" in shown
    assert f'action="/admin/batches/{first}/stop"' in shown

    ada = signed_in(store, project, "annotator")
    assert ada.post(f"/admin/batches/{first}/stop", json={}).status_code == 403
    assert boss.post(f"/admin/batches/{first}/stop", json={}).json() == {"reload": True}
    assert boss.post("/admin/batches/999/stop", json={}).json() == {"reload": True}
    states = {batch.name: batch for batch in numbers.batches(project)}
    assert [states[name].follows for name in ("one", "two", "plain")] == [False, True, False]
    assert states["one"].stopped
    shown = boss.get("/admin").text
    assert "Stopped; it would have started <code>retrain/demo</code>" in shown
    assert [entry.action for entry in project.log(1)] == ["stop loop"]
    # Its pairs are labelled to the end, and the rest of the project stops at once by command.
    cast(project, newcomer(store, project), count=2)
    assert loops.stop(project, "me") == ["two"]
    assert loops.stop(project, "me") == []
    assert second

"""Who gets in, what is refused, and what every answer carries, whatever was asked."""

import json
import re
from datetime import timedelta
from html.parser import HTMLParser

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, text

from tasks.feedback.admin.people import Roster
from tasks.feedback.page import access
from tasks.feedback.page.app import create_app
from tasks.feedback.page.shield import LARGEST, Address, Rates
from tasks.feedback.store import clock
from tasks.feedback.store.records import Answer, NewPair
from tasks.feedback.store.tables import AuditEntry, Consent, Invitation, Session

ORIGIN = "http://127.0.0.1:4300"
KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def database_url(tmp_path, sqlite_template):
    """SQLite alone: what is tested here is before the store, whose tests are on both."""
    (tmp_path / "feedback.db").write_bytes(sqlite_template)
    return f"sqlite:///{tmp_path / 'feedback.db'}"


@pytest.fixture
def app(store, project):
    pairs = [
        NewPair(f"prompt {n}", Answer(f"yes {n}", model="m1"), Answer(f"no {n}", model="m2"),
                wanted=1)
        for n in range(6)
    ]  # fmt: skip
    project.content.add(pairs)
    return create_app(store)


def browser(app, origin=ORIGIN, **options) -> TestClient:
    return TestClient(app, base_url=origin, follow_redirects=False, **options)


def proof(client) -> dict[str, str]:
    """The CSRF token as the page gives it to its scripts."""
    found = re.search(r'name="csrf" content="([^"]+)"', client.get("/consent").text)
    return {"X-CSRF-Token": found[1]}


def enter(app, token, **options) -> TestClient:
    client = browser(app, **options)
    answer = client.post(f"/enter/{token}", json={})
    assert answer.status_code == 200, answer.text
    return client


def somebody(app, project, role="annotator", agrees=True, **more) -> TestClient:
    client = enter(app, project.people.invite(role=role, **more))
    client.headers.update(proof(client))
    if agrees:
        said = {"version": project.rules.consent_version, "agreed": True}
        assert client.post("/consent", json=said).json() == {"to": "/"}
    return client


def tokens(client) -> list[str]:
    return [task["task"] for task in client.get("/api/tasks").json()["tasks"]]


def vote(client, task, key=KEY, **more):
    return client.post("/api/votes", json={"task": task, "choice": "left", "key": key, **more})


def every_route(app):
    """Each method and address of the application, with some value for each parameter."""
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            yield method.upper(), re.sub(r"{\w+}", "1", path)


OPEN = {("GET", "/enter/1"), ("POST", "/enter/1"), ("GET", "/left"), ("GET", "/health")}


# ---- links ----


def test_a_look_at_a_link_does_not_use_it(app, project):
    """Mail programs and chats open links to preview them."""
    token = project.people.invite()
    for _ in range(3):
        assert "Come in" in browser(app).get(f"/enter/{token}").text
    assert browser(app).head(f"/enter/{token}").status_code == 405
    enter(app, token)
    used = browser(app).get(f"/enter/{token}")
    assert used.status_code == 410
    assert "This link was used before" in used.text
    assert browser(app).post(f"/enter/{token}", json={}).status_code == 410


def test_a_link_that_was_used_still_opens_the_page_of_its_own_browser(app, project):
    token = project.people.invite()
    client = enter(app, token)
    assert client.get(f"/enter/{token}").headers["location"] == "/"
    other = somebody(app, project)
    assert other.get(f"/enter/{token}").status_code == 410


@pytest.mark.parametrize("token", ["x", "a" * 5000, "%00", "..%2f..", "é", "<b>"])
def test_a_link_that_there_is_not_says_so(app, token):
    answer = browser(app).get(f"/enter/{token}")
    assert answer.status_code in (404, 410)
    assert "<b>" not in answer.text


def test_a_link_ends_in_time_or_when_it_is_withdrawn(app, store, project, monkeypatch):
    late, withdrawn = project.people.invite(days=1), project.people.invite()
    Roster(project).revoke(Roster(project).links()[0].id, "boss")
    assert "was withdrawn" in browser(app).get(f"/enter/{withdrawn}").text
    now = clock.now() + timedelta(days=1.01)
    monkeypatch.setattr(clock, "now", lambda: now)
    assert "has expired" in browser(app).get(f"/enter/{late}").text
    assert browser(app).post(f"/enter/{late}", json={}).status_code == 410


def test_a_form_of_another_page_cannot_sign_anybody_in(app, project):
    """Login CSRF: the victim would label under the name of the attacker."""
    token = project.people.invite()
    client = browser(app)
    plain = client.post(f"/enter/{token}", data={"a": "b"})
    assert plain.status_code == 415
    foreign = client.post(f"/enter/{token}", json={}, headers={"Origin": "https://evil.example"})
    assert foreign.status_code == 403
    assert client.post(f"/enter/{token}", json={}, headers={"Origin": "null"}).status_code == 403
    assert client.post(f"/enter/{token}", json={}, headers={"Origin": ORIGIN}).status_code == 200


def test_a_link_used_by_two_at_once_lets_in_one(app, project):
    from concurrent.futures import ThreadPoolExecutor

    token = project.people.invite()
    with ThreadPoolExecutor(6) as pool:
        codes = list(
            pool.map(lambda _: browser(app).post(f"/enter/{token}", json={}).status_code, range(6))
        )
    assert sorted(codes) == [200, 410, 410, 410, 410, 410]
    assert Roster(project).count() == 1


# ---- sessions ----


def test_the_cookie_is_for_the_browser_alone(app, project):
    answer = browser(app).post(f"/enter/{project.people.invite()}", json={})
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("rlhf_label_4300=")
    assert {"HttpOnly", "Path=/", "SameSite=lax"} <= set(cookie.split("; "))
    assert "Domain" not in cookie
    assert "Secure" not in cookie  # over plain http, browsers would drop it


def test_over_https_the_cookie_is_bound_to_the_host(store, project):
    app = create_app(store, address=Address("https://label.example.org", 4300))
    client = browser(app, "https://label.example.org")
    cookie = client.post(f"/enter/{project.people.invite()}", json={}).headers["set-cookie"]
    assert cookie.startswith("__Host-rlhf_label=")
    assert {"Secure", "HttpOnly", "Path=/", "SameSite=lax"} <= set(cookie.split("; "))
    assert "Domain" not in cookie
    assert client.get("/consent").status_code == 200


def test_a_session_that_was_brought_along_is_not_taken_over(app, project):
    client = browser(app)
    client.cookies.set("rlhf_label_4300", "chosen-by-the-attacker")
    answer = client.post(f"/enter/{project.people.invite()}", json={})
    assert "chosen-by-the-attacker" not in answer.headers["set-cookie"]
    thief = browser(app)
    thief.cookies.set("rlhf_label_4300", "chosen-by-the-attacker")
    assert thief.get("/consent").status_code == 401


def test_who_comes_in_again_leaves_the_session_before(app, project):
    client = somebody(app, project)
    before = client.cookies["rlhf_label_4300"]
    link = project.people.invite(role="admin")
    assert "You are signed in here as" in client.get(f"/enter/{link}").text
    assert client.post(f"/enter/{link}", json={}).json() == {"to": "/admin"}
    thief = browser(app)
    thief.cookies.set("rlhf_label_4300", before)
    assert thief.get("/consent").status_code == 401


@pytest.mark.parametrize("role", ["annotator", "admin"])
@pytest.mark.parametrize("limit", [access.IDLE, access.LONGEST])
def test_a_session_ends_unused_and_in_any_case(app, project, monkeypatch, role, limit):
    client = somebody(app, project, role)
    begin, step = clock.now(), access.IDLE[role] * 0.9
    at = begin

    def move(to):
        nonlocal at
        at = to

    monkeypatch.setattr(clock, "now", lambda: at)
    if limit is access.IDLE:
        move(begin + access.IDLE[role] * 1.01)
        assert client.get("/consent").status_code == 401
        return
    while at + step < begin + access.LONGEST[role]:
        move(at + step)
        assert client.get("/consent").status_code == 200  # used, it lasts
    move(begin + access.LONGEST[role] + timedelta(minutes=1))
    assert client.get("/consent").status_code == 401


def test_signing_out_ends_the_session_on_the_server(app, project):
    client = somebody(app, project)
    session = client.cookies["rlhf_label_4300"]
    assert client.post("/leave").json() == {"to": "/left"}
    assert "rlhf_label_4300" not in client.cookies
    thief = browser(app)
    thief.cookies.set("rlhf_label_4300", session)
    assert thief.get("/consent").status_code == 401
    assert client.get("/left").status_code == 200


def test_what_the_database_keeps_opens_nothing(app, store, project):
    token = project.people.invite()
    client = enter(app, token)
    session = client.cookies["rlhf_label_4300"]
    with store.database.reading() as connection:
        kept = str([list(row) for table in (Invitation, Session)
                    for row in connection.execute(select(*table.__table__.columns))])  # fmt: skip
    assert token not in kept
    assert session not in kept


# ---- who may do what ----


def test_without_a_session_there_is_nothing(app):
    routes = list(every_route(app))
    assert {("GET", "/api/tasks"), ("POST", "/api/votes"), ("GET", "/admin")} <= set(routes)
    for method, path in routes:
        if (method, path) not in OPEN:
            answer = browser(app).request(method, path, json={})
            assert answer.status_code == 401, (method, path)
            assert "prompt" not in answer.text


def test_the_pages_of_the_admin_are_for_admins_only(app, project):
    client = somebody(app, project)
    routes = [(method, path) for method, path in every_route(app) if path.startswith("/admin")]
    assert len(routes) >= 15
    for method, path in routes:
        answer = client.request(method, path, json={})
        assert (answer.status_code, "demo" in answer.text) == (403, False), (method, path)


def test_an_admin_who_is_one_no_more_is_out_at_once(app, project):
    boss, other = somebody(app, project, "admin"), somebody(app, project, "admin")
    ids = [person.id for person in Roster(project).people()]
    assert other.get("/admin").status_code == 200
    assert boss.post(f"/admin/people/{ids[1]}/role", json={"role": "annotator"}).status_code == 200
    assert other.get("/admin").status_code == 401  # signed out


def test_every_change_needs_the_proof_of_the_page(app, project):
    client = somebody(app, project, "admin")
    right = client.headers.pop("X-CSRF-Token")
    for method, path in every_route(app):
        if method == "POST" and (method, path) not in OPEN:
            for wrong in (None, "", "wrong", right + "x", right[:-1], "\u00e9".encode("latin-1")):
                headers = {} if wrong is None else {"X-CSRF-Token": wrong}
                answer = client.post(path, json={}, headers=headers)
                assert answer.status_code == 403, (path, wrong)
                assert "did not come from the page" in answer.text
    other = somebody(app, project)
    theirs = {"X-CSRF-Token": other.headers["X-CSRF-Token"]}
    assert client.post("/leave", headers=theirs).status_code == 403


def test_two_projects_know_nothing_of_each_other(app, store, project):
    other = store.project("other", make=True)
    secret = NewPair("a secret prompt", Answer("x"), Answer("y"), wanted=5)
    other.content.add([secret])
    other.people.invite(name="A secret name")
    theirs = somebody(app, other, name="Another secret name")
    (task,) = tokens(theirs)
    assert vote(theirs, task, note="a secret note").status_code == 204
    client, boss = somebody(app, project), somebody(app, project, "admin")
    for page in ("/admin", "/admin/people", "/admin/notes", "/admin/log", "/admin/rules",
                 "/admin/votes.jsonl", "/api/tasks"):  # fmt: skip
        answer = (boss if "admin" in page else client).get(page)
        assert (answer.status_code, "secret" in answer.text) == (200, False), page
    assert vote(client, task).status_code == 409
    (person,) = Roster(other).people()
    (link,) = Roster(other).links()
    for action, form in [
        ("state", {"state": "left"}),
        ("role", {"role": "admin"}),
        ("link", {}),
        ("forget", {}),
        ("sign-out", {}),
    ]:
        answer = boss.post(f"/admin/people/{person.id}/{action}", json=form)
        assert (answer.status_code, "no such person" in answer.text) == (422, True)
    assert boss.post(f"/admin/links/{link.id}/revoke", json={}).status_code == 422
    assert Roster(other).people() == [person]
    assert Roster(other).links() == [link]


def test_who_is_paused_or_left_does_not_label(app, project):
    client, boss = somebody(app, project), somebody(app, project, "admin")
    task = tokens(client)[0]
    id_ = Roster(project).people()[0].id
    boss.post(f"/admin/people/{id_}/state", json={"state": "paused"})
    for answer in (client.get("/api/tasks"), vote(client, task)):
        assert (answer.status_code, "has paused your work" in answer.text) == (403, True)
    boss.post(f"/admin/people/{id_}/state", json={"state": "active"})
    assert vote(client, task).status_code == 204
    boss.post(f"/admin/people/{id_}/state", json={"state": "left"})
    assert client.get("/api/tasks").status_code == 401


# ---- consent ----


def test_nobody_labels_before_agreeing(app, store, project):
    client = somebody(app, project, agrees=False)
    for answer in (client.get("/api/tasks"), vote(client, KEY)):
        assert answer.status_code == 403
        assert answer.json()["reason"] == "consent"
        assert answer.json()["page"] == "/consent"
    assert client.post("/consent", json={"version": "1", "agreed": False}).status_code == 422
    assert client.post("/consent", json={"version": "2", "agreed": True}).status_code == 409
    assert client.get("/api/tasks").status_code == 403
    for _ in range(2):  # sent twice, it is one
        assert client.post("/consent", json={"version": "1", "agreed": True}).status_code == 200
    assert len(tokens(client)) == 2
    with store.database.reading() as connection:
        (kept,) = connection.scalars(select(Consent)).all()
    assert (kept.version, kept.licence) == ("1", "CC BY 4.0")
    assert abs(kept.at - clock.now()) < timedelta(minutes=1)


def test_another_text_is_agreed_to_anew(app, project):
    client, boss = somebody(app, project), somebody(app, project, "admin")
    changed = {"consent": "Other **terms**"}
    refused = boss.post("/admin/rules", json=changed)
    assert (refused.status_code, "new version" in refused.text) == (422, True)
    assert boss.post("/admin/rules", json={**changed, "consent_version": "2"}).status_code == 200
    assert client.get("/api/tasks").status_code == 403
    assert "Other <strong>terms</strong>" in client.get("/consent").text
    assert client.post("/consent", json={"version": "1", "agreed": True}).status_code == 409
    assert client.post("/consent", json={"version": "2", "agreed": True}).status_code == 200
    assert client.get("/api/tasks").status_code == 200


# ---- what comes from elsewhere ----

HOSTS = ["evil.example", "127.0.0.1.evil.example", "evil.example:4300", "", "[::1", "10.0.0.1:4300",
         "127.0.0.1@evil.example"]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_the_server_answers_to_its_own_names_only(app, project, host):
    """DNS rebinding: a foreign name that leads to this machine could read the answers."""
    client = somebody(app, project)
    for path in ("/api/tasks", "/consent", "/health", "/static/label.css", "/enter/x"):
        answer = client.get(path, headers={"Host": host})
        assert (answer.status_code, "Refused" in answer.text) == (403, True), path


@pytest.mark.parametrize("host", ["127.0.0.1:4300", "localhost:4300", "LOCALHOST", "127.0.0.1"])
def test_these_are_its_names(app, host):
    assert browser(app).get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://127.0.0.1:5000", "https://127.0.0.1:4300", "", "file://",
     "http://127.0.0.1:4300.evil.example"],
)  # fmt: skip
def test_pages_of_others_may_not_ask(app, project, origin):
    client = somebody(app, project)
    before = tokens(client)
    answer = vote(client, before[0])
    assert answer.status_code == 204
    for method, path in (("POST", "/api/votes"), ("GET", "/api/tasks"), ("OPTIONS", "/api/votes"),
                         ("POST", "/leave")):  # fmt: skip
        answer = client.request(method, path, headers={"Origin": origin})
        assert answer.status_code == 403, (method, path)
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_public_address_is_a_name_as_well(store, project):
    address = Address("https://label.example.org", 4300, ("label",))
    client = browser(create_app(store, address=address), "https://label.example.org")
    for host in ("label.example.org", "label:4300", "127.0.0.1:4300"):
        assert client.get("/health", headers={"Host": host}).status_code == 200
    assert client.get("/health", headers={"Origin": "https://label.example.org"}).status_code == 200
    assert client.get("/health", headers={"Origin": "http://label.example.org"}).status_code == 403


# ---- bodies, methods, paths ----


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"task": NaN}',
     b'{"task":"\\ud800","choice":"left","key":"x"}', b'{"a":' * 500, b"0" * 5000,
     json.dumps({"task": KEY, "choice": "left", "key": KEY, "evil": 1}).encode(),
     json.dumps({"task": "'; drop table judgments; --", "choice": "left", "key": KEY}).encode(),
     json.dumps({"task": KEY, "choice": "both", "key": KEY}).encode(),
     json.dumps({"task": KEY, "choice": "left", "key": KEY, "seconds": -1}).encode(),
     json.dumps({"task": KEY, "choice": "left", "key": KEY, "note": "x" * 100_000}).encode()],
)  # fmt: skip
def test_a_malformed_vote_is_refused_in_words(app, project, body):
    client = somebody(app, project)
    for kind in ("application/json", "text/plain", "multipart/form-data", "application/xml"):
        answer = client.post("/api/votes", content=body, headers={"Content-Type": kind})
        assert answer.status_code in (400, 422), (kind, answer.text)
        detail = answer.json()["detail"]
        assert isinstance(detail, str)
        assert 0 < len(detail) < 300
    assert project.queue.progress(1).done == 0


def test_a_body_may_not_be_large(app, project):
    client = somebody(app, project)
    parts = (b"x" * 65536 for _ in range(40))
    for content in (b"x" * (LARGEST + 1), parts):
        answer = client.post("/api/votes", content=content)
        assert (answer.status_code, "larger than 1 MiB" in answer.text) == (413, True)
    bad = client.post("/api/votes", content=b"x", headers={"Content-Length": "-1"})
    assert bad.status_code == 400


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE"])
def test_other_methods_do_nothing(app, project, method):
    client = somebody(app, project)
    for path in ("/api/tasks", "/api/votes", "/admin", "/consent", "/leave", "/admin/pause"):
        assert client.request(method, path).status_code in (403, 405), path
    assert client.get("/consent").status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static//etc/passwd",
     "/static/%2e%2e%2f%2e%2e%2fstore/tables.py", "/static/..\\app.py", "/static/", "/static",
     "/static/label.css/..", "/static/%00", "//127.0.0.1/admin", "/docs", "/openapi.json"],
)  # fmt: skip
def test_there_is_nothing_beside_the_static_files(app, path):
    answer = browser(app).get(path)
    assert answer.status_code in (307, 401, 404, 405)
    assert "import" not in answer.text


# ---- what every answer carries ----


def test_every_answer_has_the_strict_headers(app, store, project, monkeypatch):
    boss = somebody(app, project, "admin")
    answers = [
        client.request(method, path, json={})
        for client in (browser(app), boss)
        for method, path in every_route(app)
        if path != "/leave"
    ]
    answers += [
        browser(app).get("/nothing"),
        browser(app).get("/static/nothing"),
        browser(app).get("/health", headers={"Host": "evil.example"}),
        browser(app).post("/consent", content=b"x" * (LARGEST + 1)),
        boss.get("/static/label.css"),
    ]
    broken = browser(app, raise_server_exceptions=False)
    with monkeypatch.context() as patch:
        patch.setattr(store.door, "look", lambda _: 1 / 0)
        answers.append(broken.get("/enter/x"))
    assert answers[-1].status_code == 500
    assert "ZeroDivision" not in answers[-1].text
    statuses = {answer.status_code for answer in answers}
    assert {200, 401, 403, 404, 410, 413, 422, 500} <= statuses
    for answer in answers:
        headers = answer.headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy.pop("default-src") == "'none'"
        assert policy.pop("base-uri") == policy.pop("frame-ancestors") == "'none'"
        assert set(policy.values()) == {"'self'"}
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY"
        is_file = str(answer.url).endswith("label.css")
        assert headers["cache-control"] == ("no-cache" if is_file else "no-store")
        assert not {"server", "x-powered-by", "access-control-allow-origin"} & {*headers}


class Loaded(HTMLParser):
    """What a page loads, and whether it has scripts, styles or handlers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded, self.inline = [], []
        self._in = ""

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag in ("script", "img", "iframe", "link"):
            self.loaded.append(found.get("src") or found.get("href") or "")
        self._in = tag
        if tag == "style" or "style" in found or any(name.startswith("on") for name in found):
            self.inline.append((tag, attrs))

    def handle_data(self, data):
        if self._in == "script" and data.strip():
            self.inline.append(data)


def test_a_page_loads_only_what_the_policy_lets_it(app, project):
    boss = somebody(app, project, "admin", agrees=False)
    link = project.people.invite()
    pages = ["/admin", "/admin/people", "/admin/notes", "/admin/rules", "/admin/log", "/consent",
             f"/enter/{link}", "/left", "/nothing"]  # fmt: skip
    for page in pages:
        parser = Loaded()
        parser.feed(boss.get(page).text)
        assert parser.loaded
        assert not parser.inline, page
        for address in parser.loaded:
            assert address.startswith("/static/")
            assert boss.get(address).status_code == 200, address


# ---- rates ----


def test_too_many_requests_wait(store, project):
    app = create_app(store, rates=Rates(session=20, address=50, entering=5))
    client = somebody(app, project)
    answers = [client.get("/api/tasks") for _ in range(25)]
    assert answers[0].status_code == 200
    assert answers[-1].status_code == 429
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    assert "Wait" in answers[-1].json()["detail"]
    links = [browser(app).post(f"/enter/{n}", json={}) for n in range(6)]
    assert [answer.status_code for answer in links].count(429) >= 2
    assert [browser(app).get("/consent") for _ in range(50)][-1].status_code == 429
    assert browser(app).get("/health").status_code == 200
    assert browser(app).get("/static/label.css").status_code == 200


def test_an_address_that_is_made_up_does_not_help(store, project):
    app = create_app(store, rates=Rates(entering=3))
    codes = [
        browser(app)
        .post(f"/enter/{n}", json={}, headers={"X-Forwarded-For": f"10.0.0.{n}"})
        .status_code
        for n in range(8)
    ]
    assert codes[-1] == 429


# ---- failures, and what is kept of it all ----


def test_a_database_that_fails_is_told_as_such(app, store, project):
    client = somebody(app, project)
    with store.database.writing() as connection:
        connection.execute(text("ALTER TABLE sessions RENAME TO gone"))
    answer = client.get("/api/tasks")
    page = client.get("/consent")
    with store.database.writing() as connection:
        connection.execute(text("ALTER TABLE gone RENAME TO sessions"))
    for said in (answer, page):
        assert said.status_code in (500, 503)
        assert "gone" not in said.text
        assert "SELECT" not in said.text
    assert client.get("/api/tasks").status_code == 200


def test_the_log_says_who_did_what(app, store, project):
    boss = somebody(app, project, "admin")
    somebody(app, project, name="Ann")
    me, ann = Roster(project).people()
    boss.post("/admin/invite", json={"name": "Ben", "role": "annotator", "days": 3})
    boss.post(f"/admin/people/{ann.id}/state", json={"state": "paused"})
    boss.post(f"/admin/people/{ann.id}/forget", json={})
    boss.post("/admin/pause", json={"paused": True})
    with store.database.reading() as connection:
        entries = connection.scalars(select(AuditEntry).filter_by(actor=me.pseudonym)).all()
    actions = [entry.action for entry in entries]
    assert actions == ["invite", "state paused", "forget", "rules"]
    shown = boss.get("/admin/log").text
    assert all(action in shown for action in actions)
    assert "Ann" not in str([(entry.subject, entry.details) for entry in entries])
    assert Roster(project).people()[1].name == ""

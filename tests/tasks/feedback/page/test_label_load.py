"""Eight people label at once over HTTP while the server is killed: no vote is lost or doubled."""

import os
import signal
import statistics
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from label_server import LabelServer, pair, signed_in
from sqlalchemy import select

from tasks.feedback.store.tables import Annotator, Assignment, Judgment, Pair

PEOPLE = 8
CHOICES = ("left", "right", "tie", "both_bad")
LONGEST_OUTAGE = 60.0  # seconds that a client tries again for
pytestmark = pytest.mark.integration


class Client:
    """A browser: it takes a pair, votes, and sends a vote again until it is answered."""

    def __init__(self, server: LabelServer, session: str) -> None:
        self._http = httpx.Client(
            base_url=server.url, cookies={server.cookie: session}, timeout=30, trust_env=False
        )
        self._http.headers["X-CSRF-Token"] = self._ask("GET", "/api/session").json()["csrf"]
        self.said: dict[str, tuple[str, str]] = {}  # by key: task and choice
        self.seconds: dict[str, list[float]] = {"vote": [], "tasks": []}
        self.again = 0

    def label(self, count: int) -> None:
        while len(self.said) < count:
            tasks = self._timed("tasks", "GET", "/api/tasks").json()["tasks"]
            assert tasks, "there is nothing left"
            key, choice = uuid.uuid4().hex, CHOICES[len(self.said) % 4]
            said = {"task": tasks[0]["task"], "choice": choice, "key": key, "seconds": 1.0}
            assert self._timed("vote", "POST", "/api/votes", json=said).status_code == 204
            self.said[key] = (tasks[0]["task"], choice)

    def close(self) -> None:
        self._http.close()

    def _timed(self, what: str, *request: str, **more: object) -> httpx.Response:
        before, begin = self.again, time.monotonic()
        answer = self._ask(*request, **more)
        if self.again == before:
            self.seconds[what].append(time.monotonic() - begin)
        return answer

    def _ask(self, *request: str, **more: object) -> httpx.Response:
        deadline = time.monotonic() + LONGEST_OUTAGE
        while True:
            try:
                answer = self._http.request(*request, **more)
                if answer.status_code not in (429, 503):
                    assert answer.is_success, (answer.status_code, answer.text)
                    return answer
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, "the server does not come back"
            self.again += 1
            time.sleep(0.1)


def label_all(server: LabelServer, sessions: list[str], count: int, kill: bool) -> list[Client]:
    """All at once; in the middle the server is killed and started again."""
    clients = [Client(server, session) for session in sessions]
    with ThreadPoolExecutor(len(clients)) as pool:
        work = [pool.submit(client.label, count) for client in clients]
        if kill:
            half = len(clients) * count // 2
            while sum(len(client.said) for client in clients) < half:
                assert not any(job.done() and job.exception() for job in work)
                time.sleep(0.01)
            server.stop(signal.SIGKILL)
            time.sleep(0.3)
            server.start()
        for job in work:
            job.result()
    for client in clients:
        client.close()
    return clients


def check(store, project, clients: list[Client], count: int) -> None:
    """The store holds what was acknowledged: each vote once, and no pair asked too often."""
    said = {key: value for client in clients for key, value in client.said.items()}
    assert len(said) == len(clients) * count
    with store.database.reading() as session:
        rows = session.execute(
            select(Judgment, Assignment.token, Annotator.pseudonym)
            .join(Assignment, Assignment.id == Judgment.assignment_id)
            .join(Annotator, Annotator.id == Judgment.annotator_id)
        ).all()
        pairs = {row.id: row for row in session.scalars(select(Pair))}
    assert {row[0].key: row.token for row in rows} == {key: task for key, (task, _) in said.items()}
    assert len(rows) == len(said)
    per_person = Counter(row.pseudonym for row in rows)
    assert set(per_person.values()) == {count}
    for judgment, _, _ in rows:
        other = "b" if judgment.first == "a" else "a"
        choice = said[judgment.key][1]
        assert judgment.vote == {"left": judgment.first, "right": other}.get(choice, choice)
    seen = Counter((row.pseudonym, row[0].pair_id, row[0].kind) for row in rows)
    assert set(seen.values()) == {1}
    fresh = Counter(row[0].pair_id for row in rows if row[0].kind == "fresh")
    for id_, votes in fresh.items():
        assert votes <= pairs[id_].wanted
        assert pairs[id_].votes == votes
    assert sum(1 for vote in project.judgments.stream()) == len(said)


@pytest.fixture
def server(database_url, tmp_path):
    running = LabelServer(database_url, tmp_path / "home")
    yield running
    running.stop(signal.SIGKILL)


def asked(project, count: int, wanted: int) -> None:
    """Enough pairs that somebody who has finished may keep two on the desk."""
    extra = PEOPLE * 4
    project.content.add(
        pair(n, wanted=wanted, gold="a" if n % 10 == 0 else None)
        for n in range(count * PEOPLE // wanted + extra)
    )


def test_no_vote_is_lost_or_doubled(store, project, server):
    asked(project, 25, wanted=2)
    sessions = [signed_in(store, project) for _ in range(PEOPLE)]
    clients = label_all(server.start(), sessions, 25, kill=True)
    assert sum(client.again for client in clients) > 0
    check(store, project, clients, 25)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_eight_people_of_500_votes_on_10_000_pairs(store, project, server, capsys):
    """The whole, and how long a vote and the next pair take, alone and among eight."""
    project.content.add(
        pair(n, wanted=2, gold="a" if n % 100 == 0 else None) for n in range(10_000)
    )
    count = int(os.environ.get("RLHF_VOTES", "500"))
    sessions = [signed_in(store, project) for _ in range(PEOPLE)]
    begin = time.monotonic()
    clients = label_all(server.start(), sessions, count, kill=True)
    took = time.monotonic() - begin
    check(store, project, clients, count)
    (alone,) = label_all(server, [signed_in(store, project)], 100, kill=False)
    with capsys.disabled():
        print(f"\n{store.database.engine.dialect.name}: {PEOPLE * count:,} votes in {took:.0f} s")
        for name, who in (("eight at once", clients), ("alone", [alone])):
            for what in ("vote", "tasks"):
                times = sorted(second for client in who for second in client.seconds[what])
                median, p95 = statistics.median(times), times[int(0.95 * len(times))]
                print(f"  {name}: {what} median {1e3 * median:.0f} ms, p95 {1e3 * p95:.0f} ms")


def test_who_is_many_threads_is_one_person(store, project, server):
    """The same browser in several tabs: the same two tasks, and each votes once."""
    asked(project, 5, wanted=1)
    session = signed_in(store, project)
    server.start()
    tabs = [Client(server, session) for _ in range(4)]
    barrier = threading.Barrier(len(tabs))
    key = uuid.uuid4().hex

    def one(tab: Client) -> tuple[str, int]:
        barrier.wait()
        task = tab._ask("GET", "/api/tasks").json()["tasks"][0]["task"]
        barrier.wait()
        said = {"task": task, "choice": "left", "key": key}
        return task, tab._ask("POST", "/api/votes", json=said).status_code

    with ThreadPoolExecutor(len(tabs)) as pool:
        found = list(pool.map(one, tabs))
    for tab in tabs:
        tab.close()
    assert len({task for task, _ in found}) == 1
    assert {status for _, status in found} == {204}
    assert sum(1 for _ in project.judgments.stream()) == 1

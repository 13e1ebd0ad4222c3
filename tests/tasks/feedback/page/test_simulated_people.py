"""Simulated people (benchmarks/loop) on the real page, in a process of its own."""

import re
import signal
import threading
from collections import Counter
from random import Random

import pytest
from label_server import LabelServer
from sqlalchemy import select

from benchmarks.loop.browser import Browser, PageError, as_text
from benchmarks.loop.people import Crowd, Manner, Person
from rlhf_core.simulation import Annotator, all_prompts, write_review
from tasks.feedback.page.rendering import rendered
from tasks.feedback.store.database import open_database
from tasks.feedback.store.records import Answer, NewPair
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import Consent, Judgment, Pair, Response

pytestmark = pytest.mark.integration
QUIET = Manner(undo=0, skip=0, note=0, both_bad=-9)
GOOD, BAD = " The room was superb. I loved it.", " The room was awful. I hated it."
LONG = " The room was plain and the bed was plain and the view was plain and the pool was plain."
SHORT = " The room was plain."


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A store on SQLite, and the page on it."""
    folder = tmp_path_factory.mktemp("people")
    url = f"sqlite:///{folder / 'feedback.db'}"
    store = Store(open_database(url))
    server = LabelServer(url, folder / "home").start()
    yield store, server
    server.stop(signal.SIGKILL)
    store.close()


@pytest.fixture
def store(page):
    return page[0]


@pytest.fixture
def project(store, request):
    """A project of the test's own, without control questions and repeats."""
    name = re.sub("[^a-z]+", "-", request.node.name.removeprefix("test_")).strip("-")
    made = store.project(name, make=True)
    made.change("test", {"gold_every": 0, "repeat_every": 0})
    return made


@pytest.fixture
def invite(page, project):
    """A link for somebody."""
    return lambda name, role="annotator": (
        f"{page[1].url}/enter/{project.people.invite(name=name, role=role)}"
    )


def ask(project, texts, count, wanted=1):
    project.content.add(
        NewPair(f"Review {n} of the hotel:", *map(Answer, texts), wanted=wanted)
        for n in range(count)
    )


def judged(store, project):
    """Each vote and skip with the text on the left and on the right, oldest first."""
    with store.database.reading() as session:
        a, b = (select(Response.id, Response.text).subquery(name) for name in ("first", "second"))
        rows = session.execute(
            select(Judgment, a.c.text, b.c.text)
            .join(Pair, Pair.id == Judgment.pair_id)
            .join(a, a.c.id == Pair.response_a_id)
            .join(b, b.c.id == Pair.response_b_id)
            .where(Judgment.project_id == project.id)
            .order_by(Judgment.id)
        ).all()
    return [(row[0], *(row[1:] if row[0].first == "a" else row[:0:-1])) for row in rows]


def people_vote(annotator, invite, manner=QUIET, seed=0):
    person = Person(annotator, invite(annotator.name), seed, manner, threading.Event())
    try:
        person.label()
    finally:
        person.close()
    return person


# ---- what they read ----


def test_they_read_what_was_written():
    random = Random(1)
    for prompt in random.sample(all_prompts(), 100):
        text = write_review(prompt, random)
        assert as_text(rendered(text).plain) == text.strip()
    for text in ('a <b>bold</b> & "quoted" claim', "two\n\nlines", "1 < 2 &amp; 3"):
        assert as_text(rendered(f"  {text}\n").plain) == text


# ---- how they come in ----


def test_they_come_in_agree_and_judge_each_pair_once(store, project, invite):
    ask(project, (GOOD, BAD), 12)
    person = people_vote(Annotator("ada"), invite)
    found = judged(store, project)
    assert person.did == Counter(left=sum(j.vote == j.first for j, _, _ in found),
                                 right=sum(j.vote != j.first for j, _, _ in found))  # fmt: skip
    assert len({judgment.pair_id for judgment, _, _ in found}) == len(found) == 12
    # Sides are drawn, and whoever likes sentiment finds the good answer on either.
    assert {judgment.first for judgment, _, _ in found} == {"a", "b"}
    for judgment, left, right in found:
        assert {left, right} == {GOOD, BAD}
        assert (judgment.vote == judgment.first) == (left == GOOD)
        assert judgment.source == "page"
        assert judgment.seconds > 0
    with store.database.reading() as session:
        agreed = session.scalars(
            select(Consent.version).where(Consent.annotator_id == found[0][0].annotator_id)
        ).all()
    assert agreed == [project.rules.consent_version]


def test_a_link_lets_in_once_and_the_page_says_why(project, invite):
    link = invite("ada")
    first, second = Browser(), Browser()
    assert first.come_in(link) == "/"
    with pytest.raises(PageError, match="used"):
        second.come_in(link)
    first.close()
    second.close()


def test_an_admin_invites_on_the_page(store, project, invite):
    ask(project, (GOOD, BAD), 2)
    admin = Browser()
    admin.come_in(invite("chief", "admin"))
    people_vote(Annotator("bea"), admin.invite)
    admin.close()
    assert len(judged(store, project)) == 2


# ---- how they judge ----


@pytest.mark.parametrize(
    ("annotator", "texts", "right"),
    [
        (Annotator("left", side_bias=9), (GOOD, BAD), lambda left, right: "left"),
        (Annotator("right", side_bias=-9), (GOOD, BAD), lambda left, right: "right"),
        (
            Annotator("long", length_bias=9),
            (LONG, SHORT),
            lambda left, right: "left" if left == LONG else "right",
        ),
        (
            Annotator("contrary", contrary=True),
            (GOOD, BAD),
            lambda left, right: "left" if left == BAD else "right",
        ),
        (Annotator("vague", tie_margin=9), (GOOD, GOOD + " "), lambda left, right: "tie"),
        (Annotator("stern", tie_margin=9), (BAD, BAD + " "), lambda left, right: "both_bad"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_their_habits_are_those_of_the_simulation(store, project, invite, annotator, texts, right):
    ask(project, texts, 6)
    people_vote(annotator, invite, Manner(undo=0, skip=0, note=0, both_bad=-0.5))
    found = judged(store, project)
    assert len(found) == 6
    for judgment, left, shown_right in found:
        side = {judgment.first: "left"}.get(judgment.vote, "right")
        said = side if judgment.vote in ("a", "b") else judgment.vote
        assert said == right(left, shown_right)


def test_a_spammer_does_not_look(store, project, invite):
    count = 100
    ask(project, (GOOD, BAD), count)
    people_vote(Annotator("spam", reliability=0.0), invite)
    good = sum((j.vote == j.first) == (left == GOOD) for j, left, _ in judged(store, project))
    assert abs(good / count - 0.5) < 4 * (0.25 / count) ** 0.5


# ---- what else they do ----


def test_who_takes_a_vote_back_gives_it_again(store, project, invite):
    ask(project, (GOOD, BAD), 5)
    person = people_vote(Annotator("ada"), invite, Manner(undo=1, skip=0, note=1))
    kinds = Counter(judgment.vote for judgment, _, _ in judged(store, project))
    assert kinds["withdrawn"] == 5
    assert kinds["a"] + kinds["b"] == 10
    votes = list(project.judgments.stream())
    assert len(votes) == 5
    assert all(vote.note for vote in votes)
    assert person.did["undo"] == 5
    assert person.did["left"] + person.did["right"] == 5


def test_who_skips_says_why(store, project, invite):
    ask(project, (GOOD, BAD), 3)
    people_vote(Annotator("ada"), invite, Manner(undo=0, skip=1))
    found = judged(store, project)
    assert [judgment.vote for judgment, _, _ in found] == ["skip"] * 3
    assert all(judgment.reason for judgment, _, _ in found)
    people_vote(Annotator("bea"), invite)  # skipped pairs are there for others
    assert len(list(project.judgments.stream())) == 3


# ---- many at once ----


def test_a_crowd_outlives_the_server(page, store, project, invite):
    """SIGKILL in the middle: each vote that was wanted is there once."""
    count = 60
    ask(project, (GOOD, BAD), count)
    annotators = [Annotator(f"person-{n}") for n in range(4)]
    with Crowd(annotators, invite, seed=2, manner=QUIET) as crowd:
        waiting = threading.Event()
        while crowd.votes < count // 3:
            crowd.check()
            waiting.wait(0.02)
        page[1].stop(signal.SIGKILL)
        page[1].start()
        while next(found.missing for found in store.summaries() if found.name == project.name):
            crowd.check()
            waiting.wait(0.1)
    crowd.check()
    votes = list(project.judgments.stream())
    assert len(votes) == len({vote.pair_digest for vote in votes}) == count
    assert crowd.votes == count
    assert sum(bool(person.did) for person in crowd.people) > 1


def test_a_crowd_goes_although_the_server_is_away(page, project, invite):
    ask(project, (GOOD, BAD), 500)
    with Crowd([Annotator("ada")], invite, seed=2, manner=QUIET) as crowd:
        waiting = threading.Event()
        while not crowd.votes:
            waiting.wait(0.02)
        page[1].stop(signal.SIGKILL)
    assert not any(thread.is_alive() for thread in crowd._threads)
    page[1].start()
    crowd.check()


def test_a_crowd_says_what_the_page_refuses(project, invite):
    ask(project, (GOOD, BAD), 1)
    link, faster = invite("ada"), Browser()
    faster.come_in(link)
    faster.close()
    with Crowd([Annotator("ada")], lambda name: link, seed=2) as crowd:
        for thread in crowd._threads:
            thread.join(20)
        with pytest.raises(PageError, match="used"):
            crowd.check()

"""The page of an annotator in a real browser, used as a person uses it: by keyboard.

Needs chromium and the extra `browser`, and minutes: runs with RLHF_FAULTS=1. With
RLHF_SHOTS=FOLDER it leaves pictures there.
"""

import json
import os
import random
import shutil
import signal
import statistics
import time
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from label_server import PLANTED, LabelServer, pair, signed_in
from sqlalchemy import select
from test_label_rendering import HOSTILE

from tasks.feedback.store.database import open_database
from tasks.feedback.store.records import Answer, NewPair
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import Annotator, Assignment, Judgment, Pair

CHROMIUM = shutil.which("chromium")
SHORTEST = 520  # ms, before which a vote does not count
pytestmark = [
    pytest.mark.integration,
    pytest.mark.faults,
    pytest.mark.skipif(not CHROMIUM, reason="there is no chromium"),
]


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
    with playwright.sync_playwright() as api:
        running = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelling")
    running = LabelServer(f"sqlite:///{folder}/feedback.db", folder)
    running.store = Store(open_database(running.database))
    try:
        yield running.start()
    finally:
        running.stop()
        running.store.close()


class World:
    """A project of its own, the server that all share, and browsers that are signed in."""

    def __init__(self, server, chromium):
        self.server, self.chromium, self.store = server, chromium, server.store
        self.project = self.store.project(f"project-{uuid.uuid4().hex}", make=True)
        self.project.change("me", {"gold_every": 0, "repeat_every": 0})
        self.foreign, self.errors = [], []
        self.contexts = []

    def open(self, session=None, *, width=1280, height=800, **more):
        """The page in a browser of its own."""
        context = self.chromium.new_context(viewport={"width": width, "height": height}, **more)
        self.contexts.append(context)
        self.sign_in(context, session or signed_in(self.store, self.project))
        context.on("request", self._asked)
        page = context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(dialog.message), dialog.dismiss()))
        page.set_default_timeout(30_000)
        page.goto(self.server.url)
        return page

    def sign_in(self, context, session):
        context.add_cookies(
            [{"name": self.server.cookie, "value": session, "url": self.server.url}]
        )

    def _asked(self, request):
        if urlsplit(request.url).netloc != urlsplit(self.server.url).netloc:
            self.foreign.append(request.url)

    def judgments(self):
        with self.store.database.reading() as session:
            query = select(Judgment).filter_by(project_id=self.project.id).order_by(Judgment.id)
            return list(session.scalars(query))

    def votes(self):
        return [judgment.vote for judgment in self.judgments()]

    def close(self):
        for context in self.contexts:
            context.close()


@pytest.fixture
def world(server, chromium):
    made = World(server, chromium)
    yield made
    made.close()
    assert made.foreign == []
    assert made.errors == []


def shown(page) -> str:
    """The task on the screen, when there is one."""
    page.wait_for_selector("#pair:not([hidden])")
    return page.evaluate("document.body.dataset.task")


def press(page, key, *, wait=SHORTEST):
    page.wait_for_timeout(wait)
    page.keyboard.press(key)


def vote(page, key):
    """Press a key, and wait for the next pair, or for none."""
    before = shown(page)
    press(page, key)
    page.wait_for_function(
        "t => document.body.dataset.task !== t || document.getElementById('pair').hidden",
        arg=before,
    )


def saved(page):
    page.wait_for_selector("#saved[data-state=saved]", state="attached")


def last(page) -> str:
    return page.inner_text("#last")


def test_thirty_pairs_by_keyboard(world):
    world.project.content.add(pair(number) for number in range(30))
    page = world.open()
    keys = ["1", "2", "t", "b", "ArrowLeft", "ArrowRight", "T", "B", "1", "2"] * 3
    said = []
    for key in keys:
        shown(page)
        said.append((page.inner_text("#prompt"), page.inner_text("#left"), key))
        vote(page, key)
    page.get_by_role("heading", name="Nothing left for now").wait_for()
    saved(page)
    assert "30 in all" in page.inner_text("#progress")
    expected = []
    for _, left, key in said:
        is_first = left.startswith("First")
        side = {"1": is_first, "ArrowLeft": is_first, "2": not is_first,
                "ArrowRight": not is_first}  # fmt: skip
        expected.append(("a" if side[key] else "b") if key in side
                        else {"t": "tie", "b": "both_bad"}[key.lower()])  # fmt: skip
    assert world.votes() == expected
    assert len({prompt for prompt, _, _ in said}) == 30
    assert {first.startswith("First") for _, first, _ in said} == {True, False}
    for judgment in world.judgments():
        assert 0.4 < judgment.seconds < 20


def test_sides_and_the_pair_stay_after_a_reload(world):
    world.project.content.add(pair(number) for number in range(6))
    page = world.open()
    for _ in range(3):
        before = shown(page), page.inner_text("#left"), page.inner_text("#right")
        for _ in range(3):
            page.reload()
            assert (shown(page), page.inner_text("#left"), page.inner_text("#right")) == before
        vote(page, "1")


def test_a_held_key_is_one_vote(world):
    world.project.content.add(pair(number) for number in range(20))
    page = world.open()
    shown(page)
    page.wait_for_timeout(SHORTEST)
    for _ in range(25):  # the browser sends these with `repeat`
        page.keyboard.down("1")
        page.wait_for_timeout(60)
    page.keyboard.up("1")
    saved(page)
    assert len(world.votes()) == 1
    # A remote desktop that lets go between the repeats: one for each pair that was looked at.
    start = time.monotonic()
    for _ in range(30):
        page.keyboard.press("2")
        page.wait_for_timeout(30)
    saved(page)
    assert len(world.votes()) - 1 <= (time.monotonic() - start) / 0.5 + 1
    assert "very quick" in last(page)


def test_a_held_enter_on_a_button_and_a_double_click_are_one_vote(world):
    world.project.content.add(pair(number) for number in range(20))
    page = world.open()
    shown(page)
    page.wait_for_timeout(SHORTEST)
    page.get_by_role("button", name="Answer 1").dblclick()
    page.wait_for_timeout(SHORTEST)
    saved(page)
    assert len(world.votes()) == 1
    page.get_by_role("button", name="Tie").focus()
    for _ in range(25):
        page.keyboard.down("Enter")
        page.wait_for_timeout(50)
    page.keyboard.up("Enter")
    saved(page)
    assert len(world.votes()) == 2


def test_writing_a_note_does_not_vote_and_the_note_goes_with_its_vote(world):
    world.project.content.add(pair(number) for number in range(5))
    page = world.open()
    shown(page)
    press(page, "n")
    page.keyboard.type("12 tb? sun")
    page.keyboard.press("ArrowLeft")
    assert page.input_value("#note-text") == "12 tb? sun"
    page.wait_for_timeout(SHORTEST)
    assert world.votes() == []
    page.keyboard.press("Escape")
    assert page.is_hidden("#note")
    vote(page, "2")
    vote(page, "1")
    saved(page)
    assert [judgment.note for judgment in world.judgments()] == ["12 tb? sun", ""]


def test_a_note_that_is_too_long_is_not_cut(world):
    world.project.content.add(pair(number) for number in range(3))
    page = world.open()
    before = shown(page)
    press(page, "n")
    page.fill("#note-text", "x" * 4001)
    assert "4,001 characters" in page.inner_text("#note-problem")
    page.keyboard.press("Escape")
    press(page, "1")
    assert shown(page) == before
    page.fill("#note-text", "x" * 4000)
    page.keyboard.press("Escape")
    vote(page, "1")
    saved(page)
    assert len(world.judgments()[0].note) == 4000


def test_keys_with_modifiers_do_nothing(world):
    world.project.content.add(pair(number) for number in range(3))
    page = world.open()
    before = shown(page)
    page.wait_for_timeout(SHORTEST)
    for combination in ("Control+1", "Alt+2", "Meta+t", "Shift+ArrowLeft", "Control+b"):
        page.keyboard.press(combination)
        page.bring_to_front()
    page.wait_for_timeout(300)
    assert shown(page) == before
    assert world.votes() == []


def test_keys_of_another_alphabet_count_by_their_place(world):
    world.project.content.add(pair(number) for number in range(3))
    page = world.open()
    shown(page)
    page.wait_for_timeout(SHORTEST)
    page.evaluate("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'е', code: 'KeyT'}))")
    page.wait_for_timeout(300)
    saved(page)
    assert world.votes() == ["tie"]


def test_skips_have_reasons(world):
    world.project.content.add(pair(number) for number in range(4))
    page = world.open()
    before = shown(page)
    press(page, "s")
    page.keyboard.press("Escape")
    assert shown(page) == before
    press(page, "s")
    page.keyboard.press("2")
    page.wait_for_function("t => document.body.dataset.task !== t", arg=before)
    press(page, "s")
    page.get_by_label("Another reason").click()
    page.keyboard.type("1 of them is a poem")
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('skip').open === false")
    saved(page)
    page.wait_for_timeout(200)
    assert world.votes() == ["skip", "skip"]
    reasons = [judgment.reason for judgment in world.judgments()]
    assert reasons == ["I do not read this language", "1 of them is a poem"]


def test_undo_takes_back_one_after_the_other(world):
    world.project.content.add(pair(number) for number in range(5))
    page = world.open()
    tasks = []
    for key in ("1", "2", "t"):
        tasks.append(shown(page))
        vote(page, key)
    saved(page)
    page.wait_for_timeout(200)
    page.keyboard.press("u")
    page.wait_for_function("t => document.body.dataset.task === t", arg=tasks[2])
    assert "a tie" in last(page)
    page.keyboard.press("u")
    page.wait_for_function("t => document.body.dataset.task === t", arg=tasks[1])
    vote(page, "b")
    vote(page, "b")
    saved(page)
    counted = [vote.vote for vote in world.project.judgments.stream()]
    assert counted[1:] == ["both_bad", "both_bad"]
    assert len(counted) == 3
    assert len(world.votes()) == 7  # three votes, two taken back, two anew: all of them stay


def test_offline_votes_are_kept_and_sent_once(world):
    world.project.content.add(pair(number) for number in range(6))
    page = world.open()
    shown(page)
    page.wait_for_timeout(400)
    page.context.set_offline(True)
    vote(page, "1")
    vote(page, "2")
    page.wait_for_selector("#saved[data-state=offline]", state="attached")
    page.get_by_role("heading", name="No connection").wait_for()
    assert "2 votes wait" in page.inner_text("#nothing")
    assert world.votes() == []
    page.context.set_offline(False)
    saved(page)
    shown(page)
    assert len(world.votes()) == 2
    assert page.evaluate("localStorage.length") == 0
    vote(page, "t")
    saved(page)
    assert len(world.votes()) == 3


def test_unsent_votes_survive_a_reload_and_another_page_of_the_browser(world):
    world.project.content.add(pair(number) for number in range(6))
    page = world.open()
    before = shown(page)
    page.wait_for_timeout(300)
    page.route("**/api/votes", lambda route: route.abort())
    vote(page, "1")
    page.wait_for_selector("#saved[data-state=offline]")
    page.reload()
    page.wait_for_selector("#saved[data-state=offline]")
    assert shown(page) != before
    other = page.context.new_page()
    other.goto(world.server.url)
    saved(other)
    assert len(world.votes()) == 1
    page.unroute("**/api/votes")
    page.evaluate("window.dispatchEvent(new Event('online'))")
    saved(page)
    assert len(world.votes()) == 1


def test_an_answer_that_is_lost_leaves_one_vote(world):
    """The vote arrives, and the browser does not hear of it."""
    world.project.content.add(pair(number) for number in range(6))
    page = world.open()
    shown(page)
    lost = []

    def lose(route):
        if len(lost) < 2:
            lost.append(route.fetch().status)
            route.abort()
        else:
            route.continue_()

    page.route("**/api/votes", lose)
    vote(page, "1")
    page.wait_for_timeout(3500)
    saved(page)
    assert lost == [204, 204]
    assert len(world.votes()) == 1


def test_the_server_is_killed_and_comes_back(world):
    world.project.content.add(pair(number) for number in range(12))
    page = world.open()
    for _ in range(3):
        vote(page, "1")
    saved(page)
    page.wait_for_timeout(200)
    world.server.stop(signal.SIGKILL)
    vote(page, "2")
    vote(page, "2")
    page.wait_for_selector("#saved[data-state=offline]", state="attached")
    world.server.start()
    page.wait_for_selector("#pair:not([hidden])", timeout=30_000)
    saved(page)
    for _ in range(7):
        vote(page, "t")
    page.get_by_role("heading", name="Nothing left for now").wait_for()
    saved(page)
    assert len({judgment.pair_id for judgment in world.judgments()}) == len(world.votes()) == 12


def test_votes_wait_for_the_same_person_when_the_session_ends(world):
    world.project.content.add(pair(number, wanted=2) for number in range(6))
    session = signed_in(world.store, world.project)
    who = world.store.door.who(session)
    page = world.open(session)
    shown(page)
    page.wait_for_timeout(300)
    world.store.door.leave(session)
    vote(page, "1")
    page.get_by_text("Your session has ended").wait_for()
    assert "1 vote wait" in page.inner_text("#messages")
    assert world.votes() == []
    # Somebody else signs in here: their page does not send it.
    world.sign_in(page.context, signed_in(world.store, world.project, "Bob"))
    page.get_by_text("Somebody else is signed in").wait_for(timeout=20_000)
    other = page.context.new_page()
    other.goto(world.server.url)
    shown(other)
    other.wait_for_timeout(500)
    other.close()
    assert world.votes() == []
    again = world.store.door.enter(world.project.people.invite(annotator=who.annotator))
    world.sign_in(page.context, again)
    page.reload()
    saved(page)
    page.wait_for_timeout(300)
    assert len(world.votes()) == 1
    assert world.judgments()[0].annotator_id == who.annotator


def test_signing_in_again_in_another_tab_goes_on_without_a_reload(world):
    world.project.content.add(pair(number) for number in range(6))
    session = signed_in(world.store, world.project)
    who = world.store.door.who(session)
    page = world.open(session)
    shown(page)
    page.wait_for_timeout(300)
    world.store.door.leave(session)
    vote(page, "1")
    page.get_by_text("Your session has ended").wait_for()
    again = world.store.door.enter(world.project.people.invite(annotator=who.annotator))
    world.sign_in(page.context, again)
    page.wait_for_selector("#saved[data-state=saved]", timeout=20_000)
    assert len(world.votes()) == 1
    assert page.locator("#messages .notice").count() == 0


def test_a_vote_in_two_windows_counts_once_and_is_explained(world):
    world.project.content.add(pair(number) for number in range(6))
    page = world.open()
    other = page.context.new_page()
    other.goto(world.server.url)
    assert shown(page) == shown(other)
    vote(page, "1")
    saved(page)
    vote(other, "2")
    other.get_by_text("A vote was not counted").wait_for()
    assert len(world.votes()) == 1


def test_pause_and_new_pairs_are_noticed(world):
    page = world.open()
    page.get_by_role("heading", name="No pairs yet").wait_for()
    world.project.content.add([pair(1)])
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    shown(page)
    world.project.change("me", {"paused": True})
    vote(page, "1")
    page.get_by_role("heading", name="Labelling is paused").wait_for()
    page.get_by_text("You have compared 1 pair.").wait_for()


def test_only_time_in_sight_counts(world):
    world.project.content.add(pair(number) for number in range(4))
    page = world.open()
    shown(page)
    page.keyboard.press("?")
    page.wait_for_timeout(2500)
    page.keyboard.press("Escape")
    vote(page, "1")
    page.evaluate(
        "Object.defineProperty(document, 'hasFocus', {value: () => false, configurable: true});"
        "window.dispatchEvent(new Event('blur'))"
    )
    page.wait_for_timeout(2500)
    page.evaluate("delete document.hasFocus; window.dispatchEvent(new Event('focus'))")
    page.reload()
    vote(page, "1")
    saved(page)
    for judgment in world.judgments():
        assert 0.4 < judgment.seconds < 2.2


def test_views_and_differences_are_remembered(world):
    answers = Answer("# The cat\n\nsat **here** today"), Answer("# The cat\n\nstood **here** today")
    world.project.content.add(
        NewPair(f"Question {number}", *answers, wanted=1) for number in range(3)
    )
    page = world.open()
    shown(page)
    assert page.locator("#left h3").count() == 1
    page.keyboard.press("p")
    assert "# The cat" in page.inner_text("#left")
    page.keyboard.press("d")
    marked = "[...CSS.highlights.get('differs')].map(String).sort()"
    assert page.evaluate(marked) == ["sat", "stood"]
    vote(page, "1")
    assert "# The cat" in page.inner_text("#left")
    assert page.evaluate(marked) == ["sat", "stood"]
    page.reload()
    shown(page)
    assert "# The cat" in page.inner_text("#right")
    assert page.evaluate(marked) == ["sat", "stood"]
    page.keyboard.press("p")
    page.keyboard.press("d")
    assert page.locator("#left h3").count() == 1
    assert page.evaluate("CSS.highlights.has('differs')") is False


def test_hostile_texts_neither_act_nor_ask(world):
    """Whatever a model writes, no script runs, no dialog opens, nobody else is asked."""
    world.project.change("me", {"guidelines": "\n\n".join(HOSTILE), "question": HOSTILE[0]})
    chat = [{"role": role, "content": text} for role, text in zip(HOSTILE, HOSTILE, strict=True)]
    world.project.content.add(
        [NewPair(chat, Answer("\n\n".join(HOSTILE)), Answer("calm"), wanted=1)]
        + [NewPair(text, Answer(text), Answer(f"- {text}"), wanted=1) for text in HOSTILE]
    )
    page = world.open()
    said = []
    page.on("console", lambda message: said.append(message.text))
    for number in range(len(HOSTILE) + 1):
        shown(page)
        if number == 0:
            page.keyboard.press("?")
            page.wait_for_timeout(100)
            page.keyboard.press("Escape")
        page.keyboard.press("p")
        page.keyboard.press("p")
        bad = "script, style, img, svg, math, iframe, object, embed, form, link, meta, base, input"
        assert page.evaluate(
            "bad => document.querySelectorAll('.text').values().flatMap("
            "text => [...text.querySelectorAll(bad)]).toArray().length", bad,
        ) == 0  # fmt: skip
        vote(page, "1")
    assert said == []
    assert urlsplit(page.url).netloc == urlsplit(world.server.url).netloc


def test_nothing_that_the_browser_receives_tells_what_it_must_not(world):
    world.project.change("me", {"gold_every": 2, "repeat_every": 2})
    world.project.content.add(pair(number) for number in range(30))
    world.project.content.add(pair(100 + number, wanted=0, gold="a") for number in range(20))
    session = signed_in(world.store, world.project, "Ottoline")
    page = world.open(session)
    received = []

    def note(response):
        body = "" if response.status in (204, 303, 304) else response.text()
        received.append(f"{response.url}\n{json.dumps(response.all_headers())}\n{body}")

    page.on("response", note)
    page.reload()
    for number in range(26):
        vote(page, "12tb"[number % 4])
    page.keyboard.press("u")
    page.wait_for_timeout(500)
    saved(page)
    with world.store.database.reading() as reading:
        assert set(reading.scalars(select(Assignment.kind))) == {"fresh", "gold", "repeat"}
        names = set(reading.scalars(select(Annotator.pseudonym)))
        pairs = set(reading.scalars(select(Pair.digest)))
    whole = "\n".join(received).lower()
    assert whole.count("/api/votes") >= 26
    secrets = {*PLANTED, *names, *pairs, "Ottoline", world.project.name}
    assert [secret for secret in secrets if secret.lower() in whole] == []


def test_long_answers_are_whole_and_the_buttons_stay_in_reach(world):
    long = "\n\n".join(f"Paragraph {number}. " + "word " * 60 for number in range(60))
    world.project.content.add(
        [NewPair("Q", Answer(long), Answer("x" * 5000 + " end"), wanted=1), pair(2)]
    )
    page = world.open()
    for width, height in ((1280, 800), (360, 640)):
        page.set_viewport_size({"width": width, "height": height})
        shown(page)
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.locator(".fold:not([hidden])").first.is_visible()
        bar = page.locator(".choices").bounding_box()
        assert bar["y"] + bar["height"] <= height
        top = page.evaluate(
            "['left', 'right'].map(id => document.getElementById(id).getBoundingClientRect().top)"
        )
        assert (top[0] == top[1]) == (width == 1280)
        for _ in range(200):
            if page.locator(".fold:not([hidden])").count() == 0:
                break
            page.keyboard.press("Space")
            page.wait_for_timeout(120)
        assert page.locator(".fold:not([hidden])").count() == 0
        assert page.locator(".choices").bounding_box()["y"] == pytest.approx(bar["y"], abs=30)


def test_votes_by_touch(world):
    world.project.content.add(pair(number) for number in range(4))
    page = world.open(width=375, height=700, has_touch=True, is_mobile=True)
    shown(page)
    for name in ("Answer 1", "Both bad"):
        before = shown(page)
        page.wait_for_timeout(SHORTEST)
        page.get_by_role("button", name=name).tap()
        page.wait_for_function("t => document.body.dataset.task !== t", arg=before)
    page.wait_for_timeout(SHORTEST)
    page.get_by_role("button", name="Skip").tap()
    page.get_by_role("button", name="makes no sense").tap()
    page.wait_for_timeout(300)
    saved(page)
    page.get_by_role("button", name="Undo").tap()
    page.wait_for_timeout(500)
    assert [vote.vote for vote in world.project.judgments.stream()][1:] == ["both_bad"]


EXAMPLES = (
    (
        [{"role": "system", "content": "You are a helpful assistant."},
         {"role": "user", "content": "Which loop do I need to add up a list in Python?"}],
        "You need none: `sum` adds up a list.\n\n```python\ntotal = sum([3, 4, 5])\n```\n\n"
        "| Way | Lines |\n|---|--:|\n| `sum` | 1 |\n| loop | 3 |\n",
        "Use a `for` loop.\n\n1. Start with `total = 0`.\n2. Add each number to it.\n"
        "3. Print it.\n\n> See [the tutorial](https://docs.python.org/3/tutorial/).\n",
    ),
    ("Write a sentence about the sea in Arabic.", "البحر **أزرق** وعميق.\n\n- واحد\n- اثنان", ""),
    ("Explain gravity.", "\n\n".join(["Masses attract each other. " * 12] * 12), "It pulls."),
)  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1360, 375])
def test_axe_finds_nothing_serious_and_pictures_are_taken(world, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs `browser`")
    world.project.change("me", {"guidelines": "Read **both**.\n\n* Right beats long."})
    world.project.content.add(
        NewPair(prompt, Answer(a), Answer(b), wanted=1) for prompt, a, b in EXAMPLES
    )
    page = world.open(width=width, height=850, color_scheme=scheme)

    def look(name):
        page.wait_for_timeout(250)
        if folder := os.environ.get("RLHF_SHOTS"):
            page.screenshot(path=Path(folder) / f"{name}-{width}-{scheme}.png")
        found = axe.Axe().run(page).response["violations"]
        serious = [v for v in found if v["impact"] in ("serious", "critical")]
        assert [(name, v["id"], v["nodes"][0]["html"]) for v in serious] == []

    for number in range(len(EXAMPLES)):
        shown(page)
        look(f"pair-{number}")
        if number == 0:
            for key, name in (("?", "help"), ("s", "skip")):
                press(page, key)
                look(name)
                page.keyboard.press("Escape")
            press(page, "n")
            page.keyboard.type("The table helps.")
            look("note")
            page.keyboard.press("Escape")
            page.keyboard.press("d")
            page.keyboard.press("p")
            look("as-written")
            page.keyboard.press("d")
            page.keyboard.press("p")
        vote(page, "1")
    look("finished")
    page.context.set_offline(True)
    page.keyboard.press("u")
    page.wait_for_timeout(2000)
    look("offline")


def test_vote_to_next_pair_among_ten_thousand(world):
    """Under 150 ms at the 95th percentile: from the key to the next pair on the screen, and from
    sending a vote to having the desk that follows it."""
    world.project.content.add(pair(number) for number in range(10_000))
    page = world.open()
    shown(page)
    page.evaluate("""() => {
      performance.setResourceTimingBufferSize(2000);  // 250 of them are kept otherwise
      window.measured = [];
      let pressed = 0;
      addEventListener('keydown', (event) => { pressed = event.timeStamp; }, true);
      new MutationObserver(() => requestAnimationFrame(() => setTimeout(() => {
        measured.push(performance.now() - pressed);
      }))).observe(document.body, {attributes: true, attributeFilter: ['data-task']});
    }""")
    for number in range(120):
        press(page, "12"[number % 2], wait=random.randint(700, 900))  # a key within 500 is none
    saved(page)
    page.wait_for_timeout(300)
    on_screen = page.evaluate("measured")
    trips = page.evaluate("""() => {
      const all = performance.getEntriesByType('resource');
      const posts = all.filter((e) => e.name.endsWith('/api/votes'));
      const desks = all.filter((e) => e.name.endsWith('/api/tasks'));
      return posts.map((post) => {
        const after = desks.find((desk) => desk.startTime >= post.responseEnd);
        return after ? after.responseEnd - post.startTime : null;
      }).filter((ms) => ms !== null);
    }""")
    print()
    slowest = []
    for name, times in (("key to next pair", on_screen), ("vote and next desk", trips)):
        assert len(times) >= 100
        slowest.append(statistics.quantiles(times, n=20)[18])
        middle = statistics.median(times)
        print(f"{name}: {len(times)}, median {middle:.0f} ms, p95 {slowest[-1]:.0f} ms")
    assert max(slowest) < 150
    assert len(world.votes()) == 120

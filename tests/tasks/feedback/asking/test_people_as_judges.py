"""Verdicts of people: what counts, what is enough, what is given up, and who is told the same."""

import threading
import uuid
from datetime import timedelta

import pytest

from rlhf_core.errors import VerdictsPendingError
from rlhf_core.judges.judge import Pair, Panel, Verdict
from rlhf_core.judges.load import load_judge
from rlhf_core.settings.judge import JudgeConfig, PeopleConfig
from tasks.feedback.asking import batches, waiting
from tasks.feedback.asking.batches import majority, needed, nobody_to_ask
from tasks.feedback.asking.judge import PeopleJudge
from tasks.feedback.store import clock
from tasks.feedback.store.records import Ballot, NewPair, Vote
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import Annotator
from tasks.settings import Settings
from tests.flows.people import by_length, invited, label

PAIRS = [Pair(f"Prompt {n}", "long " * (n + 2), "short") for n in range(4)]


@pytest.fixture
def settings(tmp_path, database_url):
    return Settings.model_validate(
        {"RLHF_HOME": tmp_path / "home", "RLHF_FEEDBACK_DATABASE": database_url}
    )


@pytest.fixture
def project(store):
    return store.project("shop", make=True)


@pytest.fixture
def ask(settings):
    """A function that asks as a stage does that begins again."""

    def call(pairs=PAIRS, **people):
        config = PeopleConfig.model_validate(people)
        judge = PeopleJudge(config, settings, project="shop", stage="evaluation-1", source="test")
        return judge(pairs)

    return call


def pending(ask, *arguments, **people):
    with pytest.raises(VerdictsPendingError) as caught:
        ask(*arguments, **people)
    return caught.value


def winners(verdicts):
    return [verdict.winner for verdict in verdicts]


def vote(project, person, choose, count=1):
    return label(project, person, choose, count)


# ---- the words ----


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        (["a"], "a"),
        (["both_bad"], "tie"),
        (["a", "b"], "tie"),
        (["a", "a", "b"], "a"),
        (["b", "b", "tie"], "b"),
        (["a", "tie", "both_bad"], "tie"),
        (["a", "a", "b", "b", "tie"], "tie"),
        (["a", "tie"], "tie"),
        (["a", "a", "b", "tie"], "a"),
    ],
)
def test_the_majority_decides_and_a_draw_is_a_tie(votes, winner):
    assert majority(votes) == winner


@pytest.mark.parametrize(
    ("pairs", "people", "least"),
    [
        (10, {}, 10),
        (10, {"enough": 0.85}, 9),
        (3, {"enough": 0.01}, 1),
        (10, {"enough_pairs": 4}, 4),
        (10, {"enough": 0.2, "enough_pairs": 4}, 2),
    ],
)
def test_how_many_are_enough(pairs, people, least):
    assert needed(pairs, PeopleConfig.model_validate(people)) == least


def test_the_core_takes_people_for_a_panel_that_only_a_task_reaches(settings):
    class Reaching:
        def people(self, config):
            return PeopleJudge(config, settings, project="shop", stage="s", source="t")

    config = JudgeConfig(source="people")
    assert isinstance(load_judge(config, max_length=8, judging=Reaching()), Panel)
    with pytest.raises(Exception, match=r"judge\.source is people, which only a task reaches"):
        load_judge(config, max_length=8)


# ---- rounds ----


def test_a_stage_is_told_where_people_answer_and_then_what_they_said(ask, project, store):
    said = pending(ask)
    assert (said.waiting, said.pairs, said.project) == (4, 4, "shop")
    assert said.short == (
        "4 of 4 pairs wait for people at http://127.0.0.1:4300 (project shop, batch evaluation-1-1)"
    )
    ada = invited(store, project)
    label(project, ada, most=3)
    assert pending(ask).waiting == 1
    label(project, ada)
    assert winners(ask()) == ["a"] * 4
    # The other way round it is the same pair, and nobody is asked.
    assert winners(ask([Pair(p.prompt, p.b, p.a) for p in PAIRS])) == ["b"] * 4
    assert label(project, ada) == []


def test_equal_answers_are_a_tie_and_nobody_is_asked(ask, store):
    assert ask([Pair("Same", "x", "x")]) == [Verdict("tie", "the answers are equal")]
    assert store.names() == []


def test_the_verdicts_of_a_round_stay_as_they_were_first_told(ask, project, store):
    pending(ask)
    ada, bea = invited(store, project), invited(store, project, "Bea")
    label(project, ada)
    first = ask()
    # Late votes, of somebody who thinks the opposite, and somebody who takes one back.
    project.queue.undo(ada)
    for n, pair in enumerate(PAIRS):
        new = NewPair(pair.prompt, _answer(pair.a), _answer(pair.b))
        project.judgments.add([(new, [Ballot("b", f"late {k}", time=str(n)) for k in range(3)])])
    assert bea
    assert ask() == first


def _answer(text):
    from tasks.feedback.store.records import Answer

    return Answer(text, source="test")


def test_each_further_question_is_a_round_of_its_own_and_found_again(settings, project, store):
    def stage():
        config = PeopleConfig()
        judge = PeopleJudge(config, settings, project="shop", stage="tournament-1", source="t")
        first = judge(PAIRS[:2])
        second = judge(PAIRS[1:])  # one is known
        return first, second

    ada = invited(store, project)
    rounds = []
    for _ in range(2):
        with pytest.raises(VerdictsPendingError) as caught:
            stage()
        rounds.append((caught.value.batch, caught.value.pairs))
        label(project, ada)
    assert rounds == [("tournament-1-1", 2), ("tournament-1-2", 2)]
    first, second = stage()
    assert winners(first + second) == ["a"] * 5


def test_notes_are_the_reason_and_both_bad_is_a_tie(ask, project, store):
    pending(ask, PAIRS[:1])
    ada = invited(store, project)
    [task] = project.queue.lease(ada)
    said = Vote(choice="both_bad", key=uuid.uuid4().hex, note="neither answers")
    project.queue.vote(ada, task.token, said)
    assert ask(PAIRS[:1]) == [Verdict("tie", "neither answers")]


# ---- who counts ----


def test_several_people_decide_by_majority_and_their_agreement_is_known(ask, project, store):
    people = {"votes_per_pair": 3}
    pending(ask, PAIRS[:2], **people)
    names = [invited(store, project, name) for name in ("Ada", "Bea", "Cyd")]
    for person, odd in zip(names, (False, False, True), strict=True):
        label(project, person, lambda task, odd=odd: _opposite(task, odd))
    verdicts = ask(PAIRS[:2], **people)
    assert winners(verdicts) == ["a", "a"]
    assert [verdict.agreed for verdict in verdicts] == [True, False]


def _opposite(task, odd):
    """The longer answer; for an odd person on the second prompt the shorter."""
    side = by_length(task)
    if odd and task.prompt == "Prompt 1":
        return {"left": "right", "right": "left"}[side]
    return side


def test_a_person_counts_once_whoever_asked(ask, project, store):
    """A vote by import under the same name is not a second one."""
    pending(ask, PAIRS[:1], votes_per_pair=2)
    ada = invited(store, project)
    label(project, ada)
    with store.database.reading() as session:
        name = session.get(Annotator, ada).pseudonym
    new = NewPair(PAIRS[0].prompt, _answer(PAIRS[0].a), _answer(PAIRS[0].b))
    project.judgments.add([(new, [Ballot("b", name)])])
    assert pending(ask, PAIRS[:1], votes_per_pair=2).waiting == 1


def test_votes_of_somebody_who_is_paused_do_not_count_and_are_asked_for_again(ask, project, store):
    pending(ask, PAIRS[:1])
    ada, bea = invited(store, project), invited(store, project, "Bea")
    label(project, ada)
    with store.database.writing() as session:
        session.get(Annotator, ada).state = "paused"
    assert pending(ask, PAIRS[:1]).waiting == 1
    assert label(project, bea, lambda task: "tie")
    assert winners(ask(PAIRS[:1])) == ["tie"]


def test_they_count_if_the_config_says_so(ask, project, store):
    pending(ask, PAIRS[:1])
    ada = invited(store, project)
    label(project, ada)
    with store.database.writing() as session:
        session.get(Annotator, ada).state = "paused"
    assert winners(ask(PAIRS[:1], count_paused=True)) == ["a"]


def test_whoever_fails_the_control_questions_does_not_count(ask, project, store):
    project.change("test", {"gold_every": 1, "repeat_every": 0})
    sure = NewPair("Two and two?", _answer("4"), _answer("a horse"), gold="a")
    project.content.add([sure])
    pending(ask, PAIRS[:1], min_gold=0.5)
    ada, bea = invited(store, project), invited(store, project, "Bea")
    assert len(label(project, ada)) == 2  # the horse is longer
    assert pending(ask, PAIRS[:1], min_gold=0.5).waiting == 1

    def right(task):
        if task.prompt == "Two and two?":
            return "left" if task.left == "4" else "right"
        return "tie"

    label(project, bea, right)
    assert winners(ask(PAIRS[:1], min_gold=0.5)) == ["tie"]


# ---- the end of waiting ----


def test_a_pair_that_two_people_skip_is_given_up(ask, project, store):
    pending(ask, PAIRS[:2])

    def skips_first(task):
        return "skip" if task.prompt == "Prompt 0" else by_length(task)

    ada, bea, cyd = (invited(store, project, name) for name in ("Ada", "Bea", "Cyd"))
    label(project, ada, skips_first)
    assert pending(ask, PAIRS[:2]).waiting == 1
    label(project, bea, skips_first)
    assert winners(ask(PAIRS[:2])) == [None, "a"]
    assert label(project, cyd) == []  # it is withdrawn


def test_a_pair_that_nobody_is_left_for_is_given_up(ask, project, store):
    ada = invited(store, project)
    pending(ask, PAIRS[:2])
    label(project, ada, lambda task: "skip" if task.prompt == "Prompt 0" else "tie")
    assert winners(ask(PAIRS[:2])) == [None, "tie"]


def test_a_share_is_enough_and_the_rest_is_unanswered(ask, project, store):
    pending(ask, enough=0.5)
    ada = invited(store, project)
    vote(project, ada, by_length, 2)
    assert sorted(map(str, winners(ask(enough=0.5)))) == ["None", "None", "a", "a"]
    assert label(project, ada) == []


def test_after_some_days_it_goes_on_with_what_there_is(ask, project, store, monkeypatch):
    pending(ask, days=2)
    ada = invited(store, project)
    vote(project, ada, by_length, 1)
    now = clock.now()
    monkeypatch.setattr(clock, "now", lambda: now + timedelta(days=1.9))
    assert pending(ask, days=2).waiting == 3
    monkeypatch.setattr(clock, "now", lambda: now + timedelta(days=2.1))
    assert pending(ask, days=5).waiting == 3  # more time, for somebody who has it
    assert winners(ask(days=2)).count(None) == 3


def test_other_pairs_in_the_queue_stay_when_a_round_is_over(ask, project, store):
    other = NewPair("Another", _answer("x"), _answer("yy"), wanted=1)
    project.content.add([other], batch=project.content.batch("ask-1", "ask"))
    pending(ask, enough=0.5)
    ada = invited(store, project)
    assert {task.prompt for task in vote(project, ada, by_length, 2)} <= {p.prompt for p in PAIRS}
    ask(enough=0.5)
    assert [task.prompt for task in label(project, ada)] == ["Another"]


# ---- who looks ----


def waits(project, store, flow_run):
    batches.wait_in(project, "evaluation-1-1", flow_run)
    assert len(batches.waiting(store.database)) == 1


def test_only_complete_batches_are_looked_at_in_prefect(ask, project, store, settings, monkeypatch):
    asked = []
    monkeypatch.setattr(waiting, "get_client", lambda **_: _Prefect(asked))
    pending(ask, PAIRS[:1])
    waits(project, store, str(uuid.uuid4()))
    assert waiting.resume_ready(store, settings) == []
    assert asked == []
    label(project, invited(store, project))
    assert len(waiting.resume_ready(store, settings)) == 1
    assert len(asked) == 1
    assert waiting.resume_ready(store, settings) == []


class _Prefect:
    """Has one flow run, which is suspended."""

    def __init__(self, asked):
        self.asked = asked

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read_flow_run(self, id_):
        class State:
            name = "Suspended"
            is_paused = staticmethod(lambda: True)

        return type("Run", (), {"state": State})

    def resume_flow_run(self, id_):
        self.asked.append(id_)
        status = type("Status", (), {"value": "ACCEPT"})
        return type("Answer", (), {"status": status})


def test_a_prefect_that_is_away_is_asked_again(ask, project, store, settings, monkeypatch, caplog):
    pending(ask, PAIRS[:1])
    waits(project, store, str(uuid.uuid4()))
    label(project, invited(store, project))
    asked, stop = [], threading.Event()
    tries = []

    def away_then_here(**_):
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("refused")
        return _Prefect(asked)

    monkeypatch.setattr(waiting, "get_client", away_then_here)
    watcher = threading.Thread(target=waiting.watch, args=(store, settings, stop, 0.01))
    watcher.start()
    try:
        for _ in range(500):
            if asked:
                break
            stop.wait(0.01)
    finally:
        stop.set()
        watcher.join()
    assert len(asked) == 1
    assert len([r for r in caplog.records if "are looked at again later" in r.message]) == 1
    assert batches.waiting(store.database) == []


# ---- before a run ----


def test_whether_there_is_anybody_to_ask(project, store, settings, tmp_path):
    config = PeopleConfig(votes_per_pair=2)
    assert "has 0 annotators: invite people to" in nobody_to_ask(config, "shop", settings)
    invited(store, project)
    assert "has 1 annotators" in nobody_to_ask(config, "shop", settings)
    invited(store, project, "Bea")
    assert nobody_to_ask(config, "shop", settings) == ""
    empty = Settings.model_validate({"RLHF_HOME": tmp_path / "other"})
    assert "has 0 annotators" in nobody_to_ask(config, "shop", empty)
    assert not (tmp_path / "other").exists()


def test_a_store_that_was_opened_twice_sees_one_queue(ask, settings):
    pending(ask)
    other = Store.open(settings)
    assert batches.annotators(other.project("shop")) == 0
    other.close()

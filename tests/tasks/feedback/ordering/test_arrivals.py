"""Pairs that come into an ordered queue, and what users wish about them."""

import random
from collections import Counter

import pytest
from sqlalchemy import update

from rlhf_core.data.near import near_groups
from rlhf_core.data.prepared import prompt_key
from rlhf_core.labelling.arms import Shares, arm_of
from tasks.feedback.ordering.ordering import order_project
from tasks.feedback.ordering.outcome import begin, last_order
from tasks.feedback.ordering.places import ARRIVED, LATER, wish_of
from tasks.feedback.store.content import Content
from tasks.feedback.store.records import Answer, Ballot, NewPair, Vote
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import Annotator, Pair
from tasks.record.record import Record

WORDS = [f"word{i}" for i in range(3000)]


def prompt(i):
    return " ".join(random.Random(i).choices(WORDS, k=20))


def pair(i, text=None, **how):
    return NewPair(text or prompt(i), Answer(f"one {i}"), Answer(f"two {i}"), **how)


def asked(numbers, **how):
    return [pair(i, wanted=1, **how) for i in numbers]


def rows(project, added):
    with project.database.reading() as session:
        return [session.get(Pair, one.id) for one in added]


def in_order(project):
    """The ids of what is open, as people get them."""
    with project.database.reading() as session:
        found = session.query(Pair).filter_by(project_id=project.id, state="open")
        return [row.id for row in found.order_by(Pair.priority, Pair.id)]


@pytest.fixture
def ordered(project):
    """A project whose queue has been put in order."""
    begin(project, "me")
    return project


@pytest.fixture
def record(home, settings):
    return Record.open(settings)


# ---- arms ----


def test_a_pair_has_the_arm_of_its_prompt_at_once_and_a_place_in_the_shares(ordered):
    added = ordered.content.add(asked(range(300)))
    arms = [row.arm for row in rows(ordered, added)]
    assert arms == [arm_of(prompt_key(prompt(i)), "demo", Shares()) for i in range(300)]
    by_id = dict(zip([one.id for one in added], arms, strict=True))
    first = [by_id[id_] for id_ in in_order(ordered)]
    for begins in (0, 50, 100):
        shares = Counter(first[begins : begins + 100])
        assert (shares["random"], shares["hold_out"]) == pytest.approx((20, 10), abs=2)


def test_pairs_that_come_a_few_at_a_time_share_the_queue_too(ordered):
    arms = {}
    for start in range(0, 304, 16):
        added = ordered.content.add(asked(range(start, start + 16)))
        arms |= {row.id: row.arm for row in rows(ordered, added)}
    shares = Counter(arms[id_] for id_ in in_order(ordered)[:150])
    assert (shares["random"], shares["hold_out"]) == pytest.approx((30, 15), abs=8)


def test_before_the_first_order_or_against_the_rules_there_are_no_arms(project):
    added = project.content.add(asked(range(5)))
    project.change("me", {"ordered": False})
    begin(project, "me")
    assert last_order(project) is None
    project.change("me", {"ordered": True})
    begin(project, "me")
    project.change("me", {"ordered": False})
    added += project.content.add(asked(range(5, 10)))
    assert {(row.arm, row.priority) for row in rows(project, added)} == {("", 0)}
    added += project.content.add([pair(11)])  # nobody is asked about it
    assert {(row.arm, row.priority) for row in rows(project, added)} == {("", 0)}


def test_nearly_equal_prompts_share_an_arm_and_one_of_them_comes_early(ordered):
    texts = [prompt(i) for i in range(40)]
    edited = [f"{text} {end}" for end in ("please", "now") for text in texts]
    added = ordered.content.add(asked(range(40)))
    # Another process, which has seen nothing of the first.
    other = Content(ordered.database, ordered.id)
    added += other.add([pair(100 + i, text, wanted=1) for i, text in enumerate(edited)])
    groups = near_groups(texts + edited)
    arms = {}
    for group, row in zip(groups, rows(ordered, added), strict=True):
        arms.setdefault(group, set()).add(row.arm)
    assert len(arms) == 40
    assert all(len(found) == 1 for found in arms.values())
    group_of = dict(zip([one.id for one in added], groups, strict=True))
    assert len({group_of[id_] for id_ in in_order(ordered)[:40]}) == 40


def test_a_prompt_with_votes_is_not_held_out_and_what_is_held_out_stays_so(ordered):
    held = [i for i in range(200) if arm_of(prompt_key(prompt(i)), "demo", Shares()) == "hold_out"]
    assert len(held) > 5
    ordered.judgments.add([(pair(i), [Ballot("a", "bob")]) for i in held])  # trained on
    more = ordered.content.add([pair(1000 + i, prompt(i), wanted=1) for i in held])
    assert "hold_out" not in {row.arm for row in rows(ordered, more)}
    fresh = [i for i in range(200, 400) if arm_of(prompt_key(prompt(i)), "demo", Shares())
             == "hold_out"]  # fmt: skip
    ordered.content.add(asked(fresh))
    ordered.judgments.add([(pair(i), [Ballot("a", "bob")]) for i in fresh])
    again = ordered.content.add([pair(2000 + i, f"{prompt(i)} ok", wanted=1) for i in fresh])
    assert {row.arm for row in rows(ordered, again)} == {"hold_out"}
    trained = {vote.pair for vote in ordered.judgments.stream(training=True)}
    assert len(trained) == len(held)


def test_what_a_transaction_took_back_decides_about_nothing(ordered):
    first = ordered.content

    def stopped():
        with ordered.database.writing(ordered.id) as session:
            first.put(session, asked([1]))
            raise MemoryError

    with pytest.raises(MemoryError):
        stopped()
    added = first.add(asked(range(50, 80)))
    assert [row.arm for row in rows(ordered, added)] == [
        arm_of(prompt_key(prompt(i)), "demo", Shares()) for i in range(50, 80)
    ]


def test_what_came_in_waits_behind_the_order_until_the_next(project, record):
    old = project.content.add(asked(range(40)))
    order_project(project, record)
    new = project.content.add(asked(range(40, 80)))
    assert set(in_order(project)[:40]) == {one.id for one in old}
    before = {row.id: row.arm for row in rows(project, new)}
    assert min(row.priority for row in rows(project, new)) >= ARRIVED
    assert order_project(project, record).placed == 80
    assert max(row.priority for row in rows(project, new)) == 80
    held = {id_ for id_, arm in before.items() if arm == "hold_out"}
    assert {row.id for row in rows(project, new) if row.arm == "hold_out"} == held


# ---- wishes ----


def test_a_wish_of_a_user_is_kept_by_every_order(project, record):
    usual = project.content.add(asked(range(30)))
    [sooner] = project.content.add(asked([30], priority=-5))
    [later] = project.content.add(asked([31], priority=5))
    with project.database.writing(project.id) as session:  # as it was kept once
        session.execute(update(Pair).where(Pair.id == later.id).values(priority=5))
    for _ in range(2):
        assert order_project(project, record).placed == 30
        added = project.content.add(asked(range(30, 32)))  # without a wish, and nothing new
        assert [one.new for one in added] == [False, False]
        queue = in_order(project)
        assert (queue[0], queue[-1]) == (sooner.id, later.id)
        found = rows(project, [sooner, later])
        assert [(wish_of(row.priority, row.arm), row.arm) for row in found] == [(-5, ""), (5, "")]
    assert set(queue[1:-1]) == {one.id for one in usual}


def test_a_wish_takes_a_pair_out_of_its_arm_unless_it_has_votes(project, record):
    added = project.content.add(asked(range(40)))
    order_project(project, record)
    held = next(row for row in rows(project, added) if row.arm == "hold_out")
    number = [one.id for one in added].index(held.id)
    project.judgments.add([(pair(number), [Ballot("a", "bob")])])
    other = (number + 1) % 40
    project.content.add([pair(number, wanted=2, priority=-1), pair(other, wanted=1, priority=-1)])
    one, two = rows(project, [added[number], added[other]])
    assert (one.priority, one.arm, one.state) == (-1, "hold_out", "open")
    assert (two.priority, two.arm) == (-1, "")
    # Asking for more votes without a wish moves nothing.
    third = rows(project, added)[(number + 2) % 40]
    project.content.add([pair((number + 2) % 40, wanted=3)])
    [now] = rows(project, [added[(number + 2) % 40]])
    assert (now.priority, now.arm, now.wanted) == (third.priority, third.arm, 3)


@pytest.mark.parametrize("wish", [-10, 0])
def test_judges_of_an_evaluation_are_asked_before_all_that_is_ordered(project, record, wish):
    project.content.add(asked(range(20)))
    order_project(project, record)
    batch = project.content.batch("evaluation", "judge")
    added = project.content.add(asked(range(15, 30), priority=wish), batch=batch)
    assert {(row.priority, row.arm) for row in rows(project, added[5:])} == {(wish, "")}
    if wish:
        assert {(row.priority, row.arm) for row in rows(project, added)} == {(wish, "")}
    order_project(project, record)
    project.content.add(asked(range(30, 40)))
    first = 15 if wish else 10
    assert set(in_order(project)[:first]) <= {one.id for one in added}


# ---- at once, and killed ----


def test_an_order_that_is_stopped_in_the_middle_has_changed_nothing(project, monkeypatch):
    added = project.content.add(asked(range(20)))

    def killed(*_, **__):
        raise MemoryError

    monkeypatch.setattr("tasks.feedback.store.content.set_marks_back", killed)
    with pytest.raises(MemoryError):
        project.content.prioritise([(one.id, "design") for one in reversed(added)])
    assert {(row.priority, row.arm) for row in rows(project, added)} == {(0, "")}


def test_people_who_label_while_the_queue_is_ordered_lose_no_vote(store, project):
    from concurrent.futures import ThreadPoolExecutor

    project.change("test", {"gold_every": 0, "repeat_every": 0})
    begin(project, "me")
    added = project.content.add(asked(range(240)))
    ids = [one.id for one in added]
    people = [store.door.who(store.door.enter(project.people.invite())).annotator
              for _ in range(8)]  # fmt: skip
    own = Store(store.database)

    def label(who):
        queue, done = own.by_id(project.id).queue, 0
        while tasks := queue.lease(who, 2):
            queue.vote(who, tasks[0].token, Vote("left", f"{who}-{done}"))
            done += 1
        return done

    def order():
        generator = random.Random(0)
        for _ in range(12):
            drawn = generator.sample(ids, len(ids))
            project.content.prioritise((id_, "random") for id_ in drawn)
        return 0

    with ThreadPoolExecutor(9) as pool:
        ordering = pool.submit(order)
        done = list(pool.map(label, people))
        assert ordering.result() == 0
    assert sum(done) == 240
    votes = [vote.pair for vote in project.judgments.stream()]
    assert len(votes) == len(set(votes)) == 240
    with project.database.reading() as session:
        marks = session.query(Annotator).filter_by(project_id=project.id)
        assert all(one.mark_priority is None or one.mark_priority < LATER for one in marks)

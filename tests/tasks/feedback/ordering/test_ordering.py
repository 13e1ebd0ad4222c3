"""The queue of a project in order, from the store to MLflow and the command."""

import json
from collections import Counter

import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from flows.__main__ import app
from rlhf_core.data.encoding import encode_answers
from rlhf_core.errors import DataError, ModelError
from rlhf_core.labelling.features import pair_features
from rlhf_core.rewards.models import load_reward_model, score_texts
from tasks.feedback.ordering.ordering import order_project
from tasks.feedback.ordering.outcome import last_order
from tasks.feedback.ordering.publish import publish_order
from tasks.feedback.ordering.reading import read_queue
from tasks.feedback.page.app import create_app
from tasks.feedback.store.records import Answer, Ballot, NewPair, Vote
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import Pair
from tasks.record.record import Record

TEXT = "a fine room with a quiet view the film was long and dull it works it is cheap"
WORDS = TEXT.split(" ")


def text(i, length=6):
    return " ".join(WORDS[(i * 7 + k * (3 + i % 5)) % len(WORDS)] for k in range(length))


def pair(i, **how):
    prompt = how.pop("prompt", f"prompt number {i} about {text(i, 9)}")
    return NewPair(prompt, Answer(f"{text(i)} {i}"), Answer(f"{text(i + 50, 8)} {i}"), **how)


def fill(project, n=60, **how):
    return project.content.add([pair(i, wanted=1, **how) for i in range(n)])


def rows(project):
    with project.database.reading() as session:
        return list(session.query(Pair).filter_by(project_id=project.id).order_by(Pair.id))


def person(project, name="ann"):
    from tasks.feedback.store import clock
    from tasks.feedback.store.tables import Annotator

    with project.database.writing(project.id) as session:
        made = Annotator(
            project_id=project.id, pseudonym=name, role="annotator", state="active", via="page",
            created_at=clock.now(),
        )  # fmt: skip
        session.add(made)
        session.flush()
        return made.id


@pytest.fixture
def record(home, settings):
    return Record.open(settings)


@pytest.fixture
def with_model(record, reward_dir):
    run = record.client.create_run("0").info.run_id
    return record.store.publish(reward_dir, "demo-reward", run_id=run, tags={})


# ---- the store ----


def test_places_are_given_and_people_get_them_in_that_order(project):
    added = fill(project, 5)
    who = person(project)
    project.change("test", {"gold_every": 0, "repeat_every": 0})
    [task] = project.queue.lease(who, 1)
    project.queue.vote(who, task.token, Vote("left", "key-of-the-first-vote"))
    order = [(added[i].id, "design") for i in (4, 0, 3, 1, 2)]
    assert project.content.prioritise(order) == 4  # the first has a vote
    assert [row.priority for row in rows(project)] == [0, 4, 5, 3, 1]
    assert [row.arm for row in rows(project)] == ["", *["design"] * 4]
    # Although this person's search was behind some of them.
    prompts = []
    while tasks := project.queue.lease(who, 1):
        prompts.append(tasks[0].prompt)
        project.queue.vote(who, tasks[0].token, Vote("left", f"key-number-{len(prompts)}-000"))
    assert prompts == [pair(i).prompt for i in (4, 3, 1, 2)]


def test_a_pair_of_another_project_keeps_its_place(store, project):
    other = store.project("other", make=True)
    [added] = other.content.add([pair(0, wanted=1)])
    assert project.content.prioritise([(added.id, "design")]) == 0
    assert [row.arm for row in rows(other)] == [""]


def test_the_hold_out_is_in_no_snapshot_and_in_no_training_file(project, tmp_path):
    added = fill(project, 4)
    project.content.prioritise([(a.id, "hold_out" if i < 2 else "design")
                                for i, a in enumerate(added)])  # fmt: skip
    project.judgments.add([(pair(i), [Ballot("a", "bob")]) for i in range(4)])
    info = project.snapshots.take()
    assert (info.votes, info.pairs) == (2, 2)
    project.snapshots.write(info.digest, tmp_path / "votes.jsonl")
    written = (tmp_path / "votes.jsonl").read_text()
    assert pair(0).prompt not in written
    assert pair(3).prompt in written
    assert len(list(project.judgments.stream())) == 4  # they are there


def test_nothing_that_an_annotator_gets_tells_the_arm(project):
    added = fill(project, 30)
    project.content.prioritise([(a.id, ("design", "random", "hold_out")[i % 3])
                                for i, a in enumerate(added)])  # fmt: skip
    for task in project.queue.lease(person(project), 30):
        assert set(vars(task)) == {"token", "prompt", "left", "right", "until"}
        assert not {"design", "random", "hold_out"} & set(map(str, vars(task).values()))


# ---- reading ----


def test_what_is_read(project):
    fill(project, 6)
    project.content.add([pair(6, wanted=1)], batch=project.content.batch("evaluation", "judge"))
    again = pair(0)
    votes = [Ballot("a", "bob"), Ballot("b", "bob", time="later"), Ballot("both_bad", "eve")]
    project.judgments.add([(again, votes), (pair(1), [Ballot("b", "bob")])])
    queue = read_queue(project)
    assert len(queue.pairs) == 6  # nothing of an evaluation
    assert queue.waiting == [2, 3, 4, 5]
    assert sorted(vote.outcome for vote in queue.votes) == [0.0, 0.5, 1.0]
    assert len(set(queue.groups)) == 6
    assert queue.as_waiting().trained_on == {0, 1}


def test_the_outcome_is_that_of_the_answers_as_they_stand(project):
    one = pair(0)
    project.judgments.add([(NewPair(one.prompt, one.b, one.a), [Ballot("a", "bob")])])
    queue = read_queue(project)
    [vote], [found] = queue.votes, queue.pairs
    preferred = found.a if vote.outcome == 1 else found.b
    assert preferred == one.b.text


# ---- the whole ----


def test_without_a_model_it_is_random_with_its_arms(project, record):
    fill(project, 300)
    order = order_project(project, record, by="me")
    assert (order.model, order.placed, order.by_design, order.savings) == ("", 300, False, None)
    arms = Counter(row.arm for row in rows(project))
    assert set(arms) == {"random", "hold_out"}
    assert 15 < arms["hold_out"] < 50
    assert "no reward model yet" in order.sentence
    assert last_order(project) == order


def test_with_a_model_the_design_comes_first_and_again_in_the_same_order(
    project, record, with_model
):
    fill(project, 60)
    order = order_project(project, record, by="me")
    assert (order.model, order.placed, order.by_design) == (with_model.uri, 60, True)
    first = [(row.priority, row.arm) for row in rows(project)]
    assert sorted(place for place, _ in first) == list(range(1, 61))
    assert {"design", "random", "hold_out"} == {arm for _, arm in first}
    order_project(project, record, by="me")
    assert [(row.priority, row.arm) for row in rows(project)] == first


def test_new_votes_change_the_order_and_move_nothing_that_was_labelled(project, record, with_model):
    fill(project, 60)
    order_project(project, record)
    before = {row.id: (row.priority, row.arm) for row in rows(project)}
    done = [row for row in rows(project) if row.priority <= 10]
    texts = {i: pair(i) for i in range(60)}
    project.judgments.add(
        [(texts[row.id - rows(project)[0].id], [Ballot("a", "bob")]) for row in done]
    )
    order = order_project(project, record)
    assert (order.placed, order.votes) == (50, 10)
    after = {row.id: (row.priority, row.arm) for row in rows(project)}
    assert all(after[row.id] == before[row.id] for row in done)
    held = {i for i, (_, arm) in before.items() if arm == "hold_out"}
    assert {i for i, (_, arm) in after.items() if arm == "hold_out"} == held


def test_an_estimate_is_kept_shown_and_logged_and_the_design_stops_without_savings(
    project, record, with_model, monkeypatch
):
    fill(project, 200)
    monkeypatch.setattr("rlhf_core.labelling.savings.SETTLED", 50)
    order_project(project, record)
    g = torch.Generator().manual_seed(0)
    by_place = sorted(rows(project), key=lambda row: row.priority)
    first = rows(project)[0].id
    votes = ["a" if torch.rand(1, generator=g).item() < 0.5 else "b" for _ in range(170)]
    project.judgments.add(
        (pair(row.id - first), [Ballot(vote, "bob")])
        for row, vote in zip(by_place, votes, strict=False)
    )
    order = order_project(project, record, by="me")
    assert order.votes == 170
    assert order.savings is not None
    assert order.savings.saved.low <= order.savings.saved.value <= order.savings.saved.high
    assert order.by_design == (order.savings.saved.value > 0)
    assert last_order(project) == order
    json.dumps(order.numbers)
    run_id = publish_order(project, order, record)
    assert publish_order(project, order, record) == run_id
    run = record.client.get_run(run_id)
    assert run.data.metrics["labelling/saved"] == pytest.approx(order.savings.saved.value)
    [*_, last] = record.client.get_metric_history(run_id, "labelling/saved")
    assert last.step == 170


def test_a_model_that_is_none_is_refused(project, record, policy_dir):
    fill(project, 3)
    run = record.client.create_run("0").info.run_id
    policy = record.store.publish(policy_dir, "demo-policy", run_id=run, tags={})
    with pytest.raises(ModelError, match="reward"):
        order_project(project, record, model=policy)


def test_an_empty_queue_is_in_order(project, record, with_model):
    assert order_project(project, record).placed == 0


def test_the_command(settings, with_model):
    store = Store.open(settings)
    fill(store.project("demo", make=True), 20)
    said = CliRunner().invoke(app, ["feedback", "order", "demo"])
    assert said.exit_code == 0, said.output
    assert "20 pairs in order. Most informative first, by models:/demo-reward/1" in " ".join(
        said.output.split()
    )
    missing = CliRunner().invoke(app, ["feedback", "order", "nowhere"])
    assert isinstance(missing.exception, DataError) or "nowhere" in missing.output


def test_admins_see_the_last_order_and_annotators_nothing_of_it(store, project, record):
    def signed_in(role):
        client = TestClient(create_app(store), base_url="http://127.0.0.1:4300")
        client.post(f"/enter/{project.people.invite(role=role)}", json={})
        return client

    boss, ann = signed_in("admin"), signed_in("annotator")
    assert "Order of the queue" not in boss.get("/admin").text
    fill(project, 10)
    order_project(project, record)
    assert "In random order: the project has no reward model yet." in boss.get("/admin").text
    for address in ("/", "/api/tasks", "/api/progress"):
        shown = ann.get(address).text
        assert not any(arm in shown for arm in ("hold_out", '"random"', '"design"'))


# ---- features ----


def test_features_are_what_the_head_reads(reward_dir):
    """The head on the difference of two states is the difference of two scores."""
    model, tokenizer = load_reward_model(reward_dir)
    pairs = [(p.prompt, p.a.text, p.b.text) for p in map(pair, range(5))]
    pairs.append((pairs[0][0], pairs[0][2], pairs[0][1]))  # exchanged
    x = pair_features(model, tokenizer, pairs, max_length=48, batch_size=3)
    scores = [
        score_texts(model, tokenizer, [p[0] for p in pairs], [p[k] for p in pairs], max_length=48)
        for k in (1, 2)
    ]
    expected = (scores[0] - scores[1])[0] * model.std
    torch.testing.assert_close(x @ model.head.weight[0].detach(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(x[5], -x[0])
    assert encode_answers(pairs[0][0], [pairs[0][1]], tokenizer, 48).responses

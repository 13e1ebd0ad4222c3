"""The queue is put in order by itself, falls back where it saves nothing, and fails no run."""

import hashlib
import time
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient
from prefect import flow

from flows import retrain
from flows.feedback import feedback
from rlhf_core.rewards.models import load_reward_model, score_texts
from rlhf_core.settings.data import DataConfig
from tasks.feedback.asking.config import AskConfig
from tasks.feedback.ordering import beside
from tasks.feedback.ordering.outcome import begin, last_order, orders
from tasks.feedback.ordering.task import order_by_itself, put_in_order
from tasks.feedback.page.app import create_app
from tasks.feedback.store.records import Answer, NewPair, Vote
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import Pair
from tasks.record.record import Record

TEXT = "a fine room with a quiet view the film was long and dull it works it is cheap"
WORDS = TEXT.split(" ")


def text(i, length=6):
    return " ".join(WORDS[(i * 7 + k * (3 + i % 5)) % len(WORDS)] for k in range(length))


def pairs(n):
    return [
        NewPair(f"prompt number {i} about {text(i, 9)}", Answer(f"{text(i)} {i}"),
                Answer(f"{text(i + 50, 8)} {i}"), wanted=1)
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture
def store(settings, home):
    opened = Store.open(settings)
    yield opened
    opened.close()


@pytest.fixture
def project(store):
    made = store.project("demo", make=True)
    made.change("test", {"gold_every": 0, "repeat_every": 0})
    return made


@pytest.fixture
def model(settings, home, reward_dir):
    record = Record.open(settings)
    run = record.client.create_run("0").info.run_id
    return record.store.publish(reward_dir, "demo-reward", run_id=run, tags={})


def waiting(project):
    """The arms of what waits, in the order of the queue."""
    with project.database.reading() as session:
        found = session.query(Pair).filter_by(project_id=project.id, state="open")
        return [row.arm for row in found.order_by(Pair.priority, Pair.id)]


# ---- seen to happen ----


def test_people_whose_votes_the_design_does_not_help_get_pairs_at_random_after_500(
    store, project, settings, model, reward_dir
):
    """Half of what the design asks about is a coin toss to people; else they follow the model."""
    network, tokenizer = load_reward_model(reward_dir)
    project.content.add(pairs(760))
    ann = store.door.who(store.door.enter(project.people.invite())).annotator
    texts = [(p.prompt, answer.text) for p in pairs(760) for answer in (p.a, p.b)]
    scores = score_texts(network, tokenizer, *map(list, zip(*texts, strict=True)), max_length=48)
    score = dict(zip(texts, scores[0].tolist(), strict=True))

    def label(most):
        with project.database.reading() as session:
            arms = {row.id: row.arm for row in session.query(Pair)}
        arm_of = {p.prompt: arms[i] for i, p in enumerate(pairs(760), start=1)}
        for n in range(most):
            [task] = project.queue.lease(ann)
            left = score[task.prompt, task.left] > score[task.prompt, task.right]
            half, toss, *_ = hashlib.sha256(task.prompt.encode()).digest()
            if arm_of[task.prompt] == "design" and half < 128:
                left = (toss < 128) == (task.left < task.right)
            vote = Vote("left" if left else "right", f"{most}-{n}")
            project.queue.vote(ann, task.token, vote)

    assert put_in_order("demo", settings).by_design
    label(499)
    early = put_in_order("demo", settings)
    assert early.savings is not None
    assert early.savings.saved.value <= 0
    assert early.by_design  # not yet
    assert "decided at 500 votes" in early.sentence
    assert "design" in waiting(project)
    label(1)
    late = put_in_order("demo", settings)
    assert (late.votes, late.by_design) == (500, False)
    assert late.sentence.startswith("In random order, since the other order saves nothing; labels")
    assert set(waiting(project)) == {"random", "hold_out"}
    # Admins are told, and MLflow has the estimates with a figure.
    client = TestClient(create_app(store), base_url="http://127.0.0.1:4300")
    client.post(f"/enter/{project.people.invite(role='admin')}", json={})
    assert late.sentence in client.get("/admin").text
    record = Record.open(settings)
    run = record.runs.queue_order(record.client.get_experiment_by_name("demo").experiment_id)
    history = record.client.get_metric_history(run.info.run_id, "labelling/by_design")
    assert [(one.step, one.value) for one in history] == [(0, 1), (499, 1), (500, 0)]
    figures = record.client.list_artifacts(run.info.run_id, "figures")
    assert [one.path for one in figures] == ["figures/labels_saved.png"]
    assert [one.votes for one in orders(project)] == [0, 499, 500]


# ---- by itself, and quietly ----


def test_after_asking_the_queue_is_in_order_and_what_fails_is_a_warning(
    project, settings, prefect_server, monkeypatch, caplog
):
    project.content.add(pairs(30))
    monkeypatch.setattr("flows.feedback.ask_people", lambda config: config.project)
    assert feedback(AskConfig(project="demo")) == "demo"
    assert last_order(project).placed == 30

    def broken(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("tasks.feedback.ordering.ordering.order_project", broken)
    assert feedback(AskConfig(project="demo")) == "demo"
    assert "keeps the order that it had (OSError: no space left)" in caplog.text
    assert "`rlhf feedback order demo` puts it in order" in caplog.text
    assert len(orders(project)) == 1
    # Nobody may choose the order of an evaluation, nor that of a project that wants none.
    monkeypatch.undo()
    project.change("me", {"ordered": False})
    assert order_by_itself("demo", settings) is None
    assert order_by_itself("nowhere", settings) is None
    assert len(orders(project)) == 1


def test_what_a_loop_asks_again_is_in_order_too(project, prefect_server, monkeypatch):
    project.content.add(pairs(12))
    asked = SimpleNamespace(asked=True, sentence="")
    monkeypatch.setattr(retrain, "ask_again", lambda *_, **__: asked)
    monkeypatch.setattr(retrain, "called_by", lambda *_: None)
    ask = {"project": "demo", "then": ""}
    config = retrain.RetrainConfig.model_validate({"ask": ask})
    assert retrain._go_on(config, SimpleNamespace(flow_run="", key=""), "Nothing.") is asked
    assert last_order(project).placed == 12
    asked.asked = None
    retrain._go_on(config, SimpleNamespace(flow_run="", key=""), "Nothing.")
    assert len(orders(project)) == 1


def in_a_run(data, model, body=lambda: None):
    @flow(name="some-run")
    def run():
        with beside.ordered_beside(data) as order_queue:
            began = time.monotonic()
            order_queue(model)
            assert time.monotonic() - began < 5
            body()
        return "done"

    return run()


def test_beside_a_training_another_process_orders_by_the_new_model(
    project, settings, model, prefect_server, caplog, monkeypatch
):
    project.content.add(pairs(40))
    data = DataConfig.model_validate({"source": "files", "preferences": {"store": "demo"}})
    assert in_a_run(data, model) == "done"
    order = last_order(project)
    assert (order.model, order.placed, order.by_design) == (model.uri, 40, True)
    # A program that fails, and one that takes too long.
    with monkeypatch.context() as patch:
        patch.setattr(beside, "PROGRAM", "tasks.feedback.ordering.nothing")
        assert in_a_run(data, model) == "done"
    assert "No module named" in caplog.text
    monkeypatch.setattr(beside, "SECONDS", 0.2)
    assert in_a_run(data, model) == "done"
    assert len(orders(project)) == 1


def test_a_run_that_fails_or_is_interrupted_raises_what_it_would_have(
    project, model, prefect_server, monkeypatch
):
    project.content.add(pairs(5))
    data = DataConfig.model_validate({"source": "files", "preferences": {"store": "demo"}})
    started = []
    start = beside._start
    monkeypatch.setattr(beside, "_start", lambda *a: started.append(start(*a)) or started[-1])

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_a_run(data, model, interrupted)
    assert started[0].poll() is not None
    assert last_order(project) is None
    # Without votes of the store there is nothing to order.
    assert in_a_run(DataConfig(), model) == "done"
    project.change("me", {"ordered": False})
    assert in_a_run(data, model) == "done"
    assert len(started) == 1


def test_the_first_order_begins_the_arms_once(project):
    begin(project, "me")
    begin(project, "me")
    assert len(orders(project)) == 1

"""MLflow's review queues: on a database and on a server, as reviewers and their page use them."""

import json
import shutil

import mlflow
import pytest
from mlflow.entities import AssessmentSource
from mlflow.genai import label_schemas, review_queues

from rlhf_core.errors import UserError
from tasks.feedback.forms.tools.review_queues import CHOICES, ReviewQueues
from tasks.feedback.store.records import Answer, NewPair
from tasks.feedback.store.tables import Assignment
from tasks.settings import Settings


@pytest.fixture(autouse=True)
def no_address_stays():
    """MLflow writes an address that is set into the environment of the process."""
    yield
    mlflow.set_tracking_uri(None)


def ask(project, pairs=6):
    a, b = Answer("", "models:/demo-policy/31"), Answer("", "models:/secret-policy/7")
    project.content.add(
        NewPair(
            f"Q{n}?",
            Answer(f"good {n}", a.model, {"run": "hidden-run"}, "a-run"),
            Answer(f"poor {n}", b.model),
            wanted=1,
        )
        for n in range(pairs)
    )


def traces(queues):
    mlflow.set_tracking_uri(queues._settings.mlflow_uri)
    found = mlflow.get_experiment_by_name(queues.experiment)
    return mlflow.search_traces(locations=[found.experiment_id], return_type="list")


def answer(trace, choice, who="default", comment=None):
    """What the page of a queue writes when its reviewer has chosen."""
    mlflow.log_feedback(
        trace_id=trace.info.trace_id,
        name="preference",
        value=choice,
        rationale=comment,
        source=AssessmentSource("HUMAN", who),
    )


def good_side(trace):
    """A or B: the answer that is good."""
    outputs = json.loads(trace.data.response)
    return "A" if outputs["A"].startswith("good") else "B"


def use(project, settings):
    ask(project)
    queues = ReviewQueues(project, settings)
    pushed = queues.push(["ann", "bob"], 2, by="admin")
    mlflow.set_tracking_uri(settings.mlflow_uri)  # for what the reviewers do
    assert pushed.queues == {"demo: ann": 2, "demo: bob": 2}
    assert sum(pushed.queues.values()) == 4
    again = queues.push(["ann", "bob"], 2, by="admin")
    assert (sum(again.queues.values()), again.waiting) == (0, 4)
    mlflow.set_tracking_uri(settings.mlflow_uri)

    shown = traces(queues)
    assert len(shown) == 4
    for trace in shown:  # nothing that a reviewer can look at tells who wrote what
        everything = json.dumps(trace.to_dict(), default=str)
        assert not any(word in everything for word in ("-policy", "hidden-run", "a-run", "models:"))
    assert len({json.loads(trace.data.request)["prompt"] for trace in shown}) == 4

    experiment = mlflow.get_experiment_by_name(queues.experiment).experiment_id
    named = {one.name: one for one in review_queues.list_review_queues(experiment_id=experiment)}
    items = {
        name: [item.item_id for item in review_queues.list_review_queue_items(queue.queue_id)]
        for name, queue in named.items()
    }
    assert (named["demo: ann"].users, len(items["demo: ann"])) == (["ann"], 2)
    [question] = [
        one for one in label_schemas.list_label_schemas(experiment) if one.name == "preference"
    ]
    assert named["demo: ann"].schema_ids == [question.schema_id]
    assert question.input.options == list(CHOICES)

    by_id = {trace.info.trace_id: trace for trace in shown}
    ann, bob = ([by_id[id_] for id_ in items[f"demo: {name}"]] for name in ("ann", "bob"))
    answer(ann[0], f"{good_side(ann[0])} is better", "ann", "clear")
    answer(ann[1], "Both are bad", "ann")
    answer(bob[0], "A is better", "ann")  # not bob's word
    review_queues.set_review_queue_item_status(
        named["demo: bob"].queue_id,
        item_id=bob[1].info.trace_id,
        status="declined",
        completed_by="bob",
    )
    pulled = queues.pull()
    assert (pulled.votes, pulled.skips, pulled.unanswered) == (2, 1, 1)
    assert pulled.left_out == {"answers by another person than the reviewer of the queue": 1}
    return queues, ann, bob


def test_choices_come_back_as_votes_with_their_reviewer(project, settings):
    queues, ann, bob = use(project, settings)
    cast = {vote.prompt: vote for vote in project.judgments.stream(skips=True)}
    first = cast[json.loads(ann[0].data.request)["prompt"]]
    assert (first.vote, first.annotator, first.note, first.source) == (
        "a", "mlflow-ann", "clear", "mlflow"
    )  # fmt: skip
    # the side that was shown first is the one that the trace calls A
    assert first.first == ("a" if good_side(ann[0]) == "A" else "b")
    assert (first.model_a, first.kind) == ("models:/demo-policy/31", "fresh")
    assert cast[json.loads(ann[1].data.request)["prompt"]].vote == "both_bad"
    skip = cast[json.loads(bob[1].data.request)["prompt"]]
    assert (skip.vote, skip.annotator, skip.reason) == ("skip", "mlflow-bob", "declined")

    again = queues.pull()
    assert (again.votes, again.skips, again.there_already) == (0, 0, 3)
    mlflow.set_tracking_uri(settings.mlflow_uri)
    answer(ann[1], "They are equally good", "ann")  # a second thought
    changed = queues.pull()
    assert changed.left_out["answers that were changed after they had been pulled"] == 1
    assert len(list(project.judgments.stream(skips=True))) == 3


def test_a_reviewer_gets_more_when_the_first_are_done(plain, settings):
    queues, _, _ = use(plain, settings)
    # three of six are free: two that nobody had, and the one that bob has declined
    assert queues.push(["ann"], 2).queues == {"demo: ann": 2}
    assert queues.push(["cat"], 5).queues == {"demo: cat": 1}  # the others are on desks
    assert len(traces(queues)) == 7


def test_a_pair_is_held_for_its_reviewer(plain, settings):
    ask(plain, 1)
    ReviewQueues(plain, settings).push(["ann"], 1, days=3)
    with plain.database.reading() as session:
        [assignment] = session.query(Assignment)
        held = assignment.leased_until - assignment.created_at
    assert 2.9 < held.total_seconds() / 86_400 < 3.1


def test_an_address_stays_in_mlflow(plain, settings):
    ask(plain, 2)
    queues = ReviewQueues(plain, settings)
    queues.push(["ann@example.org"], 1)
    [trace] = traces(queues)
    answer(trace, "A is better", "ann@example.org")
    assert queues.pull().votes == 1
    [vote] = plain.judgments.stream()
    assert vote.annotator
    assert "ann" not in vote.annotator
    assert "example" not in vote.annotator


def test_a_server_without_accounts_calls_everybody_default(plain, settings):
    ask(plain, 1)
    queues = ReviewQueues(plain, settings)
    queues.push(["default"], 1)
    answer(traces(queues)[0], "I cannot tell (skip)")
    assert queues.pull().skips == 1


def test_what_is_missing_is_said(plain, settings, monkeypatch):
    with pytest.raises(UserError, match=r"no experiment 'feedback-demo'; `rlhf feedback push"):
        ReviewQueues(plain, settings).pull()
    monkeypatch.delattr(review_queues, "create_review_queue")
    with pytest.raises(UserError, match=r"has no review queues .* came with MLflow 3.14"):
        ReviewQueues(plain, settings)


@pytest.mark.integration
def test_the_same_on_a_server(plain, tmp_path, start_server, migrated_database):
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    url = start_server("server", "--backend-store-uri", database, "-w", "1", page="/health")
    use(plain, Settings.model_validate({"RLHF_HOME": tmp_path, "MLFLOW_TRACKING_URI": url}))

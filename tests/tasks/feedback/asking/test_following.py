"""What a complete batch starts: once, whatever happens, and with words about what is in the way."""

import logging
import threading
import time
from datetime import timedelta

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Running

from rlhf_core.settings.judge import PeopleConfig
from tasks.feedback.asking import batches, starting
from tasks.feedback.asking.starting import Looked, start_ready
from tasks.feedback.asking.waiting import watch
from tasks.feedback.store import clock
from tasks.feedback.store.records import Answer, NewPair
from tasks.feedback.store.tables import ASK, Batch, Pair
from tasks.settings import Settings
from tests.flows.people import invited, label

pytestmark = pytest.mark.integration
PROJECT = "demo"
EVENT = "rlhf.preferences.ready"


@flow(name="retrain")
def retrain(config: dict | None = None):
    """Stands in for the flow: nobody runs it here."""


@pytest.fixture
def prefect(prefect_server):
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def deployment(prefect, request):
    """A deployment of its own for the test; its name, as a batch has it."""
    name = f"of-{request.node.name.partition('[')[0]}-{time.monotonic_ns()}"
    made = prefect.create_deployment(prefect.create_flow(retrain), name)
    yield f"retrain/{name}"
    prefect.delete_deployment(made)


@pytest.fixture
def batch(project):
    """A function that puts a batch into the queue as `ask` does."""

    def make(name="ask-1", *, then="", pairs=3, asked=True, **complete):
        people = PeopleConfig(**complete)
        about = {"people": people.model_dump(mode="json"), "then": then, "by": "", "round": 1}
        number = project.content.batch(name, ASK, about)
        wanted = people.votes_per_pair
        project.content.add(
            [
                NewPair(f"{name} {n}", Answer("long " * (n + 2)), Answer("short"), wanted=wanted)
                for n in range(pairs)
            ],
            batch=number,
        )
        if asked:
            batches.keep(project, number, {"asked": True})
        return number

    return make


def runs(prefect, deployment):
    found = prefect.read_deployment_by_name(deployment)
    return [run for run in prefect.read_flow_runs() if run.deployment_id == found.id]


def row(project, number):
    with project.database.reading() as session:
        found = session.get_one(Batch, number)
        session.expunge(found)
        return found


def events(prefect, batch, seconds=60.0):
    """The events about a batch that the server has; it writes them down every few seconds."""
    question = {"filter": {"event": {"name": [EVENT]}, "order": "DESC"}, "limit": 50}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = prefect.request("POST", "/events/filter", json=question).json()["events"]
        if mine := [e for e in answer if e["payload"].get("batch") == batch]:
            return mine
        time.sleep(1)
    raise AssertionError(f"there is no event about {batch}")


# ---- when it is complete ----


def test_it_is_complete_when_every_pair_has_its_votes(project, store, batch):
    number = batch(votes_per_pair=2)
    label(project, invited(store, project))
    assert not batches.stand(project, number).complete
    label(project, invited(store, project, "Bea"))
    standing = batches.stand(project, number)
    assert (standing.answered, standing.pairs, standing.complete) == (3, 3, True)


@pytest.mark.parametrize("enough", [{"enough": 0.6}, {"enough_pairs": 2}])
def test_a_share_or_a_number_is_enough(project, store, batch, enough):
    number = batch(**enough)
    ada = invited(store, project)
    label(project, ada, most=1)
    assert not batches.stand(project, number).complete
    label(project, ada, most=1)
    assert batches.stand(project, number).complete


def test_its_time_may_be_over(project, batch, monkeypatch):
    number = batch(days=2)
    later = clock.now() + timedelta(days=2, seconds=1)
    assert not batches.stand(project, number).complete
    monkeypatch.setattr(clock, "now", lambda: later)
    standing = batches.stand(project, number)
    assert standing.complete
    assert standing.answered == 0


def test_pairs_that_everybody_skips_and_withdrawn_ones_hold_nobody_up(project, store, batch):
    number = batch(pairs=2)
    with project.database.writing(project.id) as session:
        session.query(Pair).order_by(Pair.id).first().state = "withdrawn"
    label(project, invited(store, project), lambda task: "skip")
    standing = batches.stand(project, number)
    assert (standing.answered, standing.given_up, standing.complete) == (0, 2, True)


def test_it_is_not_complete_while_answers_are_still_being_sampled(project, store, batch):
    number = batch(asked=False)
    label(project, invited(store, project))
    assert not batches.stand(project, number).complete
    batches.keep(project, number, {"asked": True})
    assert batches.stand(project, number).complete


# ---- once ----


def test_a_complete_batch_starts_its_deployment_once(
    prefect, project, store, batch, deployment, monkeypatch
):
    number = batch(then=deployment, enough=0.5)
    assert start_ready(store) == []
    label(project, invited(store, project), most=2)
    barrier, follow = threading.Barrier(3), starting._follow

    def together(*arguments):
        barrier.wait(30)
        return follow(*arguments)

    monkeypatch.setattr(starting, "_follow", together)
    watchers = [threading.Thread(target=start_ready, args=(store,)) for _ in range(3)]
    for watcher in watchers:
        watcher.start()
    for watcher in watchers:
        watcher.join(120)
    monkeypatch.setattr(starting, "_follow", follow)
    (run,) = runs(prefect, deployment)
    assert (run.tags, run.state.name) == ([f"batch:{row(project, number).name}"], "Scheduled")
    assert row(project, number).flow_run == str(run.id)
    assert row(project, number).resumed_at is not None
    # Nobody is asked about the third pair any more.
    assert label(project, invited(store, project, "Bea")) == []
    assert start_ready(store) == []


def test_a_watcher_that_dies_before_it_notes_the_run_starts_no_second_one(
    prefect, project, store, batch, deployment, monkeypatch
):
    batch(then=deployment)
    label(project, invited(store, project))
    with monkeypatch.context() as patch:

        def died(*arguments):
            raise KeyboardInterrupt

        patch.setattr(batches, "followed_by", died)
        with pytest.raises(KeyboardInterrupt):
            start_ready(store)
    (run,) = runs(prefect, deployment)
    prefect.set_flow_run_state(run.id, Running(), force=True)
    assert len(start_ready(store)) == 1  # it is found, and does not stand in its own way
    assert len(runs(prefect, deployment)) == 1


# ---- what is in the way ----


def test_what_is_in_the_way_is_said_once_and_tried_again(
    prefect, project, store, batch, deployment, caplog
):
    other = f"{deployment}-that-is-not"
    number = batch(then=other)
    label(project, invited(store, project))
    looked = Looked()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert start_ready(store, looked) == []
    assert len(caplog.records) == 1
    said = row(project, number).details["problem"]
    assert said.startswith(f"Prefect has no deployment {other}: register it with `rlhf deploy`")

    batches.keep(project, number, {"then": deployment})
    found = prefect.read_deployment_by_name(deployment)
    prefect.update_deployment(found.id, DeploymentUpdate(paused=True))
    assert start_ready(store, looked) == []
    assert "is paused" in row(project, number).details["problem"]

    prefect.update_deployment(found.id, DeploymentUpdate(paused=False))
    before = prefect.create_flow_run_from_deployment(found.id, name="by-hand")
    prefect.set_flow_run_state(before.id, Running(), force=True)
    assert start_ready(store, looked) == []
    assert row(project, number).details["problem"] == (
        f"the run by-hand of {deployment} comes first (Running)"
    )

    prefect.set_flow_run_state(before.id, Cancelled(), force=True)
    assert len(start_ready(store, looked)) == 1
    assert "problem" not in row(project, number).details


def test_a_prefect_that_is_away_is_waited_for(prefect, project, store, batch, deployment, tmp_path):
    number = batch(then=deployment)
    label(project, invited(store, project))
    stop = threading.Event()
    settings = Settings.model_validate({"RLHF_HOME": tmp_path / "home"})

    def said():
        return row(project, number).details.get("problem", "")

    def until(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, said()
            time.sleep(0.2)

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        start_ready(store)
    assert said().startswith("Prefect did not answer")
    watcher = threading.Thread(target=watch, args=(store, settings, stop, 0.1))
    watcher.start()
    until(lambda: row(project, number).resumed_at is not None)
    stop.set()
    watcher.join(60)
    assert len(runs(prefect, deployment)) == 1
    assert said() == ""


def test_a_batch_without_pairs_starts_nothing(prefect, project, store, batch, deployment):
    number = batch(then=deployment, pairs=0)
    assert start_ready(store) == []
    assert row(project, number).details["problem"].startswith("it has no pairs")
    assert runs(prefect, deployment) == []


def test_batches_of_an_older_release_are_left_alone(project, store):
    number = project.content.batch("old", ASK, {"people": {"votes_per_pair": 1}})
    assert batches.followed(store.database) == []
    assert start_ready(store) == []
    assert row(project, number).resumed_at is None


# ---- the event ----


def test_it_is_announced_so_that_an_automation_acts_only_where_nothing_was_started(
    prefect, project, store, batch, deployment
):
    one, other = f"alone-{time.monotonic_ns()}", f"started-{time.monotonic_ns()}"
    batch(one)
    batch(other, then=deployment)
    label(project, invited(store, project))
    assert len(start_ready(store)) == 2
    assert start_ready(store) == []
    (alone,) = events(prefect, one)
    assert alone["resource"]["prefect.resource.id"] == f"rlhf.project.{PROJECT}"
    assert alone["payload"] == {"project": PROJECT, "count": 3, "batch": one, "pairs": 3}
    (started,) = events(prefect, other)
    assert started["resource"]["prefect.resource.id"] == f"rlhf.batch.{PROJECT}"
    assert started["payload"]["deployment"] == deployment
    assert started["payload"]["flow_run"] == str(runs(prefect, deployment)[0].id)

"""Everything that learns from people at once, in one loop: known answers, a reward model that knows
who voted, a judge beside people, and a queue that orders itself."""

from collections import Counter

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow

from flows.retrain import RetrainConfig, retrain
from tasks.feedback.asking.starting import start_ready
from tasks.feedback.ordering.outcome import last_order
from tasks.feedback.store.records import Answer, Ballot, NewPair
from tasks.feedback.store.store import Store
from tasks.pages.reading import Reader
from tasks.record.record import Record
from tests.flows.people import invited, label
from tests.flows.rounds import asked, loop

pytestmark = pytest.mark.integration
NAME = "all"


def cast(project, numbers, **more):
    """Votes of two people who do not always agree."""
    project.judgments.add(
        (
            NewPair(f"Review of hotel {n}:", Answer(f" fine {n}"), Answer(f" dull {n}"), **more),
            [Ballot("a", "ada", "b"), Ballot("b" if n % 5 == 0 else "a", "bob", "a")],
        )
        for n in numbers
    )


def test_a_loop_with_all_of_it(shared_home, tiny, prefect_server):
    store = Store.open(shared_home)
    project = store.project(NAME, make=True)
    cast(project, range(60))
    cast(project, range(60, 72), gold="a")
    content = loop(tiny, NAME, rounds=2, min_new_preferences=1)
    content["pipeline"]["reward_model"] |= {"annotators": "aware"}
    content["ask"] |= {
        "prompts": 30,
        "judge": {"source": "reward_model", "name": "rm"},
        "router": {"sure": 0.5, "audit": 0.2},
    }
    config = RetrainConfig.model_validate(content).model_dump(mode="json")
    with get_client(sync_client=True) as prefect:
        flow = prefect.create_flow(retrain)
        deployment = prefect.create_deployment(flow, NAME, parameters={"config": config})
        run = prefect.create_flow_run_from_deployment(deployment).id
        for _ in range(2):
            state = run_flow(retrain, flow_run=prefect.read_flow_run(run), return_type="state")
            assert state.is_completed(), state.message
            if len(asked(store, NAME)) == 2:
                break
            # People answer what the judge has left to them, and the batch starts the next round.
            label(project, invited(store, project))
            assert len(start_ready(store)) == 1
            run = next(started for _, _, started in asked(store, NAME) if started)

    # The judge answered in both orders, and was counted apart from people.
    snapshot = project.snapshots.all()[0]
    votes = list(project.snapshots.votes(snapshot.digest))
    machine = [vote for vote in votes if vote.annotator == "judge:rm"]
    assert machine
    assert set(Counter(vote.pair for vote in machine).values()) == {2}
    assert {vote.kind for vote in machine} == {"machine"}
    # Known answers, people and the judge are in the same training, and each has habits but gold.
    client = MlflowClient(tracking_uri=shared_home.mlflow_uri)
    record = Record.open(shared_home)
    version = max(record.store.versions(f"{NAME}-reward"))
    assert version == 2
    run_id = client.get_model_version(f"{NAME}-reward", str(version)).tags["run_id"]
    table = Reader(record).table(client.get_run(run_id), "reward_annotators")
    known = {row["annotator"] for row in table}
    assert {"ada", "bob", "judge:rm"} <= known
    assert "gold" not in known
    assert snapshot.known == 12
    # The queue was put in order by the newest reward model, and what is held out is in no training.
    order = last_order(project)
    assert order is not None
    assert order.model == f"models:/{NAME}-reward/2"
    held_out = {vote.pair for vote in project.judgments.stream() if vote.arm == "hold_out"}
    assert not held_out & {vote.pair for vote in votes}
    store.close()

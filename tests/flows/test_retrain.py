"""Retraining: run when enough preferences are new, else skipped in words."""

import json

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client

from flows.config import PipelineConfig
from flows.retrain import RetrainConfig, retrain
from tasks.steps.new_data import count_preferences

pytestmark = [pytest.mark.integration, pytest.mark.faults]  # some pipelines, one after the other

REVIEWS = [f"Review of the hotel in town {n}:" for n in range(60)]


@pytest.fixture(scope="module")
def votes(tmp_path_factory):
    return tmp_path_factory.mktemp("votes") / "preferences.jsonl"


def write(votes, pairs):
    rows = [
        {"prompt": REVIEWS[n % 60], "chosen": f" good {n}", "rejected": f" bad {n}"}
        for n in range(pairs)
    ]
    votes.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def config(shared_home, tiny, votes):
    content = tiny.model_dump() | {
        "project": "nightly",
        "data": {"source": "files", "preferences": {"path": str(votes)}},
    }
    return PipelineConfig.model_validate(content)


@pytest.fixture(scope="module")
def client(shared_home):
    return MlflowClient(tracking_uri=shared_home.mlflow_uri)


def run(config, needed):
    return retrain(RetrainConfig(pipeline=config, min_new_preferences=needed), return_state=True)


@pytest.fixture(scope="module")
def first(config, votes):
    """The first time all are new, and just enough is enough."""
    write(votes, 90)
    return run(config, 90)


def test_too_few_are_skipped_and_it_is_said_how_many_are_missing(config, votes):
    write(votes, 90)
    state = run(config, 91)
    assert (state.type, state.name) == ("COMPLETED", "Skipped")
    assert state.message == (
        "1 more preferences are needed: 90 of 91 are new (90 now, no earlier run)"
    )
    with get_client(sync_client=True) as prefect:
        assert prefect.read_flow_run(state.state_details.flow_run_id).name == "nightly/retrain#1"


def test_enough_run_the_pipeline_as_a_part_of_the_run(client, first):
    assert first.is_completed()
    result = first.result()
    parent = client.get_run(result.run.run_id)
    assert (parent.info.status, parent.info.run_name) == ("FINISHED", "nightly#1")


def test_afterwards_those_that_came_since_count(client, config, votes, first):
    run_id, experiment = first.result().run.run_id, first.result().run.experiment_id
    # Neither a pipeline that failed nor a single stage is what the count starts from.
    pipeline = {"stage": "pipeline", "output.policy": "models:/nightly-policy/9"}
    failed = client.create_run(experiment, tags=pipeline)
    client.set_terminated(failed.info.run_id, "FAILED")
    stage = client.create_run(experiment, tags={"stage": "pipeline"})
    client.set_terminated(stage.info.run_id, "FINISHED")
    write(votes, 100)
    state = run(config, 11)
    assert state.name == "Skipped"
    assert state.message == (
        "1 more preferences are needed: 10 of 11 are new (100 now, 90 at nightly#1)"
    )
    assert client.get_run(run_id).info.status == "FINISHED"


def test_rows_that_are_dropped_do_not_count(config, votes, first):
    write(votes, 95)
    votes.write_text(votes.read_text() + votes.read_text())  # each pair twice
    found = count_preferences.fn(
        config.data, config.model, config.length_limits, project="nightly", seed=config.seed
    )
    assert (found.now, found.before, found.new) == (95, 90, 5)

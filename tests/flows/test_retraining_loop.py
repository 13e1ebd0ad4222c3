"""From people's votes to a new champion, to the next batch, and to a documented refusal: by itself.

A worker is played by this process, as in test_people_judge.py; in tests/flows/long there is a real
one, and processes are killed.
"""

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.flow_engine import run_flow
from pydantic import ValidationError

from flows.feedback import feedback
from flows.retrain import RetrainConfig, retrain
from tasks.feedback.asking.starting import start_ready
from tasks.feedback.store.store import Store
from tasks.record import tags
from tests.flows.people import invited, label
from tests.flows.rounds import asked, cast, loop

pytestmark = pytest.mark.integration


@pytest.fixture
def store(shared_home):
    opened = Store.open(shared_home)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def prefect(prefect_server):
    with get_client(sync_client=True) as client:
        yield client


def work(prefect, flow_run):
    """What a worker does."""
    return run_flow(retrain, flow_run=prefect.read_flow_run(flow_run), return_type="state")


def test_from_votes_to_a_champion_to_a_refusal_and_to_the_last_round(
    shared_home, tiny, store, prefect
):
    project = store.project("ring", make=True)
    config = RetrainConfig.model_validate(loop(tiny, "ring")).model_dump(mode="json")
    deployment = prefect.create_deployment(
        prefect.create_flow(retrain), "ring", parameters={"config": config}
    )
    cast(project, range(80))

    # 1. Somebody, or a schedule, starts it. There was no champion.
    first = prefect.create_flow_run_from_deployment(deployment).id
    assert work(prefect, first).is_completed()
    mlflow = MlflowClient(tracking_uri=shared_home.mlflow_uri)
    assert int(mlflow.get_model_version_by_alias("ring-policy", "champion").version) == 1
    ((batch, about, _),) = asked(store, "ring")
    assert (about["round"], about["by"]) == (1, str(first))
    assert about["policy"] == "models:/ring-policy/1"
    assert start_ready(store) == []

    # 2. People answer, and nobody else does anything.
    cast(project, range(80, 90))
    ada = invited(store, project)
    votes = label(project, ada)
    assert 0 < len(votes) <= 6
    assert len(start_ready(store)) == 1
    assert start_ready(store) == []
    second = next(run for _, _, run in asked(store, "ring") if run)
    assert prefect.read_flow_run(second).tags == [f"batch:{batch}"]
    assert work(prefect, second).is_completed()

    # 3. It was trained on what they said, and refused, which is said in each place.
    (pipeline,) = mlflow.search_runs(
        [mlflow.get_experiment_by_name("ring").experiment_id],
        f"tags.`{tags.CALLER}` = '{second}'",
    )
    snapshots = project.snapshots.all()
    assert len(snapshots) == 2
    assert snapshots[0].votes == 90 + len(votes)
    assert pipeline.data.tags[tags.SNAPSHOT].endswith(snapshots[0].digest)
    assert pipeline.data.tags["promoted"] == "false"
    assert "champion" in pipeline.data.tags["reasons"]
    assert pipeline.data.tags[tags.ROUND] == "1"
    assert int(mlflow.get_model_version_by_alias("ring-policy", "champion").version) == 1
    page = prefect.read_artifacts(
        artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[second]))
    )
    (text,) = [artifact.data for artifact in page if artifact.key == "ring-round"]
    assert "`models:/ring-policy/2` was refused: " in text

    # 4. The loop has run as often as it may, and says how to go on.
    assert len(asked(store, "ring")) == 1
    why = "round 1 was the last of 1 (`rounds`); `rlhf ask ring --then retrain/ring` begins anew"
    assert why in text
    assert why in pipeline.data.tags[tags.NEXT]

    # 5. A person begins anew: answers of the champion, and too few votes for a training. Another
    # batch would follow if the rounds were not over.
    again = feedback({"project": "ring", "prompts": 3, "seed": 5, "then": "retrain/ring"})
    assert {n: a for n, a, _ in asked(store, "ring")}[again.batch]["round"] == 1
    label(project, ada)
    assert len(start_ready(store)) == 1
    third = next(run for name, _, run in asked(store, "ring") if name == again.batch)
    state = work(prefect, third)
    assert state.name == "Skipped"
    assert "more preferences are needed" in state.message
    assert "nobody is asked: round 1 was the last of 1" in state.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ask": {"project": "ring", "policy": "models:/ring-policy/1"}}, "leave policy"),
        ({"ask": {"project": "else", "then": "retrain/ring"}}, "data.preferences.store to else"),
        ({"ask": {"then": "ring"}}, "should match pattern"),
        ({"rounds": 0}, "greater than or equal to 1"),
    ],
)
def test_a_loop_that_could_not_go_round_is_refused(tiny, changes, said):
    with pytest.raises(ValidationError, match=said):
        RetrainConfig.model_validate(loop(tiny, "ring", **changes))


def test_a_loop_on_one_snapshot_is_refused(tiny):
    content = loop(tiny, "ring")
    content["pipeline"]["data"]["preferences"]["snapshot"] = "ab" * 32
    with pytest.raises(ValidationError, match="in which nothing is ever new: set it to latest"):
        RetrainConfig.model_validate(content)

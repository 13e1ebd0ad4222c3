"""People judge: a run of a deployment is suspended, and goes on when they have voted.

A worker is played by this process, which runs the flow of a flow run as a worker's child does; in
tests/flows/long there is a real one.
"""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow

from flows import stages
from flows.config import PipelineConfig
from flows.rlhf import rlhf
from rlhf_core.errors import VerdictsPendingError
from tasks.feedback.asking import batches
from tasks.feedback.asking.waiting import resume_ready
from tasks.feedback.store.store import Store
from tasks.record import tags
from tests.flows.people import invited, label

pytestmark = pytest.mark.integration

LENIENT = {
    "min_win_rate": 0.0,
    "max_kl": 1e6,
    "max_length_ratio": 1e3,
    "max_sign_excess": 1.0,
    "min_reward_accuracy": 0.0,
}


@pytest.fixture(scope="module")
def config(tiny):
    def make(project, **changes):
        content = tiny.model_dump(mode="json")
        settings = {
            "project": project,
            "judge": {"source": "people"},
            "promotion": LENIENT,
            "evaluation": {"prompts": 4, "base": False},
            **changes,
        }
        for section, values in settings.items():
            content[section] = values if isinstance(values, str) else {**content[section], **values}
        return PipelineConfig.model_validate(content)

    return make


@pytest.fixture(scope="module")
def judged(config):
    return config("panel")


@pytest.fixture(scope="module")
def client(shared_home):
    return MlflowClient(tracking_uri=shared_home.mlflow_uri)


@pytest.fixture
def store(shared_home):
    opened = Store.open(shared_home)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def prefect(prefect_server):
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def deployment(prefect):
    return prefect.create_deployment(prefect.create_flow(rlhf), name="people")


def work(prefect, flow_run):
    """What a worker does; None when the run is suspended."""
    try:
        return run_flow(rlhf, flow_run=prefect.read_flow_run(flow_run))
    except Pause:
        return None


def waiting_runs(client, project):
    experiment = client.get_experiment_by_name(project).experiment_id
    runs = client.search_runs([experiment], f"tags.`{tags.WAITS_FOR}` LIKE '%'")
    return {run.data.tags["stage"]: run for run in runs}


def test_a_run_waits_without_a_process_and_goes_on_by_itself(
    shared_home, judged, client, store, prefect, deployment
):
    parameters = {"config": judged.model_dump(mode="json")}
    flow_run = prefect.create_flow_run_from_deployment(deployment, parameters=parameters).id
    assert work(prefect, flow_run) is None
    assert prefect.read_flow_run(flow_run).state.name == "Suspended"

    # Where people look: MLflow, with the number of pairs and the page.
    waits = waiting_runs(client, "panel")
    assert waits.keys() == {"pipeline", "evaluation"}
    for run in waits.values():
        assert run.info.status == "SCHEDULED"
        assert "error" not in run.data.tags
        assert "pairs wait for people at http://127.0.0.1:4300" in run.data.tags[tags.WAITS_FOR]

    project = store.project("panel")
    ada = invited(store, project)
    assert resume_ready(store, shared_home) == []
    half = label(project, ada, most=3)
    assert resume_ready(store, shared_home) == []

    # Another machine has nothing but MLflow and the store.
    shutil.rmtree(shared_home.home / "work")
    before = {t.prompt: (t.left, t.right) for t in half}
    rest = label(project, ada)
    assert before
    assert rest
    assert resume_ready(store, shared_home) == [str(flow_run)]
    assert resume_ready(store, shared_home) == []
    result = work(prefect, flow_run)

    assert prefect.read_flow_run(flow_run).state.is_completed()
    assert waiting_runs(client, "panel") == {}
    assert label(project, ada) == []  # nobody was asked again
    over_sft = result.scorecard.comparison("policy", "sft")
    assert over_sft.judge == "people"
    assert over_sft.unanswered == 0
    assert over_sft.wins + over_sft.ties + over_sft.losses == 4
    assert result.scorecard.judge.name == "people"
    assert result.scorecard.judge.canaries == ()
    # Each verdict by hand: the longer answer.
    run = client.search_runs(
        [result.run.experiment_id],
        f"tags.stage = 'evaluation' and tags.`mlflow.parentRunId` = '{result.run.run_id}'",
    )
    assert len(run) == 1  # the one that waited
    table = json.loads(_artifact(client, run[0], "tables/evaluation_verdicts.json"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len(rows) >= 8
    for row in rows:
        a, b = len(row["answer_a"]), len(row["answer_b"])
        assert row["winner"] == ("tie" if a == b else "a" if a > b else "b")


def _artifact(client, run, path):
    return Path(client.download_artifacts(run.info.run_id, path)).read_text(encoding="utf-8")


def test_a_command_ends_with_where_to_label_and_goes_on_when_it_is_repeated(
    shared_home, judged, client, store
):
    """On the models of the run above, by the flow of the single stage."""
    form = stages.evaluation.fn.__annotations__["config"]
    chosen = form.model_validate(
        {
            "project": "panel",
            "seed": 7,
            "policy": "models:/panel-policy/1",
            "sampling": judged.sampling,
            "judge": {"source": "people", "people": {"project": "counter", "votes_per_pair": 2}},
            "evaluation": judged.evaluation,
        }
    )
    said = []
    for _ in range(2):
        with pytest.raises(VerdictsPendingError) as waits:
            stages.evaluation(chosen)
        said.append(str(waits.value))
    assert said[0] == said[1]
    assert "pairs wait for people at http://127.0.0.1:4300 (project counter, batch" in said[0]
    project = store.project("counter")
    label(project, invited(store, project))
    with pytest.raises(VerdictsPendingError):
        stages.evaluation(chosen)  # two have to say it
    label(project, invited(store, project, "Bea"))
    scorecard = stages.evaluation(chosen)
    assert scorecard.judge.unanswered == 0
    assert scorecard.judge.agreement.value == 1.0
    (run,) = client.search_runs(
        [client.get_experiment_by_name("panel").experiment_id],
        "tags.stage = 'pipeline' and params.seed = '7'",
    )
    assert run.info.status == "FINISHED"
    assert run.data.tags["resumed"] == "3"
    assert tags.WAITS_FOR not in run.data.tags


@pytest.mark.faults  # a pipeline for each round
def test_people_decide_a_tournament_round_by_round(shared_home, config, store):
    chosen = config(
        "cup",
        ppo={"iterations": 2, "keep_every": 1},
        tournament={"checkpoints": 2, "prompts": 24, "samples_per_prompt": 1, "verdicts": 60},
        evaluation={"prompts": 2, "base": False},
    )
    rounds = []
    result = None
    project = ada = None
    while result is None:
        try:
            result = rlhf(chosen)
        except VerdictsPendingError as pending:
            rounds.append(pending.batch)
            project = project or store.project("cup")
            ada = ada or invited(store, project)
            label(project, ada)
        assert len(set(rounds)) == len(rounds)  # or it would wait for ever
    contest = [name for name in rounds if name.startswith("tournament-")]
    assert len(contest) >= 2
    assert [name.rpartition("-")[2] for name in contest] == [
        str(n) for n in range(1, len(contest) + 1)
    ]
    assert result.tournament.unanswered == 0
    assert result.tournament.judge == "people"
    assert batches.waiting(store.database) == []

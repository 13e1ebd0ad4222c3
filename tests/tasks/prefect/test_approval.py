"""A promotion that waits for a person: in Prefect, for days, without a process; or on the command
line. Every run here is one of a deployment, and the last test has a worker of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from approval_flow import approval
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from prefect.flow_runs import resume_flow_run
from prefect.settings import PREFECT_API_URL
from prefect.workers.process import ProcessWorker
from pydantic import ValidationError
from safetensors.torch import save_file

from rlhf_core.errors import UserError
from rlhf_core.promotion.decision import Decision
from rlhf_core.settings.promotion import PromotionConfig
from tasks.prefect.approval import Answer
from tasks.record.describe import ensure_experiment
from tasks.registry.model_store import MlflowModelStore
from tasks.registry.refs import ModelRef
from tasks.settings import Settings, read_settings
from tasks.steps.promotion import promote_run, roll_back

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent
PERSON = {"approval": "person"}
YES = {"approve": "yes", "by": "Ada", "reason": "reads well"}
NO = {"approve": "no", "by": "Ada", "reason": "flatters"}
LIMIT = 240.0  # s, of which a quiet machine needs a few


@pytest.fixture(scope="module")
def settings(shared_home):
    """One home for the module; each test has versions of its own."""
    return shared_home


@pytest.fixture(scope="module")
def client(settings):
    return MlflowClient(tracking_uri=settings.mlflow_uri)


@pytest.fixture(scope="module")
def store(client):
    return MlflowModelStore(client)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights")
    save_file({"w": torch.zeros(1)}, directory / "model.safetensors")
    return directory


@pytest.fixture
def new_version(client, store, settings, weights):
    """A function that registers one more `toy-policy`."""
    experiment = ensure_experiment(client, "toy", settings)

    def publish() -> ModelRef:
        run_id = client.create_run(experiment).info.run_id
        return store.publish(weights, "toy-policy", run_id=run_id, tags={})

    return publish


@pytest.fixture(scope="module")
def prefect(prefect_server):
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def deployment(prefect):
    prefect.create_work_pool(
        WorkPoolCreate(
            name="approvals",
            type="process",
            base_job_template=ProcessWorker.get_default_base_job_template(),
        )
    )
    return prefect.create_deployment(
        prefect.create_flow(approval),
        name="approval",
        work_pool_name="approvals",
        entrypoint=f"{HERE / 'approval_flow.py'}:approval",
        paused=False,
    )


@pytest.fixture
def trigger(prefect, deployment):
    """A function that makes a flow run of the deployment; no worker takes it up by itself."""

    def create(version, config=PERSON, **more):
        parameters = {"config": config, "version": version, **more}
        return prefect.create_flow_run_from_deployment(deployment, parameters=parameters).id

    return create


@pytest.fixture
def work(prefect):
    """A function that does in this process what a worker does; None when the run is suspended."""

    def run(flow_run):
        found = prefect.read_flow_run(flow_run)
        try:
            return run_flow(approval, flow_run=found)
        except Pause:
            return None

    return run


@pytest.fixture
def state(prefect):
    return lambda flow_run: prefect.read_flow_run(flow_run).state


def pipeline_run(client, flow_run):
    (found,) = client.search_runs(
        [client.get_experiment_by_name("toy").experiment_id],
        f"tags.stage = 'pipeline' and tags.`prefect.flow_run_id` = '{flow_run}'",
    )
    return found


def answered(tags):
    return {name: tags.get(name) for name in ("approved", "approved_by", "approval_reason")}


# ---- in Prefect ----


def test_the_form_shows_every_rule_and_leads_to_mlflow(prefect, client, new_version, trigger, work):
    candidate = new_version()
    flow_run = trigger(candidate.version)
    assert work(flow_run) is None
    keys = prefect.read_flow_run(flow_run).state.state_details.run_input_keyset
    text, schema = (
        prefect.request(
            "GET", "/flow_runs/{id}/input/{key}", path_params={"id": flow_run, "key": keys[part]}
        ).text
        for part in ("description", "schema")
    )
    waiting = pipeline_run(client, flow_run)
    for words in (
        candidate.uri,
        "| pass | win rate over sft | 0.800 [0.610, 0.900] by true_reward, from 1 answer to each "
        "of 10 held-out prompts<br>"
        "the lower bound must exceed 0.5 |",
        "| pass | KL to SFT | 4.00 nats per sequence<br>at most 20.00 |",
        "| pass | length | 20.00 tokens<br>at most 40.00 |",
        "| pass | distinct-2 | 0.800<br>at least 0.080 |",
        f"/runs/{waiting.info.run_id}?workflowType=machine_learning)",
    ):
        assert words in text
    assert '"minLength":1' in schema.replace('": ', '":')
    assert waiting.info.status == "SCHEDULED"  # and not RUNNING for a week
    assert "error" not in waiting.data.tags


def test_a_yes_promotes_and_is_written_down(client, store, new_version, trigger, work, state):
    candidate = new_version()
    flow_run = trigger(candidate.version)
    assert work(flow_run) is None
    assert state(flow_run).name == "Suspended"
    assert store.get_alias("toy-policy", "champion") != candidate
    resume_flow_run(flow_run, run_input=YES)
    decision = work(flow_run)
    assert decision.promote
    assert decision.reasons[-1] == "pass: approved by Ada: reads well"
    assert state(flow_run).is_completed()
    assert store.get_alias("toy-policy", "champion") == candidate
    run = pipeline_run(client, flow_run)  # one, though the flow has run twice
    promotion = client.search_runs(
        [run.info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{run.info.run_id}' and tags.stage = 'promotion'",
    )
    assert run.info.status == "FINISHED"
    assert len(promotion) == 1
    for tags in (run.data.tags, promotion[0].data.tags, store.tags(candidate)):
        assert answered(tags) == {
            "approved": "true",
            "approved_by": "Ada",
            "approval_reason": "reads well",
        }
        assert tags["approved_at"].endswith("+00:00")
    assert run.data.tags["promoted"] == "true"


def test_a_no_is_a_result(client, store, new_version, trigger, work, state):
    before = store.get_alias("toy-policy", "champion")
    candidate = new_version()
    flow_run = trigger(candidate.version)
    work(flow_run)
    resume_flow_run(flow_run, run_input=NO)
    decision = work(flow_run)
    assert not decision.promote
    assert decision.reasons[-1] == "FAIL: not approved by Ada: flatters"
    assert state(flow_run).is_completed()
    assert store.get_alias("toy-policy", "champion") == before
    for tags in (pipeline_run(client, flow_run).data.tags, store.tags(candidate)):
        assert answered(tags) == {
            "approved": "false",
            "approved_by": "Ada",
            "approval_reason": "flatters",
        }


def test_a_champion_that_changed_meanwhile_is_not_overruled_by_a_yes(
    store, new_version, trigger, work
):
    candidate, rival = new_version(), new_version()
    flow_run = trigger(candidate.version)
    work(flow_run)
    before = store.get_alias("toy-policy", "champion")
    store.set_alias(rival, "champion")
    resume_flow_run(flow_run, run_input=YES)
    decision = work(flow_run)
    assert not decision.promote
    assert decision.reasons[-2:] == (
        "pass: approved by Ada: reads well",
        f"FAIL: the champion is now {rival.uri}, but the evaluation compared with "
        f"{before.uri if before else 'none'}",
    )
    assert store.get_alias("toy-policy", "champion") == rival


def test_what_is_no_answer_is_refused_by_the_form(prefect, new_version, trigger, work, state):
    flow_run = trigger(new_version().version)
    work(flow_run)
    for bad in (
        {},
        {"approve": "maybe", "by": "Ada"},
        {"approve": "yes"},
        {"approve": "yes", "by": ""},
        {"approve": "yes", "by": "Ada", "reason": "x" * 2001},
        {**YES, "whim": 1},
    ):
        response = prefect.request(
            "POST", "/flow_runs/{id}/resume", path_params={"id": flow_run}, json={"run_input": bad}
        )
        assert response.status_code == 200  # which says nothing
        assert response.json()["status"] == "REJECT"
        assert state(flow_run).name == "Suspended"


def test_an_answer_that_the_form_let_through_is_asked_for_again(
    prefect, client, new_version, trigger, work, state
):
    flow_run = trigger(new_version().version)
    work(flow_run)
    # As from a form that knows no bounds.
    keys = prefect.read_flow_run(flow_run).state.state_details.run_input_keyset
    lax = prefect.request(
        "DELETE", "/flow_runs/{id}/input/{key}", path_params={"id": flow_run, "key": keys["schema"]}
    )
    assert lax.status_code == 204
    prefect.create_flow_run_input(flow_run, key=keys["schema"], value="{}")
    resume_flow_run(flow_run, run_input={"approve": "yes", "by": "   "})
    assert work(flow_run) is None
    assert state(flow_run).name == "Suspended"
    again = prefect.read_flow_run(flow_run).state.state_details.run_input_keyset
    assert again != keys
    text = prefect.request(
        "GET",
        "/flow_runs/{id}/input/{key}",
        path_params={"id": flow_run, "key": again["description"]},
    ).text
    assert "was invalid: by: " in text
    resume_flow_run(flow_run, run_input=YES)
    assert work(flow_run).reasons[-1] == "pass: approved by Ada: reads well"


def test_a_run_that_nobody_answers_fails_and_can_still_be_promoted(
    prefect, client, store, new_version, trigger, work, state
):
    candidate = new_version()
    flow_run = trigger(candidate.version, {**PERSON, "approval_days": 1e-9})
    work(flow_run)
    time.sleep(1.1)
    response = prefect.resume_flow_run(flow_run, run_input=YES)
    assert response.status == "REJECT"
    assert state(flow_run).is_failed()
    name = pipeline_run(client, flow_run).info.run_id
    said = promote_run(name, by="Ada", reason="late", settings=with_prefect())
    assert said == f"{candidate.uri} is the champion."
    assert store.get_alias("toy-policy", "champion") == candidate
    assert answered(store.tags(candidate))["approval_reason"] == "late"


def test_an_answer_counts_though_the_policy_came_into_use_meanwhile(
    store, new_version, trigger, work
):
    """As after a crash between the promotion and the end of its run."""
    candidate = new_version()
    flow_run = trigger(candidate.version)
    work(flow_run)
    store.set_alias(candidate, "champion")
    resume_flow_run(flow_run, run_input=YES)
    decision = work(flow_run)
    assert decision.promote
    assert decision.reasons[-1] == "pass: approved by Ada: reads well"
    assert answered(store.tags(candidate))["approved"] == "true"


def test_rules_that_refuse_ask_nobody(new_version, trigger, work):
    decision = work(trigger(new_version().version, kl=21.0))
    assert not decision.promote
    assert decision.reasons[1].startswith("FAIL: KL to SFT 21.00")


def test_nobody_is_asked_unless_the_config_says_so(store, new_version, trigger, work):
    candidate = new_version()
    decision = work(trigger(candidate.version, {}))
    assert decision.promote
    assert not any("approved" in reason for reason in decision.reasons)
    assert store.get_alias("toy-policy", "champion") == candidate


# ---- on the command line ----


def with_prefect() -> Settings:
    """The settings of a command that knows the server."""
    return read_settings().model_copy(update={"prefect_api_url": PREFECT_API_URL.value()})


def stored(client, run, folder):
    """The decision as it lies with a pipeline run."""
    path = client.download_artifacts(run.info.run_id, "decision.json", str(folder))
    return Decision.model_validate_json(Path(path).read_text(encoding="utf-8"))


def newest_pipeline(client):
    experiment = client.get_experiment_by_name("toy").experiment_id
    return client.search_runs([experiment], "tags.stage = 'pipeline'")[0]


def test_the_decision_is_kept_with_its_rules_its_look_and_the_answer(
    client, store, new_version, tmp_path
):
    candidate = new_version()
    approval(PromotionConfig(**PERSON), candidate.version)
    run = newest_pipeline(client)
    waiting = stored(client, run, tmp_path)
    assert not waiting.promote
    assert waiting.candidate == candidate.uri
    assert waiting.digests[candidate.uri] == store.tags(candidate)["digest"]
    assert waiting.runs["pipeline"] == run.info.run_id
    assert (waiting.look.number, waiting.look.alpha) == (1, 0.025)
    rules = {rule.name: rule for rule in waiting.rules}
    assert rules["win rate over sft"].passed
    assert rules["files of the candidate"].passed
    assert rules["outcome"].measured.startswith("it waits for approval")
    assert store.tags(candidate)["gate.promoted"] == "false"
    promote_run(run.info.run_id, by="Bo", reason="", settings=read_settings())
    done = stored(client, run, tmp_path)
    assert done.promote
    assert done.reasons[-1] == "pass: approved by Bo"
    assert store.tags(candidate)["gate.promoted"] == "true"
    assert "decision.md" in [found.path for found in client.list_artifacts(run.info.run_id)]


def test_a_run_without_a_worker_ends_and_waits_for_the_command(client, store, new_version):
    before = store.get_alias("toy-policy", "champion")
    candidate = new_version()
    decision = approval(PromotionConfig(**PERSON), candidate.version)
    assert not decision.promote
    said, _, name = decision.reasons[-1].rpartition(" ")
    assert said == "FAIL: it waits for approval: rlhf promote"
    assert store.get_alias("toy-policy", "champion") == before
    assert promote_run(name, by="Bo", reason="", settings=read_settings()) == (
        f"{candidate.uri} is the champion."
    )
    assert store.get_alias("toy-policy", "champion") == candidate
    tags = store.tags(candidate)
    assert answered(tags) == {"approved": "true", "approved_by": "Bo", "approval_reason": ""}
    assert tags["replaced"] == (before.uri if before else "none")
    with pytest.raises(UserError, match="does not wait for approval"):
        promote_run(name, by="Bo", reason="", settings=read_settings())


def test_the_command_answers_a_run_that_is_suspended(client, new_version, trigger, work):
    flow_run = trigger(new_version().version)
    work(flow_run)
    name = pipeline_run(client, flow_run).info.run_id
    said = promote_run(name, by="Bo", reason="fine", settings=with_prefect())
    assert said.endswith("received the approval and resumes.")
    assert work(flow_run).reasons[-1] == "pass: approved by Bo: fine"


def test_the_command_refuses_a_champion_that_changed_and_a_name_that_is_none(store, new_version):
    candidate, rival = new_version(), new_version()
    decision = approval(PromotionConfig(**PERSON), candidate.version)
    name = decision.reasons[-1].split()[-1]
    with pytest.raises(UserError, match="--by"):
        promote_run(name, by=" ", reason="", settings=read_settings())
    store.set_alias(rival, "champion")
    with pytest.raises(UserError, match=f"The champion is now {rival.uri}, but {candidate.uri}"):
        promote_run(name, by="Bo", reason="", settings=read_settings())


def test_the_way_back(store, new_version, settings):
    first, second, third = (new_version() for _ in range(3))
    for version in (first, second, third):
        assert approval(PromotionConfig(), version.version).promote
    assert store.tags(third)["replaced"] == second.uri
    back = [roll_back("toy", to=None, by="Bo", settings=settings) for _ in range(2)]
    assert back == [f"{ref.uri} is the champion." for ref in (second, first)]
    assert store.get_alias("toy-policy", "champion") == first
    assert store.tags(third)["rolled_back_to"] == second.uri
    assert store.tags(third)["rolled_back_by"] == "Bo"
    refused = approval(PromotionConfig(), third.version)
    assert not refused.promote
    assert f"rlhf rollback toy --to {third.version}" in refused.reasons[-1]
    assert roll_back("toy", to=third.version, by="Bo", settings=settings)
    assert "rolled_back_at" not in store.tags(third)
    for to, said in ((third.version, "is already the champion"), (999, "there is no")):
        with pytest.raises(UserError, match=said):
            roll_back("toy", to=to, by="Bo", settings=settings)
    with pytest.raises(UserError, match="has no champion"):
        roll_back("nobody", to=None, by="Bo", settings=settings)


def test_a_run_that_is_done_again_finds_its_policy_in_use(
    client, store, new_version, trigger, work
):
    first, second = new_version(), new_version()
    for version in (first, second, second):
        assert approval(PromotionConfig(), version.version).promote
    experiment = client.get_experiment_by_name("toy").experiment_id
    newest = client.search_runs([experiment], "tags.stage = 'pipeline'")[0]
    assert newest.data.tags["compared_with"] == first.uri  # and not with itself
    assert work(trigger(second.version)).promote  # nobody is asked again
    assert store.get_alias("toy-policy", "champion") == second
    assert store.tags(second)["replaced"] == first.uri


def test_an_answer_needs_a_name():
    with pytest.raises(ValidationError):
        Answer(approve="yes", by=" ")


# ---- with a worker ----


def wait_for(what, then):
    deadline = time.monotonic() + LIMIT
    while not (found := what()):
        assert time.monotonic() < deadline, then()
        time.sleep(0.3)
    return found


@pytest.mark.faults
def test_no_process_waits_and_a_worker_takes_the_run_up_again(
    prefect, client, store, settings, new_version, trigger, state, tmp_path
):
    command = ("worker", "start", "--pool", "approvals", "--type", "process", "--name", "w")
    environment = {
        **os.environ,
        **settings.environment(),
        "PREFECT_API_URL": PREFECT_API_URL.value(),
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "OMP_NUM_THREADS": "1",
    }
    candidate = new_version()
    flow_run = trigger(candidate.version)
    log = tmp_path / "worker.log"
    with log.open("w") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "prefect", *command],
            env=environment,
            stdout=output,
            stderr=output,
        )
        try:
            wait_for(lambda: state(flow_run).name == "Suspended", log.read_text)
            wait_for(lambda: not children_of(worker.pid), log.read_text)
            resume_flow_run(flow_run, run_input=YES)
            wait_for(lambda: state(flow_run).is_final(), log.read_text)
        finally:
            worker.terminate()
            worker.wait(timeout=30)
    assert state(flow_run).is_completed(), log.read_text()
    assert store.get_alias("toy-policy", "champion") == candidate
    assert answered(pipeline_run(client, flow_run).data.tags)["approved_by"] == "Ada"


def children_of(pid):
    return [child for child in psutil.Process(pid).children() if child.is_running()]

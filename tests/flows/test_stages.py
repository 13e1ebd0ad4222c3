"""Each stage as a flow of its own: what it takes from the registry, and what it refuses."""

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import AwaitingRetry

from flows import stages
from rlhf_core.errors import DataError, ModelError
from tasks.registry.champion import CHAMPION
from tasks.registry.model_store import MlflowModelStore

pytestmark = [pytest.mark.integration, pytest.mark.faults]  # some pipelines, one after the other

NOBODY = "0" * 32


@pytest.fixture(scope="module")
def client(shared_home):
    return MlflowClient(tracking_uri=shared_home.mlflow_uri)


@pytest.fixture(scope="module")
def store(client):
    return MlflowModelStore(client)


@pytest.fixture(scope="module")
def sft(shared_home, tiny):
    config = tiny.sft.model_copy(update={"epochs": 1})
    return stages.sft(
        stages.SFTFlowConfig(project="tiny", model=tiny.model, data=tiny.data, sft=config)
    )


@pytest.fixture(scope="module")
def reward(sft, tiny):
    return stages.reward_model(
        stages.RewardModelFlowConfig(
            project="tiny", sft=sft.uri, sampling=tiny.sampling, reward_model=tiny.reward_model
        )
    )


@pytest.fixture(scope="module")
def policy(reward, tiny):
    return stages.policy(
        stages.PolicyFlowConfig(
            project="tiny", reward_model=reward.uri, sampling=tiny.sampling, ppo=tiny.ppo
        )
    ).policy


def made_by(store, client, ref):
    return client.get_run(store.tags(ref)["run_id"])


def test_a_chain_of_single_stages_is_the_lineage_of_a_pipeline(store, client, sft, reward, policy):
    assert store.tags(reward)["parent.sft"] == sft.uri
    assert store.tags(policy)["parent.sft"] == sft.uri
    assert store.tags(policy)["parent.reward"] == reward.uri
    # Data that nobody has named are those that the SFT policy learnt from.
    sources = {made_by(store, client, ref).data.tags["input.data"] for ref in (sft, reward, policy)}
    assert len(sources) == 1


def test_each_has_a_run_around_it_whose_name_says_what_ran(store, client, sft, reward, policy):
    parents = [made_by(store, client, ref).data.tags["mlflow.parentRunId"] for ref in (sft, reward)]
    runs = [client.get_run(run_id) for run_id in parents]
    assert [run.info.run_name for run in runs] == ["tiny/sft#1", "tiny/reward-model#1"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert runs[1].data.params["sft"] == sft.uri


def test_new_data_for_a_model_that_is_there(store, client, sft, reward, tiny):
    data = stages.prepare(
        stages.PrepareFlowConfig(
            project="tiny", seed=1, model=tiny.model, data=tiny.data, lengths=tiny.length_limits
        )
    )
    other = stages.reward_model(
        stages.RewardModelFlowConfig(
            project="tiny",
            sft=sft.uri,
            data=data.uri,
            sampling=tiny.sampling,
            reward_model=tiny.reward_model,
        )
    )
    assert (other.name, other.version) == (reward.name, reward.version + 1)
    assert store.tags(other)["data_digest"] == data.digest != store.tags(reward)["data_digest"]


def test_a_policy_is_judged_by_what_it_was_made_from(store, policy, tiny):
    def judge(address):
        return stages.evaluation(
            stages.EvaluationFlowConfig(
                project="tiny", policy=address, sampling=tiny.sampling, evaluation=tiny.evaluation
            )
        )

    card = judge(policy.uri)
    assert [arm.name for arm in card.arms] == ["base", "sft", "policy", "best_of_n"]
    store.set_alias(policy, CHAMPION)
    # The champion against itself says nothing: the same arms, and the same numbers to the bit.
    assert judge(f"models:/{policy.name}@{CHAMPION}") == card


def test_a_registered_reward_model_is_examined_on_the_votes_it_was_trained_with(
    store, client, sft, reward, tiny
):
    def examine():
        card = tiny.examination.model_copy(update={"samples": 8})  # texts are cut as in training
        return stages.report_card(
            stages.ReportCardFlowConfig(
                project="tiny", reward_model=reward.uri, sampling=tiny.sampling, report_card=card
            )
        )

    card = examine()
    trained = made_by(store, client, reward).data
    assert card.accuracy.share.value == pytest.approx(trained.metrics["summary/accuracy"])
    tags = store.tags(reward)
    assert tags["report_card.accuracy"] == str(card.accuracy)
    assert examine() == card
    condition = "tags.stage = 'report_card'"
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], condition)
    assert ["cached_from" in run.data.tags for run in runs] == [True, False]  # newest first
    assert runs[1].data.tags["input.data"] == trained.tags["input.data"]
    assert runs[1].data.tags["input.sft"] == sft.uri


def test_what_is_not_registered_is_said_before_a_run_is_opened(client, sft, tiny):
    def refused(error, said, **given):
        before = len(client.search_runs(["1"]))
        config = {"project": "tiny", "sft": sft.uri, "sampling": tiny.sampling, **given}
        with pytest.raises(error, match=said):
            stages.reward_model(stages.RewardModelFlowConfig.model_validate(config))
        assert len(client.search_runs(["1"])) == before

    refused(ModelError, "has the versions 1", sft="models:/tiny-sft/99")
    refused(DataError, f"there is no MLflow run {NOBODY}", data=f"runs:/{NOBODY}/data")
    sft_run = MlflowModelStore(client).tags(sft)["run_id"]
    refused(DataError, "has no prepared data", data=f"runs:/{sft_run}/data")


def test_a_model_without_a_parent_needs_one_named(sft, tiny):
    with pytest.raises(ModelError, match=f"{sft.uri} was made from no sft model: name one"):
        stages.policy(
            stages.PolicyFlowConfig(project="tiny", reward_model=sft.uri, sampling=tiny.sampling)
        )


def test_a_run_that_goes_on_keeps_its_name(shared_home, tiny):
    config = stages.RewardModelFlowConfig(
        project="again", sft="models:/again-sft/1", sampling=tiny.sampling
    )
    run_id = stages.reward_model(config, return_state=True).state_details.flow_run_id
    with get_client(sync_client=True) as prefect:
        prefect.set_flow_run_state(run_id, AwaitingRetry(), force=True)
        again = prefect.read_flow_run(run_id)
        run_flow(stages.reward_model, again, {"config": config}, return_type="state")
        found = prefect.read_flow_run(run_id)
    assert (found.name, found.run_count) == ("again/reward-model#1", 2)

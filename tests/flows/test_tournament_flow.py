"""A pipeline with a tournament: an early policy is the best, is registered and promoted."""

import pytest
from mlflow import MlflowClient

from flows import stages
from flows.config import PipelineConfig
from flows.rlhf import rlhf
from rlhf_core.digests import tree_digest
from rlhf_core.errors import ModelError
from rlhf_core.stages import tournament
from tasks.registry.champion import CHAMPION
from tasks.registry.model_store import MlflowModelStore
from tasks.registry.refs import ModelRef
from tasks.registry.registered import find_parent

pytestmark = pytest.mark.integration

SETTINGS = {
    "project": "cup",
    "ppo": {"iterations": 4, "rollout_size": 8, "batch_size": 4, "learning_rate": 1e-3},
    "tournament": {"checkpoints": 4, "prompts": 12, "samples_per_prompt": 1, "verdicts": 200},
    "judge": {"source": f"{__name__}:favours_the_second", "canary_prompts": 1},
    # On so few prompts nothing is shown; what is asked here is next to nothing.
    "promotion": {
        "min_win_rate": 0.0,
        "max_kl": 1e6,
        "max_length_ratio": 1e3,
        "max_sign_excess": 1.0,
        "min_reward_accuracy": 0.0,
    },
}
written = {}  # the texts of each entrant


def favours_the_second(prompts, ones, others):
    """A judge for this test: the answers of the second iteration win."""
    best = written["tournament/milestone.2"]
    pairs = zip(ones, others, strict=True)
    return [
        "tie" if (one in best) == (other in best) else "a" if one in best else "b"
        for one, other in pairs
    ]


def config(tiny, **changes):
    content = tiny.model_dump(mode="json")
    for section, values in {**SETTINGS, **changes}.items():
        content[section] = values if isinstance(values, str) else {**content[section], **values}
    return PipelineConfig.model_validate(content)


@pytest.fixture(scope="module")
def client(shared_home):
    return MlflowClient(tracking_uri=shared_home.mlflow_uri)


@pytest.fixture(scope="module")
def store(client):
    return MlflowModelStore(client)


@pytest.fixture(scope="module", autouse=True)
def _remember_what_is_written():
    answer = tournament.answer

    def remembering(bench, name, *arguments):
        found = answer(bench, name, *arguments)
        written[name] = set(found.texts)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tournament, "answer", remembering)
        yield


@pytest.fixture(scope="module")
def first(shared_home, tiny):
    return rlhf(config(tiny))


def children(client, result):
    runs = client.search_runs(
        [result.run.experiment_id], f"tags.`mlflow.parentRunId` = '{result.run.run_id}'"
    )
    return {run.data.tags["stage"]: run for run in runs}


def test_the_early_policy_is_registered_and_promoted(client, store, first, tmp_path):
    assert first.tournament.chosen == "milestone.2"
    stages_ = children(client, first)
    ppo, cup = stages_["ppo"].data.tags, stages_["tournament"].data.tags
    last = ModelRef.parse(ppo["output.policy"])
    milestone = ModelRef.parse(ppo["output.milestone.2"])
    assert cup["input.policy"] == last.uri
    assert cup["output.policy"] == first.policy.uri
    assert first.policy == ModelRef(name="cup-policy", version=last.version + 1)
    fetched = [
        store.fetch(ref, tmp_path / str(n)) for n, ref in enumerate((first.policy, milestone))
    ]
    assert tree_digest(fetched[0], "*.safetensors") == tree_digest(fetched[1], "*.safetensors")
    assert stages_["evaluation"].data.tags["input.policy"] == first.policy.uri
    assert first.decision.promote, first.decision
    assert store.get_alias("cup-policy", CHAMPION) == first.policy


def test_its_tags_say_what_it_is_and_where_it_comes_from(client, store, first):
    tags = store.tags(first.policy)
    milestone = children(client, first)["ppo"].data.tags["output.milestone.2"]
    assert (tags["kind"], tags["iteration"], tags["copy_of"]) == ("policy", "2", milestone)
    parents = {name: uri for name, uri in tags.items() if name.startswith("parent.")}
    assert parents == {"parent.sft": first.sft.uri, "parent.reward": first.reward_model.uri}
    assert tags["run_id"] == children(client, first)["tournament"].info.run_id
    assert tags["pipeline_run_id"] == first.run.run_id
    assert find_parent.fn("", first.policy, "sft") == first.sft


def test_report_page_metrics_and_plan_say_it(client, first, tiny):
    assert first.tournament.sentence() in first.report
    run = children(client, first)["tournament"]
    assert first.tournament.sentence() in run.data.tags["mlflow.note.content"]
    assert run.data.metrics["summary/chosen_iteration"] == 2
    assert run.data.metrics["summary/verdicts"] <= 200
    history = client.get_metric_history(run.info.run_id, "tournament/strength")
    assert sorted(point.step for point in history) == [0, 1, 2, 3, 4]
    files = client.list_artifacts(run.info.run_id, "figures")
    assert [file.path for file in files] == ["figures/tournament_strengths.png"]


def test_the_same_again_is_taken_from_the_registry(client, store, first, tiny):
    versions = store.versions("cup-policy")
    again = rlhf(config(tiny))
    assert store.versions("cup-policy") == versions
    assert (again.policy, again.tournament) == (first.policy, first.tournament)
    source = children(client, first)["tournament"].info.run_id
    assert children(client, again)["tournament"].data.tags["cached_from"] == source
    assert store.get_alias("cup-policy", CHAMPION) == first.policy


def test_a_judge_that_tells_nothing_apart_leaves_the_last(client, store, first, tiny):
    judge = {"source": f"{__name__}:shrugs"}
    result = rlhf(config(tiny, judge=judge))
    ppo = children(client, first)["ppo"].data.tags
    assert result.policy.uri == ppo["output.policy"]  # trained before, and registered then
    assert "output.policy" not in children(client, result)["tournament"].data.tags
    assert "no checkpoint is shown to be stronger than SFT" in result.report


def shrugs(prompts, ones, others):
    """A judge without an opinion."""
    return ["tie"] * len(prompts)


def test_the_flow_of_its_own_finds_the_milestones(client, store, first, tiny):
    last = children(client, first)["ppo"].data.tags["output.policy"]
    shared = config(tiny)
    given = {"project": "cup", "sampling": shared.sampling, "judge": shared.judge}
    settings = shared.contest.model_copy(update={"checkpoints": 0})  # all that are there
    found = stages.tournament(
        stages.TournamentFlowConfig(**given, policy=last, tournament=settings)
    )
    assert found.chosen == "milestone.2"
    newest = ModelRef(name="cup-policy", version=max(store.versions("cup-policy")))
    assert store.tags(newest)["iteration"] == "2"
    with pytest.raises(ModelError, match="kept no milestones: train it with keep_every"):
        stages.tournament(stages.TournamentFlowConfig(**given, policy=first.policy.uri))

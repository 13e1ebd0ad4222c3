"""The whole flow on a problem of seconds: what it registers, tags, reuses, refuses and leaves."""

import json
import logging
import re
import shutil
import socket
import threading
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import uvicorn
from huggingface_hub import ModelCard
from mlflow import MlflowClient
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from transformers import AutoModelForCausalLM

from flows.config import PipelineConfig
from flows.rlhf import rlhf
from rlhf_core.data.prepared import SPLITS, read_table
from rlhf_core.errors import ConfigError, EngineError, ModelError
from rlhf_core.evaluation.card.findings import verdict
from rlhf_core.evaluation.card.gate import RewardQuality
from rlhf_core.settings.promotion import PromotionConfig
from tasks.engines import serve, vllm
from tasks.engines.folder import write_folder
from tasks.lineage.lineage import saw, seen_by
from tasks.record import tags
from tasks.record.record import Record
from tasks.record.run import open_run
from tasks.registry.datasets import fetch_dataset
from tasks.registry.model_store import MlflowModelStore
from tasks.registry.refs import ModelRef
from tasks.serving.export import export_servable
from tasks.serving.generation import generate
from tasks.settings import read_settings
from tasks.steps.policy import train_policy
from tasks.steps.promotion import promote
from tasks.steps.report import render
from tasks.steps.reward_model import check_reward_model
from tests.tasks.judges.model_server import KEY, serving

pytestmark = pytest.mark.integration

SMALL = {"iterations": 2, "rollout_size": 8, "batch_size": 4, "epochs": 1}
TINY = {
    "project": "tiny",
    "data": {
        "simulation": {"prompts": 60, "demonstrations": 160, "preference_pairs": 120},
        "eval_fraction": 0.2,
    },
    "model": {"fresh": {"layers": 1, "width": 32, "heads": 2, "context": 64}},
    "sampling": {"max_prompt_length": 24, "max_new_tokens": 12},
    "sft": {"max_length": 64, "learning_rate": 3e-3},
    "reward_model": {"max_length": 64, "normalization_samples": 16},
    "ppo": SMALL,
    "rloo": SMALL,
    "grpo": SMALL,
    "dpo": {"max_length": 64},
    "evaluation": {
        "prompts": 6,
        "best_of": 2,
        "true_reward": "rlhf_core.simulation:true_reward",
    },
    # Nothing this small is better than SFT; what is asked of it here is that it is not worse.
    "promotion": {
        "min_win_rate": 0.0,
        "max_kl": 1e6,
        "max_length_ratio": 1e3,
        # Six prompts and a dozen held-out votes show neither.
        "max_sign_excess": 1.0,
        "min_reward_accuracy": 0.0,
    },
}
STAGES = ["prepare", "sft", "reward_model", "report_card", "ppo", "evaluation", "promotion"]


def config(algorithm="ppo", **sections):
    content = {**TINY, "algorithm": algorithm}
    for name, changes in sections.items():
        content[name] = {**content.get(name, {}), **changes}
    return PipelineConfig.model_validate(content)


@pytest.fixture(scope="module")
def settings(shared_home):
    """One home for the module: later runs meet what earlier ones registered."""
    return shared_home


@pytest.fixture(scope="module")
def client(settings):
    return MlflowClient(tracking_uri=settings.mlflow_uri)


@pytest.fixture(scope="module")
def store(client):
    return MlflowModelStore(client)


@pytest.fixture(scope="module")
def first(settings):
    return rlhf(config())


def children(client, result):
    runs = client.search_runs(
        [result.run.experiment_id], f"tags.`mlflow.parentRunId` = '{result.run.run_id}'"
    )
    return {run.data.tags["stage"]: run for run in runs}


def test_every_stage_is_a_finished_child_of_one_finished_run(client, first):
    stages = children(client, first)
    assert sorted(stages) == sorted(STAGES)
    assert {run.info.status for run in stages.values()} == {"FINISHED"}
    assert client.get_run(first.run.run_id).info.status == "FINISHED"


def test_the_key_numbers_and_the_report_are_on_the_parent_run(client, first):
    parent = client.get_run(first.run.run_id)
    policy = first.scorecard.arm("policy")
    assert parent.data.metrics["policy/true_reward"] == pytest.approx(policy.true_reward.value)
    assert parent.data.metrics["win_rate/policy_over_sft"] == pytest.approx(
        first.scorecard.comparison("policy", "sft").win_rate.value
    )
    assert parent.data.params["ppo.rollout_size"] == "8"
    assert "report.md" in [file.path for file in client.list_artifacts(first.run.run_id)]
    for words in ("true reward", "| PPO |", first.policy.uri, "rlhf up"):
        assert words in first.report


def test_the_page_of_the_run_is_one_file_with_the_decision(client, first, tmp_path):
    path = client.download_artifacts(first.run.run_id, "report.html", tmp_path)
    page = Path(path).read_text(encoding="utf-8")
    for rule in first.decision.reasons:
        assert rule.partition(": ")[2].split()[0] in page
    for said in (first.policy.uri, "passed every rule and became the champion", "Answers side by"):
        assert said in page
    assert "What this page cannot show" not in page
    # Addresses are those of links to MLflow and Prefect; nothing is fetched.
    ours = {"http://127.0.0.1:5000", "http://127.0.0.1:4200"}
    assert set(re.findall(r'(?:src|href|action)="(https?://[^/"]+)', page)) <= ours
    assert not re.search(r'src="(?!data:)|<script|<link|@import|url\((?!#)', page)
    assert "<svg" in page
    assert len(page) < 3_000_000


def test_prefect_links_the_page(first):
    key = ArtifactFilter(key=ArtifactFilterKey(any_=["tiny-page"]))
    with get_client(sync_client=True) as prefect:
        found = prefect.read_artifacts(artifact_filter=key)
    links = [str(artifact.data) for artifact in found]
    assert any(f"runs/{first.run.run_id}/artifacts/report.html" in link for link in links)


def test_the_policy_has_its_model_card(client, store, first, tmp_path):
    directory = store.fetch(first.policy, tmp_path / "policy")
    card = ModelCard.load(directory / "README.md")
    names = {result.metric_name: result for result in card.data.eval_results}
    rate = first.scorecard.comparison("policy", "sft").win_rate
    assert names["Win rate over SFT"].metric_value == pytest.approx(rate.value, abs=1e-6)
    for part in ("tiny-policy", "## Limits and known doubts", first.sft.uri, "simulated"):
        assert part in card.text
    version = client.get_model_version(first.policy.name, str(first.policy.version))
    assert version.description.startswith(f"**{first.policy.uri} passed every rule")
    assert AutoModelForCausalLM.from_pretrained(directory).config.model_type


def test_what_the_policy_saw_is_known_both_ways_and_on_its_card(first, settings, store, tmp_path):
    record = Record.open(settings)
    data = tmp_path / "data"
    fetch_dataset(record.client, first.data, data)
    train, held_out = (read_table(data, "preferences", split) for split in SPLITS)
    seen = saw(record, first.policy)
    voted = {name: {"votes": n} for name, n in train["annotator"].value_counts().items()}
    assert seen.trained.annotators == voted
    assert seen.trained.sources["simulated"]["votes"] == len(train)
    assert {found.version.ref for found in seen.ancestors} == {first.sft, first.reward_model}
    name = train["annotator"].iloc[0]
    found = {(s.ref, s.relation): s.rows for s in seen_by(record, annotator=name)}
    rows = voted[name]["votes"]
    assert found[first.policy, "trained"] == found[first.reward_model, "trained"] == rows
    held = int((held_out["annotator"] == name).sum())
    assert found.get((first.reward_model, "evaluated"), 0) == held
    assert (first.sft, "trained") not in found
    card = ModelCard.load(store.fetch(first.policy, tmp_path / "policy") / "README.md").text
    assert f"{len(train)} votes" in card.partition("## What it saw")[2]
    assert name not in card.partition("## What it saw")[2].partition("\n## ")[0]


def test_the_first_lines_say_what_the_judges_are_worth(client, first):
    metrics = client.get_run(children(client, first)["reward_model"].info.run_id).data.metrics
    accuracy, low, high, longer, votes, prompts = (
        metrics[f"summary/{name}"]
        for name in (
            "accuracy",
            "accuracy_low",
            "accuracy_high",
            "longer_accuracy",
            "held_out_votes",
            "held_out_prompts",
        )
    )
    title, _, judge, reward, card, diagnosis, *_ = first.report.splitlines()
    assert title.startswith("# tiny, seed 0: models:/tiny-policy/")
    assert judge == "- Decision: by true_reward, from 2 answers to each of 6 held-out prompts."
    assert reward.startswith(
        f"- Reward model `{first.reward_model.uri}`: held-out accuracy {accuracy:.3f} [{low:.3f}, "
        f'{high:.3f}] over {votes:.0f} votes on {prompts:.0f} prompts; the rule "prefer the '
        f'longer" has {longer:.3f}.'
    )
    assert reward.endswith(first.report_card.quality.doubts)
    page = "`report_card.md` of the stage report_card"
    assert card == f"- Report card: {verdict(first.report_card)} Its page is {page}."
    assert diagnosis == f"- Diagnosis: {first.scorecard.diagnosis.says}"
    parent = client.get_run(first.run.run_id).data
    assert parent.metrics["reward_model/accuracy"] == pytest.approx(accuracy)
    assert parent.metrics["reward_model/accuracy_low"] == pytest.approx(low)
    assert parent.metrics["reward_model/longer_accuracy"] == pytest.approx(longer)
    assert parent.metrics["reward_model/held_out_votes"] == votes
    assert parent.tags["mlflow.note.content"] == first.report
    assert "from 2 answers to each of 6 held-out prompts" in first.decision.reasons[0]


def test_every_version_names_its_parents_data_code_and_seed(store, first):
    expected = {
        first.sft: {},
        first.reward_model: {"sft": first.sft},
        first.policy: {"sft": first.sft, "reward": first.reward_model},
        first.critic: {"sft": first.sft, "reward": first.reward_model},
    }
    for ref, parents in expected.items():
        tags = store.tags(ref)
        assert {k: v for k, v in tags.items() if k.startswith("parent.")} == {
            f"parent.{role}": parent.uri for role, parent in parents.items()
        }
        assert tags["data_digest"] == first.data.digest
        assert tags["seed"] == "0"
        assert tags["pipeline_run_id"] == first.run.run_id
        assert tags["git_commit"]
        assert tags["prefect.flow_run_id"]


def test_the_lineage_reads_from_the_run_too(client, first):
    ppo = children(client, first)["ppo"].data.tags
    assert ppo["output.policy"] == first.policy.uri
    assert ppo["output.critic"] == first.critic.uri
    assert ppo["input.reward"] == first.reward_model.uri


def test_figures_and_tables_lie_with_their_stage(client, first):
    stages = children(client, first)
    for stage, folder, file in [
        ("prepare", "figures", "figures/data_lengths.png"),
        ("sft", "figures", "figures/sft_loss.png"),
        ("reward_model", "figures", "figures/reward_calibration.png"),
        ("report_card", "figures", "figures/report_card_canaries.png"),
        ("report_card", "tables", "tables/report_card_canaries.json"),
        ("ppo", "tables", "tables/ppo_samples.json"),
        ("evaluation", "tables", "tables/evaluation_samples.json"),
    ]:
        found = client.list_artifacts(stages[stage].info.run_id, folder)
        assert file in [artifact.path for artifact in found]
    history = client.get_metric_history(stages["ppo"].info.run_id, "objective/kl")
    assert [(point.step, point.value == 0) for point in history] == [(1, True), (2, False)]


def test_the_champion_moves_only_by_the_verdict(client, store, first):
    assert first.decision.promote, first.decision
    assert store.get_alias("tiny-policy", "champion") == first.policy
    tags = children(client, first)["promotion"].data.tags
    assert tags["promoted"] == "true"
    assert tags["reasons"].splitlines() == list(first.decision.reasons)


def test_the_same_again_takes_everything_from_the_registry(client, store, first):
    versions = {name: store.versions(name) for name in store.names()}
    again = rlhf(config())
    assert again.models == first.models
    assert again.scorecard == first.scorecard
    assert {name: store.versions(name) for name in store.names()} == versions
    stages = children(client, again)
    for stage in ("sft", "reward_model", "report_card", "ppo", "evaluation"):
        source = children(client, first)[stage].info.run_id
        assert stages[stage].data.tags["cached_from"] == source
    assert "cached_from" not in stages["prepare"].data.tags
    assert store.get_alias("tiny-policy", "champion") == first.policy
    forced = rlhf(config(), force=("reward_model",))
    assert forced.reward_model.version == max(versions["tiny-reward"]) + 1
    # The bits are the same, so what comes after it is.
    assert forced.policy == first.policy
    assert "cached_from" not in children(client, forced)["reward_model"].data.tags


def test_a_stage_needs_nothing_but_the_registry(settings, first):
    assert list((settings.home / "work").iterdir()) == []
    shutil.rmtree(settings.home / "work")

    @flow
    def only_the_policy():
        small = config()
        models = first.sft, first.reward_model, {}
        with open_run("tiny", small, 0, force=["ppo"]) as run:
            return train_policy("ppo", small.ppo, small.sampling, *models, first.data, run)

    again = only_the_policy()
    assert again.policy == ModelRef(name="tiny-policy", version=first.policy.version + 1)
    assert list((settings.home / "work").iterdir()) == []


def test_reused_models_are_taken_by_version_and_the_champion_takes_part(client, store, first):
    before = store.versions("tiny-sft"), store.versions("tiny-reward")
    second = rlhf(
        config(
            sft={"reuse": "models:/tiny-sft/1"},
            reward_model={"reuse": "models:/tiny-reward/1"},
            ppo={"kl_coef": 0.07},
            promotion={"min_win_rate_over_champion": 1.0},
        )
    )
    assert (store.versions("tiny-sft"), store.versions("tiny-reward")) == before
    assert (second.sft, second.reward_model) == (first.sft, first.reward_model)
    assert second.report_card == first.report_card  # from the run that made it
    assert second.scorecard.comparison("policy", "champion") is not None
    assert not second.decision.promote
    assert "not promoted" in second.report
    assert store.get_alias("tiny-policy", "champion") == first.policy
    assert sorted(children(client, second)) == [
        *("evaluation", "ppo", "prepare", "promotion", "report_card")
    ]


def test_a_reward_model_that_is_not_good_enough_stops_before_the_policy(client, store, first):
    versions = {name: store.versions(name) for name in store.names()}
    with pytest.raises(ModelError, match=r"no policy is trained on .*tiny-reward/\d: held-out acc"):
        rlhf(config(reward_gate={"min_accuracy": 0.99}))
    newest = client.search_runs([first.run.experiment_id], "tags.stage = 'pipeline'")[0]
    condition = f"tags.`mlflow.parentRunId` = '{newest.info.run_id}'"
    stages = client.search_runs([first.run.experiment_id], condition)
    assert newest.info.status == "FAILED"
    assert {run.data.tags["stage"]: run.info.status for run in stages} == dict.fromkeys(
        ["prepare", "sft", "reward_model", "report_card"], "FINISHED"
    )
    # The threshold is no part of what the reward model is: none is trained again, none is lost, and
    # the report card is the one of the first run.
    [card] = [run for run in stages if run.data.tags["stage"] == "report_card"]
    source = children(client, first)["report_card"].info.run_id
    assert card.data.tags["cached_from"] == source
    assert {name: store.versions(name) for name in store.names()} == versions


def test_the_report_card_is_a_page_and_stands_on_the_version(client, store, first, tmp_path):
    run = children(client, first)["report_card"]
    path = client.download_artifacts(run.info.run_id, "report_card.md", str(tmp_path))
    text = Path(path).read_text(encoding="utf-8")
    card = first.report_card
    assert f"**{verdict(card)}**" in text
    assert run.data.tags["mlflow.note.content"] == text
    assert run.data.metrics["summary/accuracy"] == pytest.approx(card.accuracy.share.value)
    trained = client.get_run(children(client, first)["reward_model"].info.run_id).data.metrics
    for bound in ("accuracy", "accuracy_low", "accuracy_high", "longer_accuracy"):
        assert run.data.metrics[f"summary/{bound}"] == pytest.approx(trained[f"summary/{bound}"])
    tags = store.tags(first.reward_model)
    assert tags["report_card.verdict"] == verdict(card)
    assert tags["report_card.accuracy"] == str(card.accuracy)
    assert tags["report_card.worst_canary"].startswith(f"{card.worst_canary.kind}: ")


def test_a_canary_that_wins_too_often_stops_before_the_policy(client, first):
    worst = first.report_card.worst_canary
    assert worst.beats_real.high > 0.1
    with pytest.raises(ModelError, match=r"canary '\w+' beats the real answer .*max_canary_share"):
        rlhf(config(reward_gate={"max_canary_share": 0.1}))
    newest = client.search_runs([first.run.experiment_id], "tags.stage = 'pipeline'")[0]
    condition = f"tags.`mlflow.parentRunId` = '{newest.info.run_id}'"
    stages = client.search_runs([first.run.experiment_id], condition)
    assert "ppo" not in {run.data.tags["stage"] for run in stages}


def test_a_reward_model_of_unknown_worth_is_said_to_be_that(client, store, first, caplog):
    source = client.get_model_version("tiny-reward", "1").source
    made = client.create_model_version("tiny-reward", source)
    stranger = ModelRef(name="tiny-reward", version=int(made.version))
    caplog.set_level(logging.WARNING, "tasks.steps.reward_model")
    assert check_reward_model.fn(stranger) is None
    assert f"{stranger.uri}: its held-out accuracy is unknown" in caplog.text
    text = render(
        first.scorecard,
        first.decision,
        first.report_card.model_copy(update={"accuracy": None}),
        "ppo",
        {"reward": stranger, "policy": first.policy},
        first.run,
        read_settings(),
    )
    assert f"- Reward model `{stranger.uri}`: its held-out accuracy is unknown." in text
    client.delete_model_version("tiny-reward", made.version)


def test_a_poor_reward_model_is_a_warning_before_any_policy(client, first, caplog):
    """This one was registered before runs had `held_out_votes`: its pairs have ties among them."""
    run = client.create_run(first.run.experiment_id)
    poor = {"accuracy": 0.436, "accuracy_low": 0.18, "accuracy_high": 0.85}
    for name, value in {**poor, "longer_accuracy": 0.641, "held_out_pairs": 39}.items():
        client.log_metric(run.info.run_id, f"summary/{name}", value)
    source = client.get_model_version("tiny-reward", "1").source
    made = client.create_model_version("tiny-reward", source, tags={"run_id": run.info.run_id})
    ref = ModelRef(name="tiny-reward", version=int(made.version))
    quality = check_reward_model.fn(ref)
    assert quality == RewardQuality(
        accuracy=(0.436, 0.18, 0.85), longer_accuracy=0.641, votes=39, prompts=None
    )
    [said] = [r for r in caplog.records if r.name == "tasks.steps.reward_model"]
    assert said.levelno == logging.WARNING
    assert said.getMessage() == f"{ref.uri}: {quality.numbers}. {quality.doubts}"
    client.delete_model_version("tiny-reward", made.version)


REUSE = {
    "sft": {"reuse": "models:/tiny-sft/1"},
    "reward_model": {"reuse": "models:/tiny-reward/1"},
    "promotion": {"min_win_rate_over_champion": 1.0},
}


@pytest.mark.parametrize("algorithm", ["rloo", "grpo", "dpo"])
def test_the_other_algorithms_leave_a_policy_and_no_critic(client, store, first, algorithm):
    result = rlhf(config(algorithm, **REUSE))
    assert result.critic is None
    assert f"| {algorithm.upper()} |" in result.report
    assert f"{algorithm}-seed-0" in [run.info.run_name for run in children(client, result).values()]
    stage = children(client, result)[algorithm]
    assert stage.data.tags["output.policy"] == result.policy.uri
    assert "output.critic" not in stage.data.tags
    tags = store.tags(result.policy)
    assert tags["parent.sft"] == first.sft.uri
    assert ("parent.reward" in tags) == (algorithm != "dpo")


def shortness(prompts, responses):
    """A reward for the tests below."""
    return [-0.1 * len(response.split()) for response in responses]


def test_a_reward_of_several_parts_names_each(client, store, first):
    rewards = [
        {"source": "models:/tiny-reward@second"},
        {"source": f"{__name__}:shortness", "weight": 0.5},
    ]
    store.set_alias(first.reward_model, "second")
    result = rlhf(config("rloo", **{**REUSE, "rloo": {"rewards": rewards}}))
    stage = client.get_run(children(client, result)["rloo"].info.run_id)
    role = "reward.tiny-reward-second"
    assert stage.data.tags[f"input.{role}"] == first.reward_model.uri  # a version, not the alias
    assert store.tags(result.policy)[f"parent.{role}"] == first.reward_model.uri
    assert "input.reward" not in stage.data.tags  # nothing here learns from it
    used = {store.tags(ref)["logged_model_id"] for ref in (first.sft, first.reward_model)}
    assert {model.model_id for model in stage.inputs.model_inputs} == used
    score, learnt, short = (
        client.get_metric_history(stage.info.run_id, name)[0].value
        for name in ("objective/score", "reward/tiny-reward-second", "reward/shortness")
    )
    assert score == pytest.approx(learnt + 0.5 * short, abs=1e-5)
    assert short < 0


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("models:/nobody/3", ModelError, "there is no model 'nobody'"),
        ("models:/tiny-reward@none", ModelError, "points to no version"),
        ("no_such_module:f", ConfigError, "'no_such_module:f' cannot be imported"),
        ("os:getcwd", ConfigError, "'os:getcwd' is not run: os is none of the packages whose"),
        ("json.tool:main", ConfigError, "add json to RLHF_REWARD_PACKAGES where the stage runs"),
    ],
)
@pytest.mark.parametrize("setting", ["ppo.rewards", "evaluation.true_reward"])
def test_a_reward_that_is_not_there_is_said_before_anything_trains(
    client, first, setting, source, error, said
):
    if setting == "ppo.rewards":
        changed = config(ppo={"rewards": [{"source": "reward_model"}, {"source": source}]})
    elif error is ModelError:
        pytest.skip("a truth is a function")
    else:
        changed = config(evaluation={"true_reward": source})
    with pytest.raises(error, match=said):
        rlhf(changed)
    newest = client.search_runs([first.run.experiment_id], "tags.stage = 'pipeline'")[0]
    condition = f"tags.`mlflow.parentRunId` = '{newest.info.run_id}'"
    assert newest.info.status == "FAILED"
    assert client.search_runs([first.run.experiment_id], condition) == []


@pytest.mark.parametrize(
    ("judge", "error", "said"),
    [
        ({"source": "models:/nobody/3"}, ModelError, "there is no model 'nobody'"),
        ({"source": "no_such_module:f"}, ConfigError, "judge.source 'no_such_module:f' cannot be"),
        ({"source": "endpoint", "endpoint": {"model": "m"}}, ConfigError, "RLHF_JUDGE_URL is not"),
        ({"source": "endpoint", "endpoint": {"model": "n"}}, ConfigError, "knows no model n"),
    ],
)
def test_a_judge_that_cannot_work_is_said_before_anything_trains(
    client, first, monkeypatch, judge, error, said
):
    with serving() as server:
        if said.startswith("knows"):
            monkeypatch.setenv("RLHF_JUDGE_URL", server.address)
            monkeypatch.setenv("RLHF_JUDGE_KEY", KEY)
        with pytest.raises(error, match=said):
            rlhf(config(judge=judge))
    newest = client.search_runs([first.run.experiment_id], "tags.stage = 'pipeline'")[0]
    condition = f"tags.`mlflow.parentRunId` = '{newest.info.run_id}'"
    assert newest.info.status == "FAILED"
    assert client.search_runs([first.run.experiment_id], condition) == []


@pytest.mark.parametrize(
    ("urls", "error", "said"),
    [
        ("", ConfigError, "RLHF_VLLM_URLS is not set where the stage runs"),
        ("http://127.0.0.1:1", EngineError, "the server at http://127.0.0.1:1 cannot be reached"),
    ],
)
def test_servers_that_cannot_sample_are_said_before_anything_trains(
    client, first, monkeypatch, urls, error, said
):
    monkeypatch.setattr(vllm, "PAUSES", (0.01,))
    monkeypatch.setenv("RLHF_VLLM_URLS", urls)
    with pytest.raises(error, match=re.escape(said)):
        rlhf(config(sampling={"engine": "vllm"}))
    newest = client.search_runs([first.run.experiment_id], "tags.stage = 'pipeline'")[0]
    condition = f"tags.`mlflow.parentRunId` = '{newest.info.run_id}'"
    assert newest.info.status == "FAILED"
    assert client.search_runs([first.run.experiment_id], condition) == []


def test_servers_sample_the_roll_outs_and_what_needs_none_is_reused(
    client, first, settings, monkeypatch, tmp_path
):
    write_folder(first.sft.uri, tmp_path / "start", settings)
    app = serve.create_app(serve.Engine(tmp_path / "start", settings.home))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        here = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=here.run, kwargs={"sockets": [listening]})
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv("RLHF_VLLM_URLS", address)
        result = rlhf(config(sampling={"engine": "vllm"}))
        here.should_exit = True
        thread.join()
    stages = children(client, result)
    cached = {name for name, run in stages.items() if tags.CACHED_FROM in run.data.tags}
    assert {"sft", "reward_model", "report_card"} <= cached
    assert "ppo" not in cached
    logged = stages["ppo"].data.metrics
    assert abs(logged["engine/kl"]) < 1e-4
    assert logged["engine/truncated"] == 0
    assert not list((settings.home / "work").glob("ppo-*"))


def test_a_model_behind_an_endpoint_decides_and_its_key_is_kept_nowhere(
    client, first, settings, monkeypatch, caplog
):
    judge = {"source": "endpoint", "endpoint": {"model": "m"}, "canary_prompts": 2}
    with serving() as server:
        monkeypatch.setenv("RLHF_JUDGE_URL", server.address)
        monkeypatch.setenv("RLHF_JUDGE_KEY", KEY)
        result = rlhf(config(judge=judge, **REUSE))
        asked = len(server.questions)
        facts = result.scorecard.judge
        assert asked == facts.requests + 1  # and the easy one before training
        assert asked == len(set(server.questions))
        again = rlhf(config(judge=judge, **REUSE), force=("evaluation",)).scorecard.judge
        assert len(server.questions) == asked + 1
    assert (again.requests, again.remembered) == (0, facts.requests + facts.remembered)
    assert {match.judge for match in result.scorecard.comparisons} == {"m"}
    assert facts.consistency.value == 1
    evaluation = children(client, result)["evaluation"]
    assert evaluation.data.params["judge.endpoint.model"] == "m"
    assert evaluation.data.metrics["summary/judge/requests"] == facts.requests
    table = client.download_artifacts(evaluation.info.run_id, "tables/evaluation_verdicts.json")
    assert "characters" in json.loads(Path(table).read_text())["data"][0][5]
    # Neither MLflow's database and artifacts nor what Prefect keeps has the key.
    kept = [path for path in settings.home.rglob("*") if path.is_file()]
    assert len(kept) > 50
    assert [path for path in kept if KEY.encode() in path.read_bytes()] == []
    assert KEY not in caplog.text


def test_adapters_are_registered_with_their_models(store, first, tmp_path):
    lora = {"lora_rank": 2}
    reward = {**REUSE["reward_model"], "reuse": "", **lora}
    result = rlhf(config(**{**REUSE, "reward_model": reward}, ppo=lora))
    for ref in (result.policy, result.critic, result.reward_model):
        held = store.fetch(ref, tmp_path / ref.name)
        files = sorted(path.name for path in (held / "adapter").iterdir())
        assert files == ["adapter_config.json", "adapter_model.safetensors"]
    servable = export_servable(store, result.policy, tmp_path / "servable")
    served = mlflow.pyfunc.load_model(str(servable))
    prompts = ["The hotel", "A film"]
    said = served.predict(pd.DataFrame({"prompt": prompts}), params={"max_new_tokens": 8})
    asked = generate(
        result.policy.uri, prompts, settings=read_settings(), max_new_tokens=8, temperature=0.0
    )
    assert [[text] for text in said] == asked


def test_a_champion_that_moved_meanwhile_is_not_overruled(client, store, first):
    source = client.get_model_version("tiny-policy", str(first.policy.version)).source
    made = client.create_model_version("tiny-policy", source)
    stranger = ModelRef(name="tiny-policy", version=int(made.version))

    @flow
    def late_promotion():
        rules = PromotionConfig(**TINY["promotion"])
        return promote(rules, first.scorecard, stranger, None, first.run)

    decision = late_promotion()
    assert not decision.promote
    assert f"the champion is now {first.policy.uri}" in decision.reasons[-1]
    assert store.get_alias("tiny-policy", "champion") == first.policy


def test_a_stage_that_fails_fails_the_run_and_leaves_the_champion(client, store, first):
    with pytest.raises(ConfigError, match=r"evaluation\.true_reward failed on"):
        rlhf(config(evaluation={"true_reward": "rlhf_core.simulation:simulate"}))
    newest = client.search_runs([first.run.experiment_id], "tags.stage = 'pipeline'")[0]
    stages = client.search_runs(
        [first.run.experiment_id], f"tags.`mlflow.parentRunId` = '{newest.info.run_id}'"
    )
    status = {run.data.tags["stage"]: run.info.status for run in stages}
    assert newest.info.status == "FAILED"
    assert status == {
        **dict.fromkeys(["prepare", "sft", "reward_model", "report_card", "ppo"], "FINISHED"),
        "evaluation": "FAILED",
    }
    assert store.get_alias("tiny-policy", "champion") == first.policy


def test_the_result_survives_json(first):
    copy = type(first).model_validate(json.loads(first.model_dump_json()))
    assert copy == first


# ---- the monitor ----


def test_a_held_out_model_on_the_other_votes_watches_the_policy(client, store, first):
    """The distance of hidden states is never 0, so that the first measurement ends the run."""
    monitor = {"prompts": 4, "held_out": "train", "confirm": 1}
    monitor |= {"max_distance": 1e-9, "at_distance": "stop"}
    watched = rlhf(config("rloo", rloo={**SMALL, "monitor": monitor}))
    stages = children(client, watched)
    rloo, held_out, reward = (stages[name].data for name in ("rloo", "held_out", "reward_model"))
    assert held_out.tags["output.held_out"].startswith("models:/tiny-held-out/")
    assert rloo.tags["input.held_out"] == held_out.tags["output.held_out"]
    assert (reward.params["reward_model.votes"], held_out.params["held_out.votes"]) == (
        "first_half",
        "second_half",
    )
    pairs = [part.metrics["summary/train_pairs"] for part in (reward, held_out)]
    assert sum(pairs) == children(client, first)["reward_model"].data.metrics["summary/train_pairs"]
    assert rloo.metrics["monitor/action"] == 4
    assert "monitor/gap" in rloo.metrics
    assert rloo.tags["alarm.distance"].startswith("monitor, iteration 1: the reward model's last")
    assert rloo.metrics["summary/iterations"] == 1
    figures = [file.path for file in client.list_artifacts(stages["rloo"].info.run_id, "figures")]
    assert "figures/rloo_monitor.png" in figures


def test_what_a_monitor_cannot_have_is_refused():
    monitor = {"prompts": 4, "held_out": "train"}
    with pytest.raises(ValueError, match=r"reward_model\.reuse names a model"):
        config(reward_model={"reuse": "models:/a/1"}, ppo={**SMALL, "monitor": monitor})
    with pytest.raises(ValueError, match=r"remove reward_model\.votes"):
        config(reward_model={"votes": "first_half"}, ppo={**SMALL, "monitor": monitor})
    with pytest.raises(ValueError, match="no effect without a monitor"):
        config(ppo={**SMALL, "monitor": {"held_out": "train"}})

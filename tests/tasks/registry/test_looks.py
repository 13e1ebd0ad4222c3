"""The alpha budget in the registry: counted for each opponent, never overspent, never spent twice;
and the facts that the gate gathers beside it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mlflow.artifacts import download_artifacts
from safetensors.torch import save_file

from rlhf_core.evaluation.scorecard import JudgeFacts, PromptSlice, Scorecard
from rlhf_core.settings.promotion import PromotionConfig
from tasks.record.describe import ensure_experiment
from tasks.record.record import Record
from tasks.registry.evidence import gather
from tasks.registry.looks import look
from tasks.registry.refs import ModelRef, PipelineRun

EMPTY = Scorecard(arms=(), comparisons=())
TOTAL = 0.05


@pytest.fixture
def record(settings):
    return Record.open(settings)


@pytest.fixture
def experiment(record):
    return ensure_experiment(record.client, "toy", record.settings)


@pytest.fixture
def publish(record, experiment, tmp_path):
    """A function that registers a `toy-policy` whose weights are this number."""

    def _publish(number, **tags) -> ModelRef:
        directory = tmp_path / f"weights-{number}"
        directory.mkdir(exist_ok=True)
        save_file({"w": torch.tensor([float(number)])}, directory / "model.safetensors")
        run_id = record.client.create_run(experiment).info.run_id
        return record.store.publish(directory, "toy-policy", run_id=run_id, tags=tags)

    return _publish


def test_each_comparison_with_a_champion_has_the_next_share(record, publish):
    champion, *candidates = (publish(number) for number in range(4))
    looks = [look(record, TOTAL, EMPTY, candidate, champion) for candidate in candidates]
    assert [found.number for found in looks] == [1, 2, 3]
    assert [found.alpha for found in looks] == pytest.approx([0.025, 0.05 / 6, 0.05 / 12])
    assert looks[-1].spent == pytest.approx(0.05 * 3 / 4)
    assert {found.opponent for found in looks} == {champion.uri}
    assert not any(found.again for found in looks)


def test_the_same_comparison_is_the_same_look(record, publish):
    champion, candidate, other = (publish(number) for number in range(3))
    first = look(record, TOTAL, EMPTY, candidate, champion)
    look(record, TOTAL, EMPTY, other, champion)
    again = look(record, TOTAL, EMPTY, candidate, champion)
    assert again.again
    assert (again.number, again.alpha) == (first.number, first.alpha)
    assert again.spent == pytest.approx(0.05 * 2 / 3)
    # A version with the same files and the same scorecard is the same comparison.
    assert look(record, TOTAL, EMPTY, publish(1), champion).again
    # So is the same evaluation with verdicts from memory, which cost less.
    facts = JudgeFacts(name="m", pairs=0, unanswered=0, consistency=None, canaries=(), seconds=9.0)
    cheaper = EMPTY.model_copy(update={"judge": facts})
    assert look(record, TOTAL, cheaper, candidate, champion).again
    # Another evaluation is a new one.
    part = PromptSlice(column="lang", value="en", prompts=(0,))
    evaluated = EMPTY.model_copy(update={"slices": (part,)})
    assert look(record, TOTAL, evaluated, candidate, champion).number == 3


def test_each_opponent_has_a_budget_and_keeps_its_count(record, publish):
    a, b, *candidates = (publish(number) for number in range(6))
    nobody = look(record, TOTAL, EMPTY, candidates[0], None)
    assert (nobody.number, nobody.opponent) == (1, "toy-policy")
    assert look(record, TOTAL, EMPTY, candidates[0], a).number == 1
    assert look(record, TOTAL, EMPTY, candidates[1], b).number == 1
    # After a rollback a reigns again, where it stopped.
    assert look(record, TOTAL, EMPTY, candidates[2], a).number == 2
    assert look(record, TOTAL, EMPTY, candidates[3], None).number == 2


def test_those_who_meet_do_not_overspend(record, settings, publish):
    champion, *candidates = (publish(number) for number in range(7))

    def take(candidate):
        return look(Record.open(settings), TOTAL, EMPTY, candidate, champion)

    with ThreadPoolExecutor(6) as pool:
        looks = list(pool.map(take, candidates))
    assert sum(found.alpha for found in looks) <= 0.05 * 6 / 7 + 1e-12
    assert max(found.number for found in looks) == 6
    assert look(record, TOTAL, EMPTY, publish(9), champion).number == 7


def test_one_that_died_between_its_two_writes_has_spent_nothing_yet(record, publish):
    champion, died, next_one = (publish(number) for number in range(3))
    first = look(record, TOTAL, EMPTY, died, champion)
    (name,) = (tag for tag in record.store.tags(champion) if tag.startswith("look."))
    record.store.add_tags(champion, {name: "begun"})
    second = look(record, TOTAL, EMPTY, next_one, champion)
    assert second.number == 2
    resumed = look(record, TOTAL, EMPTY, died, champion)
    assert resumed.number == 2
    assert resumed.alpha + second.alpha < first.alpha + second.alpha


# ---- the other facts ----


@pytest.fixture
def run(record, experiment):
    made = record.client.create_run(experiment)
    return PipelineRun(project="toy", run_id=made.info.run_id, experiment_id=experiment, seed=0)


def stage(record, run, name, **tags):
    made = record.client.create_run(
        run.experiment_id, tags={"mlflow.parentRunId": run.run_id, "stage": name, **tags}
    )
    return made.info.run_id


def facts(record, candidate, run):
    return gather(record, PromotionConfig(), EMPTY, candidate, None, run, None)


def test_the_files_are_those_of_the_registry_and_of_the_evaluation(record, publish, run):
    candidate = publish(1)
    digest = record.store.tags(candidate)["digest"]
    unknown = facts(record, candidate, run).files
    assert (unknown.digest, unknown.problem, unknown.evaluated) == (digest, "", None)
    asked = {"input.policy": candidate.uri, "input_digest.policy": digest}
    evaluation = stage(record, run, "evaluation", **asked)
    files = facts(record, candidate, run).files
    assert (files.evaluated, files.evaluation) == (digest, evaluation)
    assert list((record.settings.home / "work").iterdir()) == []


def test_files_that_changed_in_the_store_are_named(record, publish, run):
    candidate = publish(1)
    source = record.client.get_model_version_download_uri("toy-policy", "1")
    stored = download_artifacts(source, tracking_uri=record.settings.mlflow_uri)
    path = next(Path(stored).rglob("model.safetensors"))
    path.write_bytes(path.read_bytes() + b" ")
    assert "is damaged" in facts(record, candidate, run).files.problem


def test_alarms_of_the_training_are_found_where_there_was_a_monitor(record, publish, run):
    assert facts(record, publish(1), run).alarms is None
    trained = stage(record, run, "ppo")
    record.client.log_param(trained, "ppo.monitor.prompts", "32")
    assert facts(record, publish(2), run).alarms == {}
    record.client.set_tag(trained, "alarm.length", "monitor, iteration 9: longer.")
    assert facts(record, publish(3), run).alarms == {"length": "monitor, iteration 9: longer."}
    # An earlier milestone is not to blame for what came after it.
    for step, action in ((4, 0), (8, 0), (9, 1)):
        record.client.log_metric(trained, "monitor/action", action, step=step)
    assert facts(record, publish(4, iteration="8"), run).alarms == {}
    assert facts(record, publish(5, iteration="9"), run).alarms != {}

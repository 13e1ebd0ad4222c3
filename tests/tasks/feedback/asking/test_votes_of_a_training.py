"""Votes of the store as the data of a training: pinned, found again, and refused in a sentence."""

import json
import re

import pytest
from pydantic import ValidationError

from rlhf_core.backbone.base_model import FreshModelConfig, ModelConfig
from rlhf_core.data.pairs import with_winners
from rlhf_core.data.prepared import read_table
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.stages.prepare import DataConfig, LengthLimits
from rlhf_core.stages.sft import SFTConfig
from tasks.feedback.asking import votes
from tasks.feedback.asking.pinning import pin
from tasks.feedback.asking.votes import opened, patiently, votes_now
from tasks.feedback.store.database import StoreError
from tasks.feedback.store.records import Answer, Ballot, NewPair
from tasks.feedback.store.store import Store
from tasks.record import tags
from tasks.record.record import Record
from tasks.record.run import open_run
from tasks.registry.datasets import fetch_dataset
from tasks.settings import Settings
from tasks.steps import data as steps
from tasks.steps import sft
from tasks.steps.new_data import count_preferences

# Without Prefect around them.
prepare_data = steps.prepare_data.__wrapped__
pin_preferences = steps.pin_preferences.__wrapped__
train_sft = sft.train_sft.__wrapped__

MODEL = ModelConfig(fresh=FreshModelConfig(layers=1, width=32, heads=2, context=64))
LIMITS = LengthLimits(prompt=32, response=32, sft=64, reward=64)
SFT = SFTConfig(max_length=64, epochs=1)


def data(**preferences) -> DataConfig:
    content = {"store": "shop", **preferences}
    return DataConfig.model_validate(
        {"source": "files", "preferences": content, "eval_fraction": 0.3}
    )


def pair(n: int, **more) -> NewPair:
    return NewPair(f"Review {n}:", Answer(f" fine {n}"), Answer(f" dull {n}"), **more)


def cast(project, numbers, vote="a", by="ada", **more):
    project.judgments.add((pair(n, **more), [Ballot(vote, by, "b")]) for n in numbers)


@pytest.fixture
def project(home):
    store = Store.open()
    yield store.project("shop", make=True)
    store.close()


@pytest.fixture
def record(settings, project, monkeypatch):
    """Without the report on the annotators, which takes seconds."""
    monkeypatch.setattr(steps, "publish_report", lambda snapshot, record: "")
    return Record.open(settings)


def run_of(record, name="shop", seed=0, config=MODEL):
    return open_run(name, config, seed, settings=record.settings)


# ---- settings ----


@pytest.mark.parametrize(
    ("preferences", "said"),
    [
        ({"path": "votes.jsonl"}, "path and store are both set"),
        ({"store": "", "snapshot": "latest"}, "snapshot names votes of the preference store, but"),
        ({"split": "test"}, "split, subset and eval_split choose within a data set"),
        ({"eval_split": "test"}, "split, subset and eval_split choose within a data set"),
        ({"snapshot": "newest"}, "should match pattern"),
        ({"store": "../etc"}, "should match pattern"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(preferences, said):
    with pytest.raises(ValidationError, match=said):
        data(**preferences)


def test_only_preferences_come_from_a_store():
    with pytest.raises(ValidationError, match="Extra inputs"):
        DataConfig.model_validate({"prompts": {"store": "shop"}})


# ---- the snapshot of a run ----


def test_a_run_reads_the_votes_of_its_beginning_whatever_comes_later(record, project):
    cast(project, range(20))
    with run_of(record) as run:
        first = prepare_data(data(), MODEL, LIMITS, run)
        cast(project, range(20, 40))
        config, snapshot = pin(data(), run, record)
        assert prepare_data(data(), MODEL, LIMITS, run) == first
    assert snapshot.digest == config.preferences.snapshot
    assert record.runs.tags(run.run_id)[tags.SNAPSHOT] == f"feedback:/shop/{snapshot.digest}"
    with run_of(record, seed=0) as other:  # the first has finished
        second = prepare_data(data(), MODEL, LIMITS, other)
    assert second.digest != first.digest


def test_the_same_votes_are_found_again_by_any_run_and_one_more_vote_is_not(record, project):
    cast(project, range(30))
    made = []
    for extra in ([], [], [99]):
        cast(project, extra)
        with run_of(record) as run:
            prepared = prepare_data(data(), MODEL, LIMITS, run)
            made.append((prepared, train_sft(SFT, MODEL, prepared, run)))
            (stage,) = record.runs.stages(run.experiment_id, run.run_id, "prepare")
            cached = tags.CACHED_FROM in stage.data.tags
            assert cached == (len(made) == 2)
            assert stage.data.metrics["summary/preferences_train"] > 10
    assert made[0] == made[1]
    assert made[2][0].digest != made[0][0].digest
    assert made[2][1] != made[0][1]


def test_latest_and_the_digest_of_the_same_votes_are_the_same_data(record, project):
    cast(project, range(20))
    with run_of(record) as run:
        first = prepare_data(data(), MODEL, LIMITS, run)
    digest = project.snapshots.find().digest
    with run_of(record) as run:
        assert prepare_data(data(snapshot=digest[:12]), MODEL, LIMITS, run) == first


def test_a_file_beside_the_store_may_change_so_only_the_same_run_reuses(record, project, tmp_path):
    cast(project, range(20))
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "Tell {n}:"}}\n' for n in range(20)))
    config = data().model_copy(
        update={"prompts": data().prompts.model_copy(update={"path": str(tmp_path / "p.jsonl")})}
    )
    made = []
    for _ in range(2):
        with run_of(record) as run:
            made.append(prepare_data(config, MODEL, LIMITS, run))
            assert prepare_data(config, MODEL, LIMITS, run) == made[-1]
    assert made[0].run_id != made[1].run_id
    assert made[0].digest == made[1].digest


def test_mlflow_shows_the_snapshot_as_the_data_set_that_went_in(record, project):
    cast(project, range(20))
    with run_of(record) as run:
        prepare_data(data(), MODEL, LIMITS, run)
    digest = project.snapshots.find().digest
    (stage,) = record.runs.stages(run.experiment_id, run.run_id, "prepare")
    (logged,) = record.client.get_run(stage.info.run_id).inputs.dataset_inputs
    assert logged.dataset.name == "shop"
    assert digest.startswith(logged.dataset.digest)
    assert json.loads(logged.dataset.source) == {"uri": f"feedback:/shop/{digest}"}
    assert stage.data.tags[tags.SNAPSHOT] == f"feedback:/shop/{digest}"
    assert stage.data.params["prepare.preferences.snapshot"] == digest


def test_votes_mean_in_training_what_they_mean_in_the_store(record, project, tmp_path):
    for n, vote in enumerate(["a", "b", "tie", "both_bad"] * 10):
        cast(project, [n], vote)
    with run_of(record) as run:
        prepared = prepare_data(data(), MODEL, LIMITS, run)
    folder = fetch_dataset(record.client, prepared, tmp_path / "data")
    rows = [
        json.loads(line)
        for split in ("train", "eval")
        for line in (folder / f"preferences.{split}.jsonl").read_text().splitlines()
    ]
    won = {"a": "response_a", "b": "response_b"}
    said = {
        int(row["prompt"].split()[1][:-1]): row[won[row["vote"]]].split()[0]
        if row["vote"] in won
        else row["vote"]
        for row in rows
    }
    assert said == {n: ["fine", "dull", "tie", "tie"][n % 4] for n in range(40)}
    assert {row["annotator"] for row in rows} == {"ada"}
    assert {row[won[row["shown_first"]]].split()[0] for row in rows} == {"dull"}


def test_what_people_said_as_judges_is_in_no_training(record, project):
    """Their prompts are those of an evaluation."""
    cast(project, range(20))
    before = project.snapshots.take()
    held_out = pair(500)
    judged = project.content.batch("evaluation-1", "judge")
    project.content.add([held_out], batch=judged)
    project.judgments.add([(held_out, [Ballot("a", "ada")])])
    assert project.snapshots.take().digest == before.digest
    with votes_now(data(), record.settings) as (path, found):
        assert found.digest == before.digest
        assert "Review 500" not in path.read_text()
    assert any(vote.prompt == "Review 500:" for vote in project.judgments.stream())


def test_votes_of_a_judge_are_data_and_make_no_retraining(record, project):
    cast(project, range(20))
    cast(project, range(20, 40), by="judge:rule")
    found = count_preferences.fn(data(), MODEL, LIMITS, project="shop", seed=0)
    assert found.now == 20
    with run_of(record) as run:
        prepare_data(data(), MODEL, LIMITS, run)
        record.add_tags(run.run_id, {tags.output_of("policy"): "models:/shop-policy/1"})
    cast(project, range(40, 50), by="judge:rule")
    again = count_preferences.fn(data(), MODEL, LIMITS, project="shop", seed=0)
    assert (again.before, again.new) == (20, 0)


def test_known_answers_are_data_and_no_votes(record, project, tmp_path):
    cast(project, range(20))
    cast(project, range(20, 40), "b", gold="a")
    found = count_preferences.fn(data(), MODEL, LIMITS, project="shop", seed=0)
    assert found.now == 40
    with run_of(record) as run:
        prepared = prepare_data(data(), MODEL, LIMITS, run)
        record.add_tags(run.run_id, {tags.output_of("policy"): "models:/shop-policy/1"})
    (stage,) = record.runs.stages(run.experiment_id, run.run_id, "prepare")
    rows = stage.data.metrics
    assert rows["summary/known_answers"] == 20
    assert rows["summary/preferences_train"] + rows["summary/preferences_eval"] == 60
    assert rows["summary/contradictory_pairs"] == 0  # all of them were wrong
    assert rows["summary/dropped"] == 0
    again = count_preferences.fn(data(), MODEL, LIMITS, project="shop", seed=0)
    assert (again.before, again.new) == (40, 0)
    folder = fetch_dataset(record.client, prepared, tmp_path / "data")
    table = read_table(folder, "preferences", "train")
    known = table[table["annotator"] == "gold"]
    assert len(known) > 5
    assert all(right.startswith(" fine") for right in with_winners(known)["chosen"])
    assert with_winners(table[table["gold"]])["annotator"].value_counts().to_dict() == {
        "ada": len(known),
        "gold": len(known),
    }


def test_all_points_of_a_sweep_read_the_same_votes(record, project):
    cast(project, range(20))
    with run_of(record) as run:
        pinned = pin_preferences(data(), run)
        cast(project, [77])
        assert pin_preferences(data(), run) == pinned
    assert pinned.preferences.snapshot == project.snapshots.find(pinned.preferences.snapshot).digest


# ---- before a run ----


def test_counting_and_looking_add_nothing_to_the_store(record, project):
    cast(project, range(20))
    found = count_preferences.fn(data(), MODEL, LIMITS, project="shop", seed=0)
    assert (found.now, found.before) == (20, 0)
    with votes_now(data(), record.settings) as (path, looked):
        assert len(path.read_text().splitlines()) == looked.votes == 20
    assert not path.exists()
    with pytest.raises(DataError, match="does not exist"):
        project.snapshots.find()
    assert project.snapshots.take().digest == looked.digest


@pytest.mark.parametrize(
    ("preferences", "said"),
    [
        ({"store": "nowhere"}, "there is no feedback project 'nowhere' (there are: shop)"),
        ({}, "the feedback project 'shop' has no votes yet"),
        ({"snapshot": "abcdef"}, "the snapshot 'abcdef' of the feedback project 'shop' does not"),
    ],
)
def test_what_is_not_there_is_a_sentence_before_anything_is_prepared(
    record, project, preferences, said
):
    with pytest.raises(DataError, match=re.escape(said)), run_of(record) as run:
        prepare_data(data(**preferences), MODEL, LIMITS, run)
    assert record.runs.stages(run.experiment_id, run.run_id) == []


def test_a_run_that_could_not_use_its_votes_reads_others_when_it_is_repeated(record, project):
    cast(project, [1])
    with pytest.raises(DataError, match="are left for"), run_of(record) as run:
        prepare_data(data(), MODEL, LIMITS, run)
    cast(project, range(2, 30))
    with run_of(record) as again:
        prepare_data(data(), MODEL, LIMITS, again)
    assert again.run_id == run.run_id


def test_a_bad_row_is_named_without_the_file_of_this_machine(record, project):
    cast(project, range(20))
    project.judgments.add([(NewPair("P:", Answer("  "), Answer(" x")), [Ballot("a")])])
    with pytest.raises(DataError) as caught, run_of(record) as run:
        prepare_data(data(), MODEL, LIMITS, run)
    assert str(record.settings.home) not in str(caught.value)
    place = "the feedback project shop at snapshot [0-9a-f]{16}, line [0-9]+"
    assert re.match(f"{place}, field 'response_[ab]': is empty", str(caught.value))


def test_no_store_at_all_and_a_database_that_is_away(tmp_path, monkeypatch):
    nothing = Settings.model_validate({"RLHF_HOME": tmp_path})
    with pytest.raises(DataError, match="there is no preference store in"), opened(nothing):
        pass
    assert list(tmp_path.iterdir()) == []
    away = Settings.model_validate(
        {
            "RLHF_HOME": tmp_path,
            "RLHF_FEEDBACK_DATABASE": "postgresql+psycopg2://u:secret-word@127.0.0.1:9/f",
            "RLHF_OUTAGE_SECONDS": 0.3,
        }
    )
    monkeypatch.setattr(votes, "PAUSE_SECONDS", 0.1)
    tries = []

    def look():
        tries.append(1)
        with opened(away):
            pass

    with pytest.raises(StoreError) as caught:
        patiently(look, away)
    assert "secret-word" not in str(caught.value)
    assert "RLHF_FEEDBACK_DATABASE" in str(caught.value)
    assert len(tries) > 1


def test_the_core_says_that_it_knows_no_store(tmp_path):
    from rlhf_core.stages.prepare import prepare_data as in_the_core
    from rlhf_core.work import Work

    work = Work(outputs={"data": tmp_path / "data"}, sections={"model": MODEL, "limits": LIMITS})
    with pytest.raises(ConfigError, match="which only a task reads"):
        in_the_core(data(), work)

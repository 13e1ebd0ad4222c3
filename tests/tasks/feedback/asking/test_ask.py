"""Pairs for people from a policy: whose answers, to which prompts, and nothing twice."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from rlhf_core.backbone.base_model import FreshModelConfig, ModelConfig
from rlhf_core.data.prepared import read_table
from rlhf_core.errors import ConfigError, DataError, ModelError
from rlhf_core.simulation import SimulationConfig
from rlhf_core.stages.prepare import DataConfig, LengthLimits
from rlhf_core.stages.sft import SFTConfig
from tasks.feedback.asking import ask as asking
from tasks.feedback.asking import batches
from tasks.feedback.asking.again import Caller, next_batch
from tasks.feedback.asking.ask import ask
from tasks.feedback.asking.config import AskConfig
from tasks.feedback.asking.starting import key_of
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import Batch, Judgment, Pair, Prompt, Response
from tasks.record.record import Record
from tasks.record.run import open_run
from tasks.registry.datasets import fetch_dataset
from tasks.registry.refs import ModelRef
from tasks.settings import Settings
from tasks.steps import data as steps
from tasks.steps import sft
from tests.flows.people import invited, label

MODEL = ModelConfig(fresh=FreshModelConfig(layers=1, width=32, heads=2, context=64))
LIMITS = LengthLimits(prompt=32, response=32, sft=64, reward=64)
DATA = DataConfig(
    simulation=SimulationConfig(prompts=40, demonstrations=60, preference_pairs=30),
    eval_fraction=0.25,
)
SHORT = {"max_new_tokens": 8, "policy": "models:/shop-sft/1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory, migrated_database):
    """A home with two policies, trained on prepared data, and no Prefect."""
    made = Settings.model_validate({"RLHF_HOME": tmp_path_factory.mktemp("ask") / "home"})
    (made.home / "mlflow").mkdir(parents=True)
    shutil.copy(migrated_database, made.home / "mlflow" / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment().items():
            patch.setenv(name, value)
        with open_run("shop", MODEL, 0) as run:
            data = steps.prepare_data.__wrapped__(DATA, MODEL, LIMITS, run)
            for rate in (1e-3, 3e-3):
                config = SFTConfig(max_length=64, learning_rate=rate)
                sft.train_sft.__wrapped__(config, MODEL, data, run)
        yield made, data


@pytest.fixture
def settings(home, tmp_path):
    """The same home with an empty store."""
    url = f"sqlite:///{tmp_path / 'feedback.db'}"
    return home[0].model_copy(update={"feedback_database": type(home[0].password)(url)})


@pytest.fixture
def prompts(home, tmp_path):
    folder = fetch_dataset(Record.open(home[0]).client, home[1], tmp_path / "data")
    return {side: set(read_table(folder, "prompts", side)["prompt"]) for side in ("train", "eval")}


def config(**changes):
    return AskConfig.model_validate({"project": "shop", **SHORT, **changes})


def rows(settings, kind=Pair):
    store = Store.open(settings)
    with store.database.reading() as session:
        found = session.query(kind).order_by(kind.id).all()
    store.close()
    return found


def test_answers_to_training_prompts_are_queued_with_how_they_were_made(settings, prompts):
    asked = ask(config(prompts=10), settings)
    assert asked.prompts == 10
    assert asked.pairs + asked.identical + asked.empty == 10
    assert {row.content for row in rows(settings, Prompt)} <= prompts["train"]
    for response in rows(settings, Response):
        assert response.model == "models:/shop-sft/1"
        assert response.sampling == {
            "temperature": 1.0,
            "top_p": 1.0,
            "max_new_tokens": 8,
            "seed": 0,
        }
    assert {pair.wanted for pair in rows(settings)} == {1}
    assert asked.where == settings.label_public_url
    assert f"{asked.pairs} pairs on 10 prompts" in asked.sentence


def test_the_same_call_asks_for_nothing_twice(settings):
    first = ask(config(prompts=12), settings)
    assert ask(config(prompts=12), settings) == first
    assert len(rows(settings)) == first.pairs


def test_a_call_that_was_killed_goes_on_with_the_same_answers(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(asking, "AT_ONCE", 4)
    whole = ask(config(prompts=12), settings)
    expected = {row.text for row in rows(settings, Response)}

    other = settings.model_copy(
        update={"feedback_database": type(settings.password)(f"sqlite:///{tmp_path / 'other.db'}")}
    )
    keep, calls = asking.batches.keep, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:  # the pairs are in, and it was not noted
            raise KeyboardInterrupt
        keep(*arguments)

    monkeypatch.setattr(asking.batches, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        ask(config(prompts=12), other)
    monkeypatch.setattr(asking.batches, "keep", keep)
    assert 0 < len(rows(other)) < whole.pairs
    assert ask(config(prompts=12), other) == whole
    assert {row.text for row in rows(other, Response)} == expected


def test_another_seed_asks_about_other_prompts(settings):
    ask(config(prompts=5), settings)
    before = {row.content for row in rows(settings, Prompt)}
    asked = ask(config(prompts=5, seed=1), settings)
    assert {row.content for row in rows(settings, Prompt)} > before
    assert asked.batch != ask(config(prompts=5), settings).batch


@pytest.mark.parametrize(
    ("changes", "pairs"),
    [
        ({"answers": 3}, 3),
        ({"answers": 4}, 6),
        ({"answers": 4, "pairs": "ring"}, 4),
        ({"answers": 2, "pairs": "ring"}, 1),
        ({"against": "models:/shop-sft/2", "answers": 2}, 4),
        ({"against": "models:/shop-sft/2", "answers": 3, "pairs": "ring"}, 3),
        ({"against": "models:/shop-sft/2", "answers": 1}, 1),
    ],
)
def test_which_answers_meet(settings, changes, pairs):
    asked = ask(config(prompts=2, **changes), settings)
    assert asked.pairs + asked.identical + asked.empty == 2 * pairs
    if changes.get("against"):
        models = {row.model for row in rows(settings, Response)}
        assert models == {"models:/shop-sft/1", "models:/shop-sft/2"}


def test_equal_answers_are_counted_and_nobody_is_asked(settings):
    asked = ask(config(prompts=3, against="models:/shop-sft/1", answers=1), settings)
    assert (asked.pairs, asked.identical) == (0, 3)
    assert "3 pairs of equal answers are not asked about" in asked.sentence
    assert rows(settings) == []


def test_a_pair_with_an_empty_answer_is_left_out_for_no_training_could_read_it(
    settings, monkeypatch
):
    monkeypatch.setattr(
        asking.Writer, "write", lambda self, prompts, **more: [["", f"yes {p}"] for p in prompts]
    )
    asked = ask(config(prompts=3), settings)
    assert (asked.pairs, asked.empty) == (0, 3)
    assert "3 pairs with an empty answer are not asked about" in asked.sentence


def test_held_out_prompts_are_for_comparing_versions_and_train_nothing(settings, prompts):
    asked = ask(
        config(prompts=100, evaluation=True, against="models:/shop-sft/2", answers=1), settings
    )
    assert {row.content for row in rows(settings, Prompt)} <= prompts["eval"]
    assert f"there are only {asked.prompts} prompts" in asked.sentence
    store = Store.open(settings)
    project = store.project("shop")
    assert label(project, invited(store, project))
    with pytest.raises(DataError, match="has no votes yet"):
        project.snapshots.take()
    store.close()


def test_prompts_of_a_file_without_those_that_are_held_out(settings, prompts, tmp_path):
    held_out = sorted(prompts["eval"])[:2]
    own = ["Tell me of the sea", "Tell me of the sea", "What is rain?", *held_out]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in own))
    asked = ask(config(file=str(path), licence="CC0"), settings)
    found = rows(settings, Prompt)
    assert {row.content for row in found} <= {"Tell me of the sea", "What is rain?"}
    assert {(row.source, row.licence) for row in found} == {("own.jsonl", "CC0")}
    assert asked.held_out == 2
    assert "2 prompts of the file are held out" in asked.sentence


def test_a_prompt_that_leaves_no_room_is_counted(settings, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "word " * 500}) + '\n{"prompt": "Short"}\n')
    asked = ask(config(file=str(path)), settings)
    assert (asked.prompts, asked.too_long) == (1, 1)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"policy": ""}, ModelError, "shop-policy"),
        ({"policy": "models:/shop-sft/9"}, ModelError, "models:/shop-sft/9|versions"),
        ({"against": "models:/nobody/1"}, ModelError, "nobody"),
        ({"data": f"runs:/{'0' * 32}/data"}, DataError, "runs:/"),
        ({"file": "nowhere.jsonl"}, DataError, "there is no file nowhere.jsonl"),
    ],
)
def test_what_is_not_there_is_a_sentence_and_nothing_is_queued(settings, changes, error, said):
    with pytest.raises(error, match=said):
        ask(config(**changes), settings)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answers": 1}, "one answer to a prompt meets no other"),
        ({"evaluation": True}, "comparing two versions"),
        ({"evaluation": True, "against": "models:/a/1", "file": "x.jsonl"}, "set one of them"),
        ({"policy": "gpt2"}, "pattern"),
        ({"temperature": float("nan")}, "finite|greater"),
        ({"prompts": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        config(**changes)


# ---- the next batch of a loop ----

THEN = "retrain/shop"


@pytest.fixture
def go_on(settings):
    """A function that asks as a retraining does that has no champion yet."""

    def call(run="run-1", votes="a", key="", rounds=9, model=1, **changes):
        settled = {"project": "shop", "prompts": 5, "max_new_tokens": 8, "then": THEN, **changes}
        return next_batch(
            AskConfig.model_validate(settled),
            settings,
            of="shop",
            caller=Caller(run, key),
            rounds=rounds,
            votes=votes,
            candidate=ModelRef(name="shop-sft", version=model) if model else None,
        )

    return call


def end(settings, name):
    """What is left when a batch has started its run; the key of that run."""
    store = Store.open(settings)
    with store.database.writing() as session:
        row = session.query(Batch).filter_by(name=name).one()
        row.flow_run, row.resumed_at = "some-run", row.created_at
        key = key_of("shop", name, row.created_at)
    store.close()
    return key


def test_a_round_asks_once_however_often_its_run_begins_again(settings, go_on):
    first = go_on()
    (batch,) = rows(settings, Batch)
    assert batch.details["policy"] == "models:/shop-sft/1"
    assert (batch.details["round"], batch.details["by"]) == (1, "run-1")
    # Neither another champion nor other settings change what the run has begun to ask.
    assert go_on(model=2, prompts=9) == first
    assert len(rows(settings, Batch)) == 1


def test_a_round_that_was_killed_goes_on_with_the_model_that_it_asked(settings, go_on, monkeypatch):
    monkeypatch.setattr(asking, "AT_ONCE", 2)
    keep, calls = asking.batches.keep, []

    def killed(*arguments):
        keep(*arguments)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(asking.batches, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            go_on()
    begun = {row.digest for row in rows(settings)}
    assert begun
    asked = go_on(model=2).asked
    assert {row.model for row in rows(settings, Response)} == {"models:/shop-sft/1"}
    assert {row.digest for row in rows(settings)} > begun
    assert len(rows(settings, Batch)) == 1
    assert asked.pairs == len(rows(settings))


def test_one_batch_at_a_time_waits_to_start_a_deployment(settings, go_on):
    name = go_on().asked.batch
    nightly = go_on(run="run-2", votes="b")
    assert nightly.asked is None
    assert nightly.sentence == (
        f"nobody is asked: the batch {name} is not complete yet, and starts {THEN} then"
    )
    assert go_on(run="run-3", votes="b", then="retrain/other").asked is not None


def test_rounds_are_counted_since_a_person_asked_and_end(settings, go_on):
    mine = ask(config(prompts=4, then=THEN), settings).batch
    second = go_on(run="run-1", votes="a", key=end(settings, mine), rounds=3)
    assert second.number == 1
    third = go_on(run="run-2", votes="b", key=end(settings, second.asked.batch), rounds=3)
    assert third.number == 2
    key = end(settings, third.asked.batch)
    last = go_on(run="run-3", votes="c", key=key, rounds=3)
    assert (last.number, last.asked) == (3, None)
    assert "round 3 was the last of 3" in last.why
    # A schedule counts on; a person begins anew.
    assert "round 3 was the last of 3" in go_on(run="nightly", votes="d", rounds=3).why
    again = ask(config(prompts=4, seed=9, then=THEN), settings).batch
    assert go_on(run="run-4", votes="d", key=end(settings, again), rounds=3).asked is not None


def test_without_a_new_vote_there_is_no_new_batch(settings, go_on):
    first = go_on().asked.batch
    end(settings, first)
    ended = go_on(run="run-2")
    assert ended.asked is None
    assert ended.why == f"the batch {first} is complete, and no vote has come since"
    end(settings, go_on(run="run-3", votes="b").asked.batch)
    assert len(rows(settings, Batch)) == 2


def test_without_a_policy_nobody_is_asked(go_on):
    assert go_on(model=None).why == "shop has no champion yet"


# ---- with a judge ----


@pytest.fixture
def judging(monkeypatch):
    """The judge of the config prefers the longer answer; its module is where the program is."""
    monkeypatch.chdir(Path(__file__).parents[1] / "routing")
    monkeypatch.syspath_prepend(".")
    return {"judge": {"source": "biased_judges:longer"}, "router": {"audit": 0.3}}


def test_a_judge_answers_new_pairs_and_people_get_the_others(settings, judging):
    asked = ask(config(prompts=30, **judging), settings)
    made = rows(settings)
    arms = Counter(pair.arm for pair in made)
    assert asked.judge == "judge:biased_judges:longer"
    assert (asked.alone, asked.audited) == (arms["judge"], arms["audit"])
    # Of one length, where the first is called better; they have the arms of any new pair.
    assert asked.unsure == sum(arms.values()) - arms["judge"] - arms["audit"]
    assert asked.alone + asked.audited + asked.unsure == asked.pairs == len(made)
    assert min(asked.alone, asked.audited) > 0
    assert {pair.wanted for pair in made if pair.arm == "judge"} == {0}
    assert {(pair.wanted, pair.state) for pair in made if pair.arm != "judge"} == {(1, "open")}
    assert f"{asked.pairs - asked.alone} pairs on" in asked.sentence
    assert f"{asked.alone} more are answered by judge:biased_judges:longer alone" in asked.sentence
    assert ask(config(prompts=30, **judging), settings) == asked
    assert len(rows(settings, Judgment)) == 2 * asked.pairs


def test_a_batch_is_complete_when_people_have_answered_their_part(settings, judging):
    asked = ask(config(prompts=30, **judging), settings)
    store = Store.open(settings)
    project = store.project("shop")
    batch = project.content.batch(asked.batch, "ask")
    stand = batches.stand(project, batch)
    assert stand.pairs == asked.pairs - asked.alone
    assert not stand.complete
    project.change("x", {"repeat_every": 0})
    assert len(label(project, invited(store, project))) == stand.pairs
    assert batches.stand(project, batch).complete
    store.close()


def test_a_judge_that_does_not_work_is_found_before_anything_is_sampled(settings, judging):
    wrong = {"judge": {"source": "biased_judges:nobody"}}
    with pytest.raises(ConfigError, match="biased_judges"):
        ask(config(**wrong), settings)
    assert rows(settings) == rows(settings, Batch) == []

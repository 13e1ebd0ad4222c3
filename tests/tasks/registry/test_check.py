"""Registered models that a config names are looked up without a server, or it is said."""

import pytest

from rlhf_core.errors import ModelError
from tasks.record.record import Record
from tasks.registry.check import check_models
from tasks.registry.refs import place_of
from tasks.settings import Settings


@pytest.fixture
def registered(settings, policy_dir):
    """A home with version 1 of `demo-sft`, whose alias is `best`."""
    record = Record.open(settings)
    run = record.client.create_run(record.client.create_experiment("demo")).info.run_id
    record.store.set_alias(
        record.store.publish(policy_dir, "demo-sft", run_id=run, tags={}), "best"
    )
    return settings


def test_what_is_there_is_found_by_version_and_alias(registered):
    assert check_models(["models:/demo-sft/1", "models:/demo-sft@best"], registered) == ""


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("models:/demo-sft/2", "'demo-sft' has the versions 1, in the home {home}"),
        ("models:/demo-sft@champion", "points to no version; 'demo-sft' has the versions 1"),
        (
            "models:/other/1",
            "there is no model 'other'; the registered models are demo-sft, in the",
        ),
        ("models:/demo-sft", "is not a model reference; write models:/name/3"),
        ("models:/demo-sft/99999999999999999999", "is not a model reference"),
        (f"models:/{'a' * 5000}/1", "…' is not a model reference"),
    ],
)
def test_what_is_not_there_is_named_with_the_home(registered, uri, said):
    with pytest.raises(ModelError) as error:
        check_models([uri], registered)
    assert said.format(home=registered.home) in str(error.value)
    assert len(str(error.value)) < 500


def test_a_home_without_a_database_has_no_model_and_gets_none(tmp_path):
    settings = Settings.model_validate({"RLHF_HOME": tmp_path / "new"})
    with pytest.raises(ModelError, match=f"no model is registered in {tmp_path}/new yet"):
        check_models(["models:/demo-sft/1"], settings)
    assert not (tmp_path / "new").exists()


def test_nothing_to_look_up_asks_nobody(tmp_path):
    given = {"RLHF_HOME": tmp_path, "MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}
    assert check_models([], Settings.model_validate(given)) == ""


def test_a_server_that_does_not_answer_is_one_sentence_without_its_password(tmp_path):
    given = {"RLHF_HOME": tmp_path, "MLFLOW_TRACKING_URI": "http://me:secret@127.0.0.1:1"}
    said = check_models(["models:/demo-sft/1"], Settings.model_validate(given))
    assert said.startswith(
        "Not checked: models:/demo-sft/1, because the MLflow server at http://me:***"
    )
    assert "secret" not in said
    assert said.count(". ") == 0


def test_a_place_is_named_as_its_owner_knows_it(tmp_path):
    assert place_of(f"sqlite:///{tmp_path}/.rlhf/mlflow/mlflow.db") == f"the home {tmp_path}/.rlhf"
    assert place_of("sqlite:////data/other.db") == "the database /data/other.db"
    assert place_of("http://mlflow:5000") == "the MLflow at http://mlflow:5000"

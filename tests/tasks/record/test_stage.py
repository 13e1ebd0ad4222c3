"""A stage's run says what happened, whatever happened; inside Prefect it shows it there too."""

import json
import logging
import shutil
import sqlite3
import subprocess
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure
from mlflow import MlflowClient
from pydantic import Field

from rlhf_core.backbone.directory import load_policy
from rlhf_core.config import Section
from rlhf_core.errors import ConfigError, ModelError, UserError
from rlhf_core.types import Report
from tasks.prefect.ui import PrefectRun, artifact_key
from tasks.record import identity
from tasks.record.describe import ensure_experiment, flatten, run_url
from tasks.record.identity import code_identity
from tasks.record.record import Record
from tasks.record.run import open_run
from tasks.record.stage import open_stage
from tasks.record.tracking import connect
from tasks.registry.model_store import MlflowModelStore
from tasks.registry.refs import DatasetRef, ModelRef
from tasks.settings import Settings


class AdapterConfig(Section):
    rank: int = Field(8, description="rank")


class ToyConfig(Section):
    learning_rate: float = Field(0.001, description="step size")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay rates")
    note: str = Field("", description="text")
    adapter: AdapterConfig = Field(default_factory=AdapterConfig, description="nested")


@dataclass(frozen=True, kw_only=True)
class ToyReport(Report):
    accuracy: float
    steps: int


@pytest.fixture
def client(settings) -> MlflowClient:
    return connect(settings)


@pytest.fixture
def store(client):
    return MlflowModelStore(client)


@pytest.fixture
def run(settings):
    with open_run("demo", ToyConfig(), seed=7, settings=settings) as made:
        yield made


@pytest.fixture
def stage(run, settings):
    """A function that opens a stage of the pipeline run."""

    def _open(name="sft", config=None, inputs=None, **more):
        return open_stage(
            name,
            config=config or ToyConfig(),
            run=run,
            inputs=inputs or {},
            record=Record.open(settings, patient=True),
            **more,
        )

    return _open


@pytest.fixture
def prepared(stage, data_dir) -> DatasetRef:
    with stage("prepare") as opened:
        return opened.publish_data(data_dir)


def toy_report() -> ToyReport:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    table = pd.DataFrame({"prompt": ["a", "b"], "reward": [0.5, float("nan")]})
    return ToyReport(
        accuracy=0.75, steps=12, tables={"samples": table}, figures={"learning": figure}
    )


def artifacts(client, run_id, folder=None):
    return sorted(item.path for item in client.list_artifacts(run_id, folder))


def test_a_stage_is_a_child_run_with_its_settings(client, run, stage):
    config = ToyConfig(note="x" * 9000)
    with stage(config=config) as opened:
        work = opened.work
        assert sorted(path.name for path in work.iterdir()) == ["lock", "run.json"]
    child = client.get_run(opened.run_id)
    assert child.info.status == "FINISHED"
    assert child.info.run_name == "sft-seed-7"
    assert child.info.experiment_id == run.experiment_id
    assert child.data.params == {
        "sft.learning_rate": "0.001",
        "sft.betas": "[0.9, 0.95]",
        "sft.note": "x" * 5999 + "…",
        "sft.adapter.rank": "8",
        "seed": "7",
    }
    tags = child.data.tags
    assert tags["mlflow.parentRunId"] == run.run_id
    assert (tags["stage"], tags["seed"]) == ("sft", "7")
    assert tags["code_version"] == code_identity()["code_version"]
    stored = client.download_artifacts(opened.run_id, "config.yaml")
    assert ToyConfig.model_validate(yaml.safe_load(Path(stored).read_text())["sft"]) == config
    assert not work.exists()


def test_the_pipeline_run_ends_with_its_block(client, settings):
    with open_run("demo", ToyConfig(), seed=3, settings=settings) as run:
        assert client.get_run(run.run_id).info.status == "RUNNING"
    ended = client.get_run(run.run_id)
    assert ended.info.status == "FINISHED"
    assert ended.data.params["learning_rate"] == "0.001"
    assert client.get_experiment(run.experiment_id).name == "demo"
    assert artifacts(client, run.run_id) == ["config.yaml"]


def test_two_stages_hand_over_through_the_registry_alone(
    client, store, stage, settings, prepared, policy_dir, run
):
    with stage("sft", inputs={"data": prepared}) as sft:
        assert (sft.fetch(prepared) / "prompts.train.jsonl").exists()
        refs = sft.publish({"sft": policy_dir})
    assert refs == {"sft": ModelRef(name="demo-sft", version=1)}
    shutil.rmtree(settings.home / "work")
    with stage("ppo", inputs={"sft": refs["sft"], "data": prepared}) as ppo:
        model, _ = load_policy(ppo.fetch(refs["sft"]))
        assert model.config.n_embd == 32
        assert ppo.fetch(refs["sft"]) == ppo.fetch(refs["sft"])  # once
        made = ppo.publish({"policy": policy_dir, "critic": policy_dir})
    tags = store.tags(made["policy"])
    assert made == {
        "policy": ModelRef(name="demo-policy", version=1),
        "critic": ModelRef(name="demo-critic", version=1),
    }
    expected = {
        "parent.sft": "models:/demo-sft/1",
        "data_digest": prepared.digest,
        "git_commit": code_identity()["git_commit"],
        "seed": "7",
        "run_id": ppo.run_id,
        "pipeline_run_id": run.run_id,
        "kind": "policy",
    }
    assert expected.items() <= tags.items()
    # And the other way: from the run to what went in and what came out.
    child = client.get_run(ppo.run_id)
    there = {
        "input.sft": "models:/demo-sft/1",
        "input.data": f"runs:/{prepared.run_id}/data",
        "output.policy": "models:/demo-policy/1",
        "output.critic": "models:/demo-critic/1",
        "data_digest": prepared.digest,
    }
    assert there.items() <= child.data.tags.items()
    parent_id = store.tags(refs["sft"])["logged_model_id"]
    assert [m.model_id for m in child.inputs.model_inputs] == [parent_id]
    assert {m.model_id for m in child.outputs.model_outputs} == {
        store.tags(ref)["logged_model_id"] for ref in made.values()
    }


@pytest.mark.parametrize("context", ["training", "evaluation"])
def test_the_data_is_an_input_with_its_digest_and_use(client, stage, prepared, context):
    with stage("reward_model", inputs={"data": prepared}, context=context) as opened:
        pass
    (entry,) = client.get_run(opened.run_id).inputs.dataset_inputs
    assert entry.dataset.digest == prepared.digest
    assert json.loads(entry.dataset.source) == {"uri": prepared.uri}
    assert {tag.key: tag.value for tag in entry.tags} == {"mlflow.data.context": context}


def test_a_report_is_stored_in_full(client, stage, tmp_path):
    with stage() as opened:
        opened.record(toy_report())
        opened.logger.metrics({"loss": 2.0}, step=1)
    child = client.get_run(opened.run_id)
    assert child.data.metrics == {"summary/accuracy": 0.75, "summary/steps": 12.0, "loss": 2.0}
    assert json.loads(child.data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "tables/samples.json", "type": "table"}
    ]
    table = Path(client.download_artifacts(opened.run_id, "tables/samples.json", str(tmp_path)))
    assert json.loads(table.read_text()) == {
        "columns": ["prompt", "reward"],
        "data": [["a", 0.5], ["b", None]],
    }
    png = Path(client.download_artifacts(opened.run_id, "figures/learning.png", str(tmp_path)))
    assert png.read_bytes().startswith(b"\x89PNG")


class Cancelled(BaseException):
    """As Prefect's TerminationSignal: nothing that `except Exception` catches."""


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("too hot"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (Cancelled(), "KILLED")],
)
def test_a_stage_that_breaks_says_so_and_leaves_no_version(
    client, store, stage, prepared, policy_dir, error, status
):
    with stage("sft", inputs={"data": prepared}) as earlier:
        kept = earlier.publish({"sft": policy_dir})["sft"]
    opened = None

    def broken():
        nonlocal opened
        with stage("sft", inputs={"data": prepared}) as opened:
            opened.logger.metrics({"loss": 4.0}, step=9)
            opened.publish({"sft": policy_dir, "critic": policy_dir})
            raise error

    with pytest.raises(type(error)) as raised:
        broken()
    assert raised.value is error
    child = client.get_run(opened.run_id)
    assert child.info.status == status
    assert child.data.tags["error"] == f"{type(error).__name__}: {error}"
    assert not [name for name in child.data.tags if name.startswith("output.")]
    assert child.data.metrics["loss"] == 4.0
    assert store.names() == ["demo-sft"]
    assert store.versions("demo-sft") == [kept.version]
    assert not opened.work.exists()


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_pipeline_that_breaks_says_so(client, settings, error, status):
    with (
        pytest.raises(type(error)),
        open_run("demo", ToyConfig(), seed=0, settings=settings) as run,
    ):
        raise error
    assert client.get_run(run.run_id).info.status == status


def test_prefect_s_cancellation_ends_killed(client, stage):
    from prefect.exceptions import TerminationSignal

    with pytest.raises(TerminationSignal), stage() as opened:
        raise TerminationSignal(signal=15)
    assert client.get_run(opened.run_id).info.status == "KILLED"


def test_an_upload_that_fails_registers_nothing(client, store, stage, policy_dir, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="no safetensors"), stage() as opened:
        opened.publish({"policy": policy_dir, "critic": empty})
    assert store.names() == []
    assert client.get_run(opened.run_id).info.status == "FAILED"


def test_metrics_that_cannot_be_written_fail_the_stage(client, store, stage, settings, policy_dir):
    opened = None

    def broken():
        nonlocal opened
        with stage() as opened:
            opened.publish({"sft": policy_dir})
            opened.logger.metrics({"loss": 1.0}, step=0)
            with closing(sqlite3.connect(settings.home / "mlflow" / "mlflow.db")) as database:
                database.execute("ALTER TABLE metrics RENAME TO lost")

    with pytest.raises(UserError, match="could not be written"):
        broken()
    assert client.get_run(opened.run_id).info.status == "FAILED"
    assert store.names() == []


def test_an_input_that_is_gone_fails_the_stage_with_what_there_is(client, stage, policy_dir):
    with stage() as opened:
        opened.publish({"sft": policy_dir})
    gone = ModelRef(name="demo-sft", version=5)
    with (
        pytest.raises(ModelError, match="'demo-sft' has the versions 1"),
        stage("ppo", inputs={"sft": gone}),
    ):
        pytest.fail("the block must not run")


def test_a_project_s_artifacts_lie_under_home(client, run, settings):
    location = client.get_experiment(run.experiment_id).artifact_location
    assert location == (settings.home / "mlflow" / "artifacts" / "demo").as_uri()


def test_a_deleted_experiment_is_said_with_the_way_out(client, settings):
    client.delete_experiment(ensure_experiment(client, "gone", settings))
    with pytest.raises(ConfigError, match="'gone' was deleted; restore it"):
        ensure_experiment(client, "gone", settings)


def test_long_and_nested_settings_are_flat():
    assert flatten({"a": {"b": [1, None], "c": "text"}, "d": True}, "x.") == {
        "x.a.b": "[1, null]",
        "x.a.c": "text",
        "x.d": "true",
    }


def test_links_come_from_the_public_address():
    settings = Settings.model_validate({"RLHF_MLFLOW_URL": "https://mlflow.example.org/"})
    assert run_url("abc", "4", settings) == (
        "https://mlflow.example.org/#/experiments/4/runs/abc?workflowType=machine_learning"
    )


@pytest.mark.parametrize(
    ("parts", "key"), [(("Demo_1", "sft"), "demo-1-sft"), (("ä b", "x/y"), "b-x-y")]
)
def test_artifact_keys_are_what_prefect_takes(parts, key):
    assert artifact_key(*parts) == key


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git checkout that `tasks/record/identity.py` seems to lie in."""
    here = tmp_path / "checkout"
    here.mkdir()
    (here / "identity.py").write_text("code")
    monkeypatch.setattr(identity, "__file__", str(here / "identity.py"))
    code_identity.cache_clear()
    yield here
    code_identity.cache_clear()


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_the_commit_is_known_in_a_checkout_and_only_there(checkout):
    assert code_identity()["git_commit"] == "unknown"
    git(checkout, "init")
    code_identity.cache_clear()
    assert code_identity()["git_commit"] == "unknown"  # in a repository, but not of it
    git(checkout, "add", "identity.py")
    git(checkout, "commit", "-m", "x")
    code_identity.cache_clear()
    commit = git(checkout, "rev-parse", "HEAD")
    assert code_identity()["git_commit"] == commit
    assert code_identity()["git_dirty"] == "false"
    (checkout / "identity.py").write_text("changed")
    code_identity.cache_clear()
    assert code_identity()["git_dirty"] == "true"


def test_inside_prefect_the_run_shows_progress_results_and_links(
    prefect_server, home, client, settings, policy_dir
):
    from prefect import flow, get_client, task
    from prefect.client.schemas.filters import (
        ArtifactFilter,
        ArtifactFilterFlowRunId,
        LogFilter,
        LogFilterFlowRunId,
    )
    from prefect.runtime import flow_run

    @task(name="sft")
    def train(run):
        with open_stage(
            "sft", record=Record.open(), config=ToyConfig(), run=run, inputs={}
        ) as opened:
            logging.getLogger("rlhf_core.stages.sft").info("epoch %d of 1", 1)
            for done in range(1, 6):
                opened.logger.progress(done, 5, "training")
            opened.record(toy_report())
            return opened.run_id, opened.publish({"sft": policy_dir})["sft"]

    @flow
    def pipeline():
        with open_run("demo", ToyConfig(), seed=7) as run:
            return run, train(run), flow_run.id

    run, (run_id, ref), flow_run_id = pipeline()

    tags = client.get_run(run_id).data.tags
    assert tags["prefect.flow_run_id"] == str(flow_run_id)
    url = f"{settings.prefect_public_url}/runs/flow-run/{flow_run_id}"
    assert tags["prefect.flow_run_url"] == url
    assert tags["prefect.task_run_id"]
    assert client.get_run(run.run_id).data.tags["prefect.flow_run_id"] == str(flow_run_id)
    assert MlflowModelStore(client).tags(ref)["prefect.flow_run_id"] == str(flow_run_id)

    with get_client(sync_client=True) as prefect:
        of_flow = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        shown = {a.key: a for a in prefect.read_artifacts(artifact_filter=of_flow)}
        wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id]))
        deadline = time.monotonic() + 30  # Prefect sends log lines a little later
        while "epoch 1 of 1" not in (lines := [x.message for x in prefect.read_logs(wanted)]):
            assert time.monotonic() < deadline, lines
            time.sleep(0.2)
    assert sorted(shown) == [
        "demo-sft-figures",
        "demo-sft-mlflow",
        "demo-sft-progress",
        "demo-sft-samples",
        "demo-sft-summary",
    ]
    assert {str(a.task_run_id) for a in shown.values()} == {tags["prefect.task_run_id"]}
    assert shown["demo-sft-progress"].data == 100.0
    assert run_url(run_id, run.experiment_id, settings) in shown["demo-sft-mlflow"].data
    assert "data:image/png;base64," in shown["demo-sft-figures"].data
    assert json.loads(shown["demo-sft-summary"].data) == [
        {"metric": "accuracy", "value": 0.75},
        {"metric": "steps", "value": 12.0},
    ]
    assert json.loads(shown["demo-sft-samples"].data)[1] == {"prompt": "b", "reward": None}


def test_there_is_no_prefect_run_outside_prefect():
    assert PrefectRun.current() is None

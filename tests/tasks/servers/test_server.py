"""The same hand-over through an MLflow server, which keeps the artifacts as well."""

import math
import shutil

import pytest

from rlhf_core.config import Section
from tasks.record.stage import open_run, open_stage
from tasks.record.tracking import connect
from tasks.registry.model_store import MlflowModelStore, ModelRef, model_digest
from tasks.settings import Settings


class NoConfig(Section):
    """Nothing to set."""


@pytest.fixture
def settings(start_server, migrated_database, tmp_path):
    options = ("-w", "1", "--serve-artifacts", "--artifacts-destination", str(tmp_path / "bytes"))
    database = shutil.copy(migrated_database, tmp_path / "server.db")
    store = ("--backend-store-uri", f"sqlite:///{database}")
    url = start_server("server", *options, *store, page="/health")
    return Settings.model_validate({"RLHF_HOME": tmp_path / "home", "MLFLOW_TRACKING_URI": url})


@pytest.mark.integration
def test_a_pipeline_hands_over_through_a_server(settings, policy_dir, data_dir, tmp_path):
    client = connect(settings)
    store = MlflowModelStore(client)

    def stage(name, run, **inputs):
        return open_stage(name, config=NoConfig(), run=run, inputs=inputs, settings=settings)

    def broken(run):
        with stage("ppo", run, sft=sft, data=data) as opened:
            assert (opened.fetch(data) / "prompts.train.jsonl").exists()
            opened.publish({"sft": opened.fetch(sft)})
            raise KeyboardInterrupt

    with open_run("through-a-server", NoConfig(), seed=1, settings=settings) as run:
        with stage("prepare", run) as opened:
            data = opened.publish_data(data_dir)
        with stage("sft", run, data=data) as opened:
            for step in range(2000):
                opened.logger.metrics({"loss": step, "gap": math.inf}, step)
            sft = opened.publish({"sft": policy_dir})["sft"]
        with pytest.raises(KeyboardInterrupt):
            broken(run)

    assert sft == ModelRef(name="through-a-server-sft", version=1)
    assert store.versions(sft.name) == [1]
    got = store.fetch(sft, tmp_path / "fetched")
    assert model_digest(got) == model_digest(policy_dir)
    store.set_alias(sft, "champion")
    assert store.resolve("models:/through-a-server-sft@champion") == sft
    assert store.get_alias(sft.name, "none") is None
    history = client.get_metric_history(store.tags(sft)["run_id"], "loss")
    assert [metric.value for metric in history] == list(range(2000))
    gap = client.get_run(store.tags(sft)["run_id"]).data.metrics["gap"]
    assert math.isnan(gap)
    statuses = [child.info.status for child in client.search_runs([run.experiment_id])]
    assert sorted(statuses) == ["FINISHED", "FINISHED", "FINISHED", "KILLED"]
    assert not (tmp_path / "home" / "mlflow" / "artifacts").exists()

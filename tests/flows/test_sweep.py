"""A grid of settings becomes pipelines, which share what they can and are compared in the end."""

import math
import re

import pytest
from mlflow import MlflowClient
from test_pipeline import TINY

from flows.config import PipelineConfig
from flows.sweep import as_sweep, sweep
from rlhf_core.errors import ConfigError, UserError
from rlhf_core.figures import unbeaten
from tasks.registry.model_store import MlflowModelStore

PIPELINE = PipelineConfig.model_validate({**TINY, "project": "swept"})


def test_every_combination_with_every_seed():
    asked = as_sweep(PIPELINE, ["ppo.kl_coef=0.02,0.1", "sft.epochs=1,2,3"], seeds=2)
    points = list(asked.points())
    found = {(p.config.ppo.kl_coef, p.config.sft.epochs, p.config.seed) for p in points}
    assert len(points) == len(found) == 12
    assert found == {(k, e, s) for k in (0.02, 0.1) for e in (1, 2, 3) for s in (0, 1)}
    assert points[0].about.label == "kl_coef=0.02, epochs=1, seed 0"
    # Nothing else has changed.
    rest = {"seed", "ppo", "sft"}
    expected = PIPELINE.model_dump(exclude=rest)
    assert all(point.config.model_dump(exclude=rest) == expected for point in points)


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("ppo.kl_coeff=0.1", "there is no such setting"),
        ("nothing.at.all=0.1", "there is no such setting"),
        ("ppo.kl_coef=0.1,-1", r"kl_coef=-1, seed 0: ppo\.kl_coef: .*greater than or equal to 0"),
        ("ppo.kl_coef", "write it as section.key=value"),
    ],
)
def test_a_mistake_in_the_grid_is_said_before_anything_runs(grid, said):
    with pytest.raises(ConfigError, match=said):
        as_sweep(PIPELINE, [grid], seeds=1)


def test_the_points_that_no_other_beats():
    points = [(3.0, 1.0), (1.0, 0.5), (2.0, 0.4), (4.0, 0.9), (3.0, 0.8), (5.0, 1.2)]
    assert unbeaten(points) == [(1.0, 0.5), (3.0, 1.0), (5.0, 1.2)]
    assert unbeaten([]) == []


@pytest.mark.faults
@pytest.mark.integration
def test_points_share_their_stages_and_end_in_one_table(home, settings, prefect_server):
    report = sweep(as_sweep(PIPELINE, ["ppo.kl_coef=0.05,0.5"], 1))
    client = MlflowClient(tracking_uri=settings.mlflow_uri)
    store = MlflowModelStore(client)
    assert store.versions("swept-sft") == store.versions("swept-reward") == [1]
    assert store.versions("swept-policy") == [1, 2]
    assert store.get_alias("swept-policy", "champion") is None
    experiment = client.get_experiment_by_name("swept").experiment_id
    (parent,) = client.search_runs([experiment], "tags.stage = 'sweep'")
    assert parent.info.status == "FINISHED"
    points = client.search_runs([experiment], "tags.stage = 'pipeline'")
    assert {p.data.tags["mlflow.parentRunId"] for p in points} == {parent.info.run_id}
    assert {p.info.run_name for p in points} == {"kl_coef=0.05, seed 0", "kl_coef=0.5, seed 0"}
    (frontier,) = client.search_runs([experiment], "tags.stage = 'frontier'")
    for folder, file in (("tables", "frontier.json"), ("figures", "frontier.png")):
        kept = client.list_artifacts(frontier.info.run_id, folder)
        assert f"{folder}/{file}" in [artifact.path for artifact in kept]
    # The plot is with the child, and its link leads there.
    assert re.search(rf"frontier\.png`\): http\S+/runs/{frontier.info.run_id}\?", report)
    assert re.search(rf"Every run: http\S+/runs/{parent.info.run_id}\?", report)
    for words in ("| kl_coef=0.05 | 0 |", "`models:/swept-policy/2`", "true reward"):
        assert words in report
    # Again: everything is there already.
    assert sweep(as_sweep(PIPELINE, ["ppo.kl_coef=0.05,0.5"], 1)).count("models:/swept-policy") == 2
    assert store.versions("swept-policy") == [1, 2]


@pytest.mark.faults
@pytest.mark.integration
def test_a_point_that_fails_does_not_stop_the_others(home, settings, prefect_server):
    # A learning rate at which the very first update is not finite any more.
    asked = as_sweep(PIPELINE, [f"sft.learning_rate={math.pow(10, 30):g},0.003"], 1)
    with pytest.raises(UserError, match="1 of 2 points failed") as caught:
        sweep(asked)
    assert "models:/swept-policy/1" in str(caught.value)
    client = MlflowClient(tracking_uri=settings.mlflow_uri)
    experiment = client.get_experiment_by_name("swept").experiment_id
    points = client.search_runs([experiment], "tags.stage = 'pipeline'")
    assert sorted(point.info.status for point in points) == ["FAILED", "FINISHED"]

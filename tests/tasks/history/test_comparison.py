"""Two pipeline runs in a real MLflow, compared."""

import json
import math
from importlib.metadata import version
from urllib.parse import parse_qs, urlsplit

import pytest
from mlflow import MlflowClient
from pydantic import Field

from rlhf_core.config import Section
from rlhf_core.errors import UserError
from rlhf_core.types import Report
from tasks.history.comparison import MetricRow, ParamRow, StageRow, compare
from tasks.record.record import Record
from tasks.record.run import open_run
from tasks.record.stage import open_stage


class Training(Section):
    kl_coef: float = Field(0.1, description="Weight.")
    steps: int = Field(5, description="Updates.")


class Pipeline(Section):
    project: str = Field("p", description="Name.")
    ppo: Training = Field(Training(), description="Policy.")


@pytest.fixture
def runs(home):
    """Two runs of one project; the second has another KL weight and no evaluation."""

    def record(kl_coef, stages):
        config = Pipeline(ppo=Training(kl_coef=kl_coef))
        with open_run("p", config, seed=1) as run:
            for name, values in stages.items():
                with open_stage(
                    name, record=Record.open(), config=config.ppo, run=run, inputs={}
                ) as stage:
                    for step, loss in enumerate(values):
                        stage.logger.metrics({"loss": loss}, step)
        return run.run_id

    return record(0.1, {"sft": [3.0, 2.0], "evaluation": [0.5]}), record(0.2, {"sft": [3.0, 2.5]})


def test_what_differs_is_told(runs, settings):
    found = compare(runs[0], runs[1], settings=settings)
    assert found.params == (ParamRow(stage="ppo", name="kl_coef", first="0.1", second="0.2"),)
    # The last value of each metric counts: 2.0 and 2.5.
    assert found.metrics == (
        MetricRow(stage="sft", name="loss", first=2.0, second=2.5),
        MetricRow(stage="evaluation", name="loss", first=0.5, second=None),
    )
    assert [row.difference for row in found.metrics] == [0.5, None]
    dumped = json.loads(found.model_dump_json())
    assert [row["difference"] for row in dumped["metrics"]] == [0.5, None]
    assert [run.status for run in found.runs] == ["FINISHED", "FINISHED"]
    assert [run.run_id for run in found.runs] == list(runs)


def test_a_stage_that_only_one_run_has_is_told_as_a_stage(runs, settings):
    found = compare(*runs, settings=settings)
    assert found.differing_stages() == [StageRow(stage="evaluation", first="FINISHED", second=None)]
    # Its metrics are no difference of their own: they are not in the other run at all.
    assert [(m.stage, m.name) for m in found.differing_measures()] == [("sft", "loss")]
    assert [m.stage for m in found.measures()] == ["sft", "evaluation"]


def test_a_run_compared_with_itself_has_no_difference(runs, settings):
    found = compare(runs[0], runs[0], settings=settings)
    assert found.params == ()
    # project, ppo.kl_coef, ppo.steps and the seed.
    assert len(found.same_params) == 4
    assert found.differing_stages() == found.differing_measures() == []
    assert {row.difference for row in found.metrics} == {0.0}


def test_the_bounds_of_a_metric_stand_with_it(home, settings):
    def record(values):
        with (
            open_run("p", Pipeline(), seed=1) as run,
            open_stage(
                "evaluation", record=Record.open(), config=Training(), run=run, inputs={}
            ) as stage,
        ):
            stage.logger.metrics({f"summary/{name}": value for name, value in values.items()}, 0)
        client = MlflowClient(settings.mlflow_uri)
        for name, value in values.items():  # as the closing report does
            client.log_metric(run.run_id, name, value)
        return run.run_id

    nan = math.nan
    first = record({"x": 0.5, "x_low": 0.4, "x_high": 0.6, "y": nan, "z_low": 1.0, "same": 2.0})
    second = record({"x": 0.5, "x_low": 0.3, "x_high": 0.6, "y": nan, "z_low": 3.0, "same": 2.0})
    found = compare(first, second, settings=settings)
    # x has another lower bound; z_low is the bound of nothing; the pipeline repeats both.
    told = [tuple(measure) for measure in found.differing_measures()]
    assert told == [
        ("evaluation", "summary/x", (0.5, 0.4, 0.6), (0.5, 0.3, 0.6), 0.0, True),
        ("evaluation", "summary/z_low", (1.0, None, None), (3.0, None, None), 2.0, True),
    ]
    assert len(found.measures()) == 8
    assert len(found.metrics) == 12


def test_a_cached_stage_has_the_curves_of_the_run_that_did_the_work(home, settings):
    def record():
        config = Pipeline()
        with (
            open_run("p", config, seed=1) as run,
            open_stage(
                "sft", record=Record.open(), config=config.ppo, run=run, inputs={}, reuse="any"
            ) as stage,
        ):
            if not stage.cached:
                stage.logger.metrics({"loss": 2.0}, 0)
                stage.record(Report(tables={}, figures={}))
                stage.keep(config.ppo)
        return run.run_id, stage

    first, _ = record()
    second, cached = record()
    assert cached.cached
    client = MlflowClient(settings.mlflow_uri)
    assert client.get_run(cached.run_id).data.metrics == {}
    found = compare(first, second, settings=settings)
    assert found.metrics == (MetricRow(stage="sft", name="loss", first=2.0, second=2.0),)
    assert found.differing_measures() == []


def test_the_code_of_each_run_is_told(runs, settings):
    MlflowClient(settings.mlflow_uri).set_tag(runs[1], "git_commit", "0123456789abcdef")
    found = compare(*runs, settings=settings)
    release = version("rlhf-pipeline")
    assert found.runs[1].code.startswith(f"release {release}, commit 0123456789ab")
    assert "abcdef" not in found.runs[1].code


def test_the_start_of_an_id_is_enough(runs, settings):
    length = next(n for n in range(1, 33) if runs[0][:n] != runs[1][:n])
    found = compare(runs[0][:length], runs[1], settings=settings)
    assert found.runs[0].run_id == runs[0]


def test_an_ambiguous_name_asks_for_an_id(runs, settings):
    with pytest.raises(UserError, match="2 runs match 'p-seed-1'") as caught:
        compare("p-seed-1", runs[1], settings=settings)
    assert runs[0][:12] in str(caught.value)


def test_an_unknown_run_lists_the_newest(runs, settings):
    with pytest.raises(UserError, match="no pipeline run matches 'nothing'") as caught:
        compare("nothing", runs[1], settings=settings)
    assert runs[1][:8] in str(caught.value)


def test_without_any_run_the_way_to_one_is_told(settings):
    with pytest.raises(UserError, match="start one with `rlhf run`"):
        compare("a", "b", settings=settings)


def test_the_links_lead_to_the_runs(runs, settings):
    found = compare(*runs, settings=settings)
    for run in found.runs:
        assert run.url.startswith(settings.mlflow_public_url)
        assert run.run_id in run.url
    query = parse_qs(urlsplit(urlsplit(found.url).fragment).query)
    assert json.loads(query["runs"][0]) == list(runs)
    assert len(json.loads(query["experiments"][0])) == 1

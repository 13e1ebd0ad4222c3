"""Two pipeline runs in a real MLflow, compared."""

import json
from urllib.parse import parse_qs, urlsplit

import pytest
from pydantic import Field

from rlhf_core.config import Section
from rlhf_core.errors import UserError
from tasks.comparison import MetricRow, ParamRow, compare
from tasks.stage import open_run, open_stage


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
                with open_stage(name, config=config.ppo, run=run, inputs={}) as stage:
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


def test_a_run_compared_with_itself_has_no_difference(runs, settings):
    found = compare(runs[0], runs[0], settings=settings)
    assert found.params == ()
    assert {row.difference for row in found.metrics} == {0.0}


def test_the_start_of_an_id_is_enough(runs, settings):
    length = next(n for n in range(1, 33) if runs[0][:n] != runs[1][:n])
    found = compare(runs[0][:length], runs[1], settings=settings)
    assert found.runs[0].run_id == runs[0]


def test_an_ambiguous_name_asks_for_an_id(runs, settings):
    with pytest.raises(UserError, match="2 runs answer to 'p-seed-1'") as caught:
        compare("p-seed-1", runs[1], settings=settings)
    assert runs[0][:12] in str(caught.value)


def test_an_unknown_run_lists_the_newest(runs, settings):
    with pytest.raises(UserError, match="no pipeline run answers to 'nothing'") as caught:
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

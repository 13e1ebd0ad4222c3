"""The over-optimisation chart of runs in a real MLflow."""

import csv
import math

import pytest
from pydantic import Field

from rlhf_core.config import Section
from rlhf_core.errors import UserError
from rlhf_core.evaluation.overoptimisation import Fit
from tasks.history.overoptimisation import overoptimisation, write_chart
from tasks.record.record import Record
from tasks.record.run import open_run
from tasks.record.stage import open_stage

KLS = [0.0, 1.0, 4.0, 9.0, 16.0]


class Training(Section):
    kl_budget: float = Field(9.0, description="Budget.")


class Pipeline(Section):
    project: str = Field("p", description="Name.")
    ppo: Training = Field(Training(), description="Policy.")


def log_form(kl, alpha, beta):
    d = math.sqrt(kl)
    return d * (alpha - beta * math.log(d)) if d else 0.0


@pytest.fixture
def recorded(home):
    def record(stages, seed=1):
        config = Pipeline()
        with open_run("p", config, seed=seed) as run:
            for name, steps in stages.items():
                with open_stage(
                    name, record=Record.open(), config=config.ppo, run=run, inputs={}
                ) as stage:
                    for step, values in steps.items():
                        stage.logger.metrics(values, step)
        return run.run_id

    return record


def rollouts(alpha):
    """Scores that begin at 0.3, as a reward model gives them to SFT on these prompts."""
    return {
        step: {"objective/kl": kl, "objective/score": 0.3 + log_form(kl, alpha, 0.25)}
        for step, kl in enumerate(KLS, start=1)
    }


def bounds(name, value, reach):
    return {name: value, f"{name}_low": value - reach, f"{name}_high": value + reach}


EVALUATED = {
    0: {
        **bounds("summary/policy/kl", 16.0, 1.0),
        **bounds("summary/policy/true_reward", 0.9, 0.3),
        **bounds("summary/sft/true_reward", 0.4, 0.4),
    },
    1: {"best_of_n/kl": 0.0, **bounds("best_of_n/proxy_gain", 0.0, 0.0)},
    2: {"best_of_n/kl": math.log(2) - 0.5, **bounds("best_of_n/proxy_gain", 0.5, 0.1)},
}


def test_runs_that_differ_in_their_seed_are_paths_of_one_chart(recorded, settings):
    ids = [recorded({"ppo": rollouts(alpha)}, seed) for seed, alpha in enumerate((0.9, 1.0, 1.1))]
    chart = overoptimisation(ids, settings=settings)
    assert len(chart.of("on_policy")) == 3
    assert chart.kl_budget == 9
    (fit,) = chart.fits()
    assert isinstance(fit, Fit)
    assert fit.paths == 3
    assert fit.alpha.value == pytest.approx(1.0)
    assert fit.beta.value == pytest.approx(0.25)  # so SFT's 0.3 was subtracted
    assert fit.alpha.low < 0.9
    assert fit.alpha.high > 1.1


def test_the_evaluation_adds_the_truth_of_the_final_policy_and_best_of_n(recorded, settings):
    run = recorded({"ppo": rollouts(1.0), "evaluation": EVALUATED})
    chart = overoptimisation([run], settings=settings)
    (path,), (pool,) = chart.of("on_policy"), chart.of("best_of_n")
    final = path.points[-1]
    assert (final.number, path.chosen) == (6, 6)
    assert final.kl == (16, 15, 17)
    assert final.gains["truth"] == pytest.approx((0.5, 0.0, 1.0))  # 0.5 = √(0.3² + 0.4²)
    assert [point.number for point in pool.points] == [1, 2]
    assert pool.points[1].gains["proxy"] == pytest.approx((0.5, 0.4, 0.6))


def test_a_monitor_brings_the_held_out_reward_model_and_errors_of_the_kl(recorded, settings):
    steps = {
        step: values
        | {
            "monitor/kl": values["objective/kl"] + 1,
            "monitor/kl_error": 0.5,
            "monitor/proxy_gain": 2.0,
            **({"monitor/held_out_gain": 1.0} if step > 1 else {}),
        }
        for step, values in rollouts(1.0).items()
    }
    chart = overoptimisation([recorded({"grpo": steps})], settings=settings)
    (path,) = chart.of("on_policy")
    assert path.points[0].kl == pytest.approx((1, 0.02, 1.98))
    assert [p.gains["proxy"].value for p in path.points] == [2.0] * 5
    assert ["held_out" in p.gains for p in path.points] == [False, True, True, True, True]


def test_a_run_without_iterations_is_one_sentence(recorded, settings):
    run = recorded({"dpo": {1: {"loss": 0.5}}})
    with pytest.raises(UserError, match=r"has no iterations to draw: .*ppo, rloo or grpo"):
        overoptimisation([run], settings=settings)


def test_the_picture_and_its_numbers_are_written(recorded, settings, tmp_path):
    run = recorded({"ppo": rollouts(1.0), "evaluation": EVALUATED})
    chart = overoptimisation([run], settings=settings)
    picture, table = write_chart(chart, tmp_path / "new" / "chart.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["kl"]) for row in rows if row["kind"] == "on_policy"] == [*KLS, 16.0]
    assert [row["number"] for row in rows if row["chosen"] == "True"] == ["6"]
    with pytest.raises(UserError, match=r"chart\.txt is no name of a picture"):
        write_chart(chart, tmp_path / "chart.txt")

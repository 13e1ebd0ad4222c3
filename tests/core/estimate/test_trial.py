"""Trials: how much of a stage they do, and seconds of a run by hand."""

import pytest

from rlhf_core.estimate.clock import Span
from rlhf_core.estimate.trial import STEP, Facts, Trial, run_seconds, trial
from rlhf_core.settings.evaluation import EvaluationConfig, ReportCardConfig
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.onpolicy import GRPOConfig, PPOConfig, RLOOConfig
from rlhf_core.settings.tournament import TournamentConfig
from rlhf_core.settings.training import DPOConfig, RewardModelConfig, SFTConfig

SAMPLING = {"sampling": SamplingConfig()}
STAGES = {
    "sft": SFTConfig(),
    "reward_model": RewardModelConfig(lora_rank=4, members=3),
    "held_out": RewardModelConfig(votes="second_half"),
    "dpo": DPOConfig(epochs=3),
    "ppo": PPOConfig(),
    "rloo": RLOOConfig(group_size=8, rollout_size=64, batch_size=32),
    "grpo": GRPOConfig(group_size=4, rollout_size=32, batch_size=32, micro_batch_size=2),
    "evaluation": EvaluationConfig(),
    "report_card": ReportCardConfig(),
    "tournament": TournamentConfig(checkpoints=5),
}


def facts(parameters=500_000, rows=10_000, held_out=1_000, **more):
    return Facts(
        parameters=parameters,
        train=dict.fromkeys(("demonstrations", "preferences", "prompts"), rows),
        eval=dict.fromkeys(("demonstrations", "preferences", "prompts"), held_out),
        prompt_tokens=20,
        answer_tokens=30,
        demonstration_tokens=50,
        pair_tokens=100,
        **more,
    )


def spans(*given):
    return [Span(what, part, parts, unit, s, s / 2) for what, part, parts, unit, s in given]


def test_a_step_is_the_mean_of_those_after_the_first():
    plan = Trial(config=SFTConfig(), units=100, tried=3)
    found = spans(
        ("loading the model", 0, 0, 0, 5.0),
        ("batch", 0, 1, 0, 9.0),  # warms up
        (STEP, 0, 0, 1, 0.5),
        ("batch", 0, 1, 1, 2.0),
        (STEP, 0, 0, 2, 0.7),
        ("batch", 0, 1, 2, 4.0),
        (STEP, 0, 0, 3, 1.0),  # after the last one: once
    )
    # 5 once, 100 steps of (2 + 4) / 2, 100 pauses of (0.5 + 0.7) / 2, 1 once
    assert run_seconds(plan, found) == pytest.approx(5 + 300 + 60 + 1)
    assert run_seconds(plan, found, cpu=True) == pytest.approx((5 + 300 + 60 + 1) / 2)


def test_more_micro_batches_are_added_without_another_step_of_the_optimizer():
    plan = Trial(config=SFTConfig(), units=10, tried=2, micro=(2, 5))
    found = spans(("batch", 0, 2, 1, 1.0), ("batch", 1, 2, 1, 4.0))
    assert run_seconds(plan, found) == pytest.approx(10 * (4 * 1.0 + 4.0))


def test_what_is_there_once_is_multiplied_by_how_much_more_of_it_the_run_has():
    plan = Trial(config=SFTConfig(), units=10, tried=1, once={"held-out loss": 15})
    found = spans(("held-out loss", 0, 2, 1, 1.0), ("held-out loss", 1, 2, 1, 3.0))
    assert run_seconds(plan, found) == pytest.approx(15 * 4)


def test_an_iteration_has_parts_that_grow_with_its_answers_and_others_that_do_not():
    plan = Trial(
        config=PPOConfig(),
        units=20,
        tried=1,
        unit="iteration",
        of_a_unit={"sampling": 4.0, "updating": 8.0, "saving a milestone": 0.0},
        once={"saving a milestone": 3},
    )
    found = spans(
        ("sampling", 0, 9, 0, 1.0),
        ("updating", 0, 1, 0, 0.5),
        ("saving a milestone", 0, 0, 0, 2.0),
        ("uploading and checking x-milestone", 0, 0, 1, 7.0),
    )
    plan.once["uploading and checking the milestones"] = 2
    assert run_seconds(plan, found) == pytest.approx(20 * (4 * 1.0 + 8 * 0.5) + 3 * 2 + 2 * 7)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("parameters", [10_000, 10**8, 10**10])
@pytest.mark.parametrize(("rows", "held_out"), [(1, 1), (0, 0), (100_000, 20_000)])
def test_a_trial_of_any_size_is_a_valid_config_and_no_more_than_the_run(
    stage, parameters, rows, held_out
):
    config = STAGES[stage]
    plan = trial(stage, config, SAMPLING, facts(parameters, rows, held_out))
    assert type(plan.config).model_validate(plan.config.model_dump()) == plan.config
    assert plan.tried <= max(plan.units, 1) or plan.units == 0
    assert all(factor >= 0 for factor in (*plan.once.values(), *plan.of_a_unit.values()))
    assert all(most >= 1 or rows == 0 for most in plan.rows.values())
    for name in ("rollout_size", "batch_size", "epochs", "iterations", "prompts", "samples"):
        if hasattr(config, name):
            assert getattr(plan.config, name) <= getattr(config, name)


def test_one_row_is_trained_on_as_the_run_does():
    plan = trial("sft", SFTConfig(epochs=2, batch_size=8), {}, facts(rows=1, held_out=1))
    assert (plan.units, plan.tried) == (2, 2)
    assert plan.rows == {("demonstrations", "train"): 1, ("demonstrations", "eval"): 1}


def test_the_steps_are_those_of_the_run():
    plan = trial("sft", SFTConfig(epochs=3, batch_size=32), {}, facts(rows=6472))
    assert plan.units == 3 * 203
    assert plan.says == "609 steps"
    plan = trial("reward_model", RewardModelConfig(batch_size=32), SAMPLING, facts(rows=3252))
    assert plan.units == 102
    # half of the votes are on the prompts of the other half
    held_out = RewardModelConfig(batch_size=32, votes="second_half")
    assert trial("held_out", held_out, SAMPLING, facts(rows=3252)).units == 51
    ppo = PPOConfig(iterations=30, rollout_size=64, batch_size=32, epochs=3)
    plan = trial("ppo", ppo, SAMPLING, facts())
    assert plan.units == 30
    assert plan.says == "30 iterations of 64 answers, 180 updates at most"
    # six updates of one micro-batch an iteration, as many as the trial does, or fewer in it
    tried = plan.config.epochs * -(-plan.config.rollout_size // plan.config.batch_size)
    assert plan.of_a_unit["updating"] == 6 / tried


def test_a_large_model_is_tried_on_fewer_answers_with_the_same_micro_batch():
    config = PPOConfig(rollout_size=64, batch_size=16, micro_batch_size=4, epochs=4)
    plan = trial("ppo", config, SAMPLING, facts(parameters=135_000_000))
    assert plan.config.micro_batch_size == 4
    assert plan.config.rollout_size < 64
    assert plan.of_a_unit["sampling"] == 64 / plan.config.rollout_size

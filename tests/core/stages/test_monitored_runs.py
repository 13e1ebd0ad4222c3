"""The monitor in runs of every on-policy stage: it changes nothing but what it is told to."""

import math
import shutil
import signal

import pytest
from tiny import CONFIGS, MODEL, SAMPLING, World, change, digest, stage_of, work_of

from rlhf_core.backbone.directory import load_saved_tokenizer
from rlhf_core.errors import DataError
from rlhf_core.metrics import MemoryLogger
from rlhf_core.onpolicy.monitor.guard import Guard
from rlhf_core.onpolicy.monitor.rules import Rule
from rlhf_core.settings.model import ModelConfig
from rlhf_core.settings.monitor import MonitorConfig
from rlhf_core.settings.rewards import RewardTerm
from rlhf_core.stages.held_out import train_held_out
from rlhf_core.stages.sft import train_sft
from rlhf_core.stages.table import run_stage
from rlhf_core.training.recovery import Recovery
from rlhf_core.training.session import Interrupted
from rlhf_core.work import Work

ON_POLICY = ("ppo", "ppo_lora", "rloo", "grpo")
TRIPS_AT_ONCE = {"prompts": 4, "confirm": 1, "max_kl": 1e-9, "max_negative_kl": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.build(tmp_path_factory.mktemp("monitored") / "world")


def run(name, world, output, *, monitor=None, held_out=None, data=None, reward=None, **settings):
    """A stage with a monitor; what it logged, and its report."""
    config, log = CONFIGS[name], settings.pop("logger", None) or MemoryLogger()
    parts = {key: settings.pop(key) for key in ("recovery", "sampling") if key in settings}
    settings = {"update_kl_limit": 0, **settings, "monitor": MonitorConfig(**monitor or {})}
    stage, lora = stage_of(config), bool(config.lora_rank)
    work = work_of(stage, world, output, lora=lora, logger=log, **parts)
    others = {"held_out": held_out, "data": data, "reward": reward}
    work.inputs.update({role: path for role, path in others.items() if path})
    return log, run_stage(stage, change(config, **settings), work)


def of_training(log):
    return [
        {name: value for name, value in values.items() if not name.startswith("monitor/")}
        for _, values in log.history
    ]


@pytest.mark.parametrize("name", ON_POLICY)
def test_a_monitor_that_only_warns_changes_no_number_of_training(name, world, tmp_path):
    plain, _ = run(name, world, tmp_path / "plain")
    watch = {"monitor": TRIPS_AT_ONCE, "held_out": world.reward}
    watched, _ = run(name, world, tmp_path / "watched", **watch)
    assert of_training(watched) == of_training(plain)
    assert digest(tmp_path / "watched") == digest(tmp_path / "plain")
    assert "kl" in {alarm.measure for alarm in watched.alarms}
    assert 1 in watched.series("monitor/action")


def test_a_held_out_model_that_is_the_reward_itself_agrees_with_it(world, tmp_path):
    watch = {"monitor": {"prompts": 4}, "held_out": world.reward}
    log, _ = run("ppo", world, tmp_path, **watch)
    assert log.series("monitor/gap") == [0.0] * 3
    assert set(log.series("monitor/agreement")) <= {1.0}


def test_stop_at_the_first_iteration_ends_the_run_there(world, tmp_path, caplog):
    watch = {**TRIPS_AT_ONCE, "at_kl": "stop"}
    log, report = run("ppo", world, tmp_path, monitor=watch, learning_rate=1e-2)
    assert report.iterations == 1
    assert log.series("monitor/action") == [4]
    (alarm,) = [alarm for alarm in log.alarms if alarm.measure == "kl"]
    assert alarm.line in caplog.text
    assert "nats per sequence from its reference (limit 1e-09)" in alarm.line
    assert alarm.line.endswith("The run stops")


# ---- actions ----

# Hidden states are never at distance 0, so that this limit is exceeded by every measurement.
ALWAYS = {"prompts": 4, "confirm": 1, "max_distance": 1e-9, "max_negative_kl": 0, "max_length": 0}
STEADY = {"schedule": "constant", "warmup_ratio": 0}


def test_halving_happens_once_for_a_measure_that_stays_beyond_its_limit(world, tmp_path):
    watch = {**ALWAYS, "at_distance": "halve_learning_rate"}
    log, _ = run("ppo", world, tmp_path, monitor=watch, **STEADY)
    for name in ("optimizer/learning_rate", "optimizer/critic_learning_rate"):
        first, *others = log.series(name)
        assert others == pytest.approx([first / 2] * 2)
    assert log.series("monitor/action") == [2, 0, 0]


def test_a_roll_back_before_any_milestone_goes_back_to_the_start(world, tmp_path):
    watch = {**ALWAYS, "at_distance": "roll_back", "max_roll_backs": 2}
    log, report = run("ppo", world, tmp_path, monitor=watch, iterations=6, **STEADY)
    assert log.series("monitor/action") == [3, 3]  # at the second the run ends
    assert report.iterations == 2
    assert [alarm.action for alarm in log.alarms] == ["roll_back"] * 2
    # Weights, optimizer and β are those of the start; the rate is half of what it was.
    assert digest(tmp_path / "policy") == digest(world.sft)
    assert log.series("objective/kl")[1] == 0
    first, second = log.series("optimizer/learning_rate")
    assert second == pytest.approx(first / 2)
    assert log.series("objective/kl_coef")[0] == log.series("objective/kl_coef")[1]


def test_a_roll_back_goes_to_the_last_state_in_which_all_was_within_its_limit(
    world, tmp_path, monkeypatch
):
    settings = {"iterations": 3, "keep_every": 2}
    free, _ = run("ppo", world, tmp_path / "free", monitor={"prompts": 4}, **settings)
    beyond, third = Rule.beyond, free.series("monitor/proxy")[2]

    def at_the_third(rule, metrics, config):
        return metrics["monitor/proxy"] == third and beyond(rule, metrics, config)

    monkeypatch.setattr(Rule, "beyond", at_the_third)
    watch = {**ALWAYS, "at_distance": "roll_back", "good_every": 1}
    log, _ = run("ppo", world, tmp_path / "back", monitor=watch, **settings)
    assert log.series("monitor/action") == [0, 0, 3]
    kept = digest(tmp_path / "free" / "milestones" / "000002")
    assert digest(tmp_path / "back" / "policy") == kept


def test_of_two_trips_in_one_iteration_both_are_told_and_the_more_severe_is_done(world, tmp_path):
    watch = {**ALWAYS, "at_distance": "stop", "max_kl": 1e-9, "at_kl": "halve_learning_rate"}
    log, report = run("ppo", world, tmp_path, monitor=watch, learning_rate=1e-2)
    assert {alarm.measure: alarm.action for alarm in log.alarms} == {
        "distance": "stop",
        "kl": "halve_learning_rate",
    }
    assert report.iterations == 1
    assert log.series("monitor/action") == [4]
    assert set(report.tables["ppo_alarms"]["measure"]) == {"distance", "kl"}
    assert report.figures["ppo_monitor"].axes


# ---- resume ----


class StopsAt(MemoryLogger):
    """Raises SIGTERM in this process when an iteration is done, or amid a measurement."""

    def __init__(self, number, phase=None):
        super().__init__()
        self.number, self.what = number, phase

    def progress(self, done, total, note=""):
        super().progress(done, total, note)
        if done == self.number and self.what is None:
            signal.raise_signal(signal.SIGTERM)

    def phase(self, what, done=0, total=0):
        super().phase(what, done, total)
        here = self.what is not None and what.startswith(self.what)
        if here and len(self.history) == self.number and done == 2:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("phase", [None, "monitor: sampling"])
@pytest.mark.parametrize("action", ["warn", "halve_learning_rate", "roll_back"])
def test_a_stopped_run_resumes_to_the_bit(world, tmp_path, action, phase):
    watch = {**ALWAYS, "at_distance": action, "max_roll_backs": 9, "good_every": 1}
    settings = {"monitor": watch, "iterations": 4, "held_out": world.reward}
    whole, _ = run("ppo", world, tmp_path / "whole", **settings)
    recovery = Recovery(tmp_path / "checkpoints", every_seconds=3600)
    with pytest.raises(Interrupted):
        run("ppo", world, tmp_path / "two", recovery=recovery, logger=StopsAt(2, phase), **settings)
    resumed, _ = run("ppo", world, tmp_path / "two", recovery=recovery, **settings)
    assert resumed.history == whole.history
    assert digest(tmp_path / "two") == digest(tmp_path / "whole")
    assert resumed.alarms == [alarm for alarm in whole.alarms if alarm.step > 2]


# ---- hostile ----


def test_fewer_held_out_prompts_than_wanted_are_said_and_used(world, tmp_path, caplog):
    log, _ = run("ppo", world, tmp_path, monitor={"prompts": 100})
    assert "the monitor watches 4 prompts instead of monitor.prompts 100" in caplog.text
    assert len(log.series("monitor/kl")) == 3


def test_prompts_that_are_all_cut_are_said(world, tmp_path, caplog):
    sampling = SAMPLING.model_copy(update={"max_prompt_length": 1})
    run("ppo", world, tmp_path, monitor={"prompts": 4}, sampling=sampling)
    assert "4 of the monitor's 4 prompts are cut to sampling.max_prompt_length" in caplog.text


def test_without_held_out_prompts_it_says_what_to_do(world, tmp_path):
    data = shutil.copytree(world.data, tmp_path / "data")
    (data / "prompts.eval.jsonl").write_text("")
    with pytest.raises(DataError, match=r"no held-out prompts for the monitor; raise data\.eval_"):
        run("ppo", world, tmp_path / "out", monitor={"prompts": 4}, data=data)


def test_a_held_out_model_may_have_another_tokenizer(world, tmp_path):
    model = ModelConfig(fresh=MODEL.fresh.model_copy(update={"vocab_size": 310}))
    inputs = {"data": world.data, "sft": tmp_path / "sft"}

    def make(function, config, **outputs):
        sections = {"model": model, "sampling": SAMPLING}
        function(config, Work(inputs=inputs, outputs=outputs, sections=sections))

    make(train_sft, CONFIGS["sft"], sft=tmp_path / "sft")
    make(train_held_out, CONFIGS["reward_model"], held_out=tmp_path / "held_out")
    other = load_saved_tokenizer(tmp_path / "held_out")
    assert len(other) != len(load_saved_tokenizer(world.sft))
    held_out = {"monitor": {"prompts": 4}, "held_out": tmp_path / "held_out"}
    log, _ = run("rloo", world, tmp_path / "out", **held_out)
    same, _ = run("rloo", world, tmp_path / "same", monitor={"prompts": 4}, held_out=world.reward)
    assert len(log.series("monitor/held_out")) == 3
    assert log.series("monitor/held_out") != same.series("monitor/held_out")
    assert log.series("monitor/proxy") == same.series("monitor/proxy")


def constant(prompts, responses):
    """A reward that tells nothing apart."""
    return [1.0] * len(responses)


def test_what_is_not_defined_is_left_out(world, tmp_path):
    """A constant reward has no ranks, and a model alone no spread."""
    rewards = (RewardTerm(source="test_monitored_runs:constant"),)
    watch = {"monitor": {"prompts": 4}, "held_out": world.reward, "rewards": rewards}
    log, _ = run("rloo", world, tmp_path, **watch)
    last = log.history[-1][1]
    assert not {"monitor/agreement", "monitor/agreement_drop", "monitor/spread"} & last.keys()
    assert last["monitor/proxy_gain"] == 0
    assert {"monitor/held_out", "monitor/distance", "monitor/length"} <= last.keys()
    assert all(math.isfinite(value) for value in last.values())


def test_an_action_without_a_kept_state_is_refused(world):
    guard = Guard(MonitorConfig(prompts=1), {}, None, None)
    with pytest.raises(ValueError, match="asked for a roll-back, but the run keeps no state"):
        guard.act("roll_back", 1, {}, [])


def test_the_spread_of_an_ensemble_is_in_multiples_of_that_on_sft_answers(world, tmp_path):
    """A policy that hardly moves has the spread of SFT answers, but for the answers drawn."""
    watch = {"monitor": {"prompts": 4}, "reward": world.ensemble, "learning_rate": 1e-9}
    log, _ = run("rloo", world, tmp_path, **watch)
    assert all(1 / 3 < spread < 3 for spread in log.series("monitor/spread"))
    assert len(log.series("monitor/spread")) == 3

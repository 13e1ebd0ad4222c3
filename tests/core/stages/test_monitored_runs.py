"""The monitor in runs of every on-policy stage: it changes nothing but what it is told to."""

import pytest
from tiny import CONFIGS, World, change, digest, stage_of, work_of

from rlhf_core.metrics import MemoryLogger
from rlhf_core.onpolicy.monitor.config import MonitorConfig
from rlhf_core.stages.table import run_stage
from rlhf_core.training.recovery import NO_RECOVERY

ON_POLICY = ("ppo", "ppo_lora", "rloo", "grpo")
TRIPS_AT_ONCE = {"prompts": 4, "confirm": 1, "max_kl": 1e-9, "max_negative_kl": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.build(tmp_path_factory.mktemp("monitored") / "world")


def run(name, world, output, *, monitor=None, held_out=None, recovery=NO_RECOVERY, **settings):
    """A stage with a monitor; what it logged, and its report."""
    config, log = CONFIGS[name], MemoryLogger()
    settings = {"update_kl_limit": 0, **settings, "monitor": MonitorConfig(**monitor or {})}
    stage, lora = stage_of(config), bool(config.lora_rank)
    work = work_of(stage, world, output, lora=lora, logger=log, recovery=recovery)
    if held_out:
        work.inputs["held_out"] = held_out
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

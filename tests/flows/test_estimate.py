"""The estimate of a run, by real trials: what a config asks for, and what may go wrong."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from flows.cli.printing import show_estimate
from flows.config import PipelineConfig
from flows.estimate import estimate_run, stage_jobs
from rlhf_core.estimate.result import Estimate, StageEstimate, gibibytes
from rlhf_core.machine.limits import Limit
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.judge import JudgeConfig
from rlhf_core.stages.prepare import inspect
from tasks.estimate import probe

ROOT = Path(__file__).parents[2]
TINY = yaml.safe_load((ROOT / "tests" / "flows" / "tiny.yaml").read_text())


def config(**changes):
    return PipelineConfig.model_validate({**TINY, **changes})


def tried(given, settings):
    found = inspect(given.data, given.model, given.length_limits, given.seed)
    logger = MemoryLogger()
    estimate = estimate_run(given, found, settings, logger, parameters=30_000, snapshot=None)
    return estimate, logger


def left_behind():
    return list(Path(tempfile.gettempdir()).glob(f"{probe.PREFIX}*"))


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "temp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    monkeypatch.setattr(tempfile, "tempdir", None)


def stages(given):
    return {job.stage: job for job in stage_jobs(given)}


def test_the_stages_are_those_of_the_run_in_its_order():
    assert list(stages(config())) == [
        *("prepare", "sft", "reward_model", "report_card", "ppo", "evaluation")
    ]
    monitor = {"monitor": {"prompts": 4, "held_out": "train"}}
    more = config(ppo={**TINY["ppo"], **monitor, "iterations": 8}, tournament={"checkpoints": 2})
    assert list(stages(more)) == [
        *("prepare", "sft", "reward_model", "report_card", "held_out", "ppo", "tournament"),
        "evaluation",
    ]
    assert stages(more)["ppo"].inputs["held_out"] == "held_out"
    assert stages(more)["ppo"].config["keep_every"] == 4
    assert stages(more)["held_out"].config["votes"] == "second_half"
    assert stages(more)["reward_model"].config["votes"] == "first_half"


def test_models_that_are_there_are_not_trained():
    reused = config(
        algorithm="grpo",
        sft={"reuse": "models:/x-sft/1"},
        reward_model={"reuse": "models:/x-reward@best"},
        grpo={"rollout_size": 8, "batch_size": 8, "rewards": [{"source": "models:/y-reward/2"}]},
    )
    found = stages(reused)
    assert list(found) == ["prepare", "report_card", "grpo", "evaluation"]
    assert found["grpo"].inputs == {
        "sft": "models:/x-sft/1",
        "data": "data",
        "reward.y-reward-2": "models:/y-reward/2",
    }
    assert found["evaluation"].inputs["reward"] == "models:/x-reward@best"


def test_a_judge_that_costs_money_is_not_asked():
    asked = config(judge={"source": "endpoint", "endpoint": {"model": "m"}})
    evaluation = stages(asked)["evaluation"]
    assert evaluation.sections["judge"]["source"] == JudgeConfig().source
    assert "may cost money" in evaluation.left_out[0]


def test_every_stage_gets_time_memory_and_disk_and_nothing_is_left(settings, monkeypatch):
    monkeypatch.setattr(probe, "memory_limit", lambda device: Limit(10 << 20, "the test has"))
    given = config()
    estimate, logger = tried(given, settings)
    by_name = {stage.stage: stage for stage in estimate.stages}
    assert [stage.problem for stage in estimate.stages] == [""] * 6
    for stage in estimate.stages:
        assert 0.01 < stage.cpu_seconds < 60
        assert stage.seconds > 0.5 * stage.cpu_seconds
        assert (100 << 20) < stage.memory < (4 << 30)  # torch alone takes so much
    assert by_name["ppo"].work == "2 iterations of 16 answers, 2 updates at most"
    # 4 bytes of a parameter in safetensors, once for SFT and reward model, twice for PPO
    policy = 4 * (400 * 32 + 96 * 32 + 12 * 32**2 + 13 * 32 + 64)
    assert policy < by_name["sft"].kept < policy + (1 << 20)
    assert 2 * policy < by_name["ppo"].kept < 2 * policy + (2 << 20)
    assert by_name["evaluation"].kept == 0
    assert estimate.seconds == pytest.approx(
        estimate.start_seconds + sum(stage.seconds for stage in estimate.stages)
    )
    # the limit is a tenth of what a process needs
    assert len(estimate.misfits) == 6
    assert all("does not fit: it needs" in sentence for sentence in estimate.misfits)
    assert f"the test has {gibibytes(10 << 20)}" in estimate.misfits[0]
    json.dumps(estimate.as_json())
    assert [note for *_, note in logger.notes][-1] == "estimate: trying evaluation"
    assert left_behind() == []
    assert not list(settings.home.glob("work/*"))  # nothing was done in the home of the user


REWARD = """
import os, signal
def deadly(prompts, responses):
    os.kill(os.getpid(), signal.SIGKILL)
def raising(prompts, responses):
    raise RuntimeError("no such answer")
"""


def test_a_stage_that_dies_is_told_and_the_others_are_tried(settings, tmp_path, monkeypatch):
    (tmp_path / "rewards_that_end.py").write_text(REWARD)
    monkeypatch.setenv("RLHF_CONFIG_FOLDER", str(tmp_path))

    def rewarded(algorithm, function):
        reward = {"rewards": [{"source": f"rewards_that_end:{function}"}], "group_size": 2}
        return config(algorithm=algorithm, **{algorithm: {**TINY["ppo"], **reward}})

    given = rewarded("rloo", "deadly")
    jobs = [stages(given)[name] for name in ("prepare", "sft", "report_card", "rloo")]
    jobs.append(stages(rewarded("grpo", "raising"))["grpo"])
    monkeypatch.setattr("flows.estimate.stage_jobs", lambda _: jobs)
    estimate, _ = tried(given, settings)
    by_name = {stage.stage: stage for stage in estimate.stages}
    assert by_name["sft"].seconds > 0
    assert by_name["report_card"].problem == (
        "it needs what an earlier stage makes (reward), which was not tried"
    )
    assert "SIGKILL" in by_name["rloo"].problem
    assert by_name["rloo"].seconds is None
    assert by_name["rloo"].no_memory
    assert "no such answer" in by_name["grpo"].problem
    assert not by_name["grpo"].no_memory
    assert not estimate.complete
    assert left_behind() == []


def test_whoever_is_killed_leaves_nothing(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    temporary = tmp_path / "other"
    temporary.mkdir()
    env = {**os.environ, "RLHF_HOME": str(tmp_path / "home"), "TMPDIR": str(temporary)}
    command = [sys.executable, "-P", "-m", "flows", "validate", str(tmp_path / "tiny.yaml")]
    with subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not list(temporary.glob("rlhf-estimate-*/job.json")):
            assert time.monotonic() < deadline, "no trial began"
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while list(temporary.glob("rlhf-estimate-*")):
        assert time.monotonic() < deadline, "its folder is still there"
        time.sleep(0.1)


def test_the_table_says_what_is_known_and_what_is_not(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    common = {"kept": 0, "working": 0, "measured": "mean of 3 steps", "cpu_seconds": 1.0}
    show_estimate(
        Estimate(
            stages=[
                StageEstimate(
                    stage="sft",
                    work="9 steps",
                    seconds=125,
                    memory=2 << 30,
                    copy_of_state=1 << 30,
                    **common,
                ),
                StageEstimate(
                    stage="ppo", work="", seconds=None, memory=None, problem="no luck", **common
                ),
            ],
            start_seconds=20,
            took=61,
            notes=["ppo: nobody was asked"],
            misfits=["sft does not fit: it needs 3.0 GiB."],
        )
    )
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if "sft " in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        *("sft", "9 steps", "2 min 05 s", "3.0 GiB", "–", "mean of 3 steps")
    ]
    assert "no luck" in said
    assert "The whole run: at least 2 min 25 s, 3.0 GiB of memory at most" in said
    assert "Tried in 61 s." in said
    assert "Note: ppo: nobody was asked." in said
    assert "Warning: sft does not fit: it needs 3.0 GiB." in said


def test_a_full_disk_is_told_before_anything_is_tried(settings, monkeypatch):
    monkeypatch.setattr(probe, "room", lambda folder: 1000)
    assert "where 0 MiB are free; set TMPDIR" in probe.enough_room(10**9)
    assert probe.enough_room(1000) == ""

"""A training that was stopped goes on: in its folder, in its MLflow run, to the same bits."""

import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Param
from prefect.exceptions import Pause
from pydantic import Field

from rlhf_core.config import Section
from rlhf_core.errors import ConfigError
from rlhf_core.settings.data import DataConfig, LengthLimits
from rlhf_core.settings.model import FreshModelConfig, ModelConfig, SamplingConfig
from rlhf_core.settings.onpolicy import PPOConfig
from rlhf_core.settings.simulation import SimulationConfig
from rlhf_core.settings.training import RewardModelConfig, SFTConfig
from rlhf_core.types import Report
from tasks.record import identity
from tasks.record.record import Record
from tasks.record.run import open_run
from tasks.record.stage import open_stage, open_training
from tasks.record.tracking import connect
from tasks.record.work_folder import remembered_run
from tasks.registry.model_store import MlflowModelStore
from tasks.registry.refs import ModelRef
from tasks.settings import Settings
from tasks.steps.data import prepare_data
from tasks.steps.policy import train_policy
from tasks.steps.reward_model import train_reward_model
from tasks.steps.sft import train_sft


class ToyConfig(Section):
    rate: float = Field(0.1, description="step size")


class Beside(Section):
    length: int = Field(3, description="tokens")


@pytest.fixture
def client(settings):
    return connect(settings)


@pytest.fixture
def training(settings):
    """A function that opens a training in a pipeline run of its own, as a new process would."""

    @contextmanager
    def _open(config=None, extra_sections=None, seed=7, project="demo", inputs=None, name="sft"):
        with (
            open_run(project, ToyConfig(), seed, settings=settings) as run,
            open_training(
                name,
                config=config or ToyConfig(),
                extra_sections={"sampling": extra_sections or Beside()},
                run=run,
                inputs=inputs or {},
                record=Record.open(settings, patient=True),
            ) as stage,
        ):
            yield stage

    return _open


def history(client, run_id):
    """Every value of every metric, in order."""
    names = client.get_run(run_id).data.metrics
    return {n: [(m.step, m.value) for m in client.get_metric_history(run_id, n)] for n in names}


def stop(training, error=KeyboardInterrupt, **changes):
    """Open a training that ends with an error after a little work."""
    opened = None

    def broken():
        nonlocal opened
        with training(**changes) as opened:
            (opened.work / "checkpoints").mkdir(exist_ok=True)
            opened.logger.metrics({"loss": 2.0, "rate": 0.1}, step=1)
            opened.record(Report(tables={"samples": pd.DataFrame({"text": ["a"]})}))
            raise error

    with pytest.raises(error):
        broken()
    return opened


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_same_run_goes_on_without_a_trace_of_the_end(client, training, error):
    first = stop(training, error)
    left = client.get_run(first.run_id)
    assert left.info.status == ("FAILED" if error is ValueError else "KILLED")
    assert first.work.is_dir()
    stop(training, error)
    with training() as again:
        assert (again.run_id, again.work) == (first.run_id, first.work)
        assert (again.work / "checkpoints").is_dir()
        running = client.get_run(again.run_id)
        assert running.info.status == "RUNNING"
        assert running.data.tags["resumed"] == "2"
        assert "error" not in running.data.tags
        # The pipeline's run goes on too.
        assert running.data.tags["mlflow.parentRunId"] == again.run.run_id == first.run.run_id
        assert client.get_run(again.run.run_id).info.status == "RUNNING"
        for step in (1, 2):  # it replays what it has done, then goes on
            again.logger.metrics({"loss": 3.0 - step, "rate": 0.1}, step)
    ended = client.get_run(again.run_id)
    assert ended.info.status == "FINISHED"
    assert ended.data.params == left.data.params
    assert history(client, again.run_id) == {
        "loss": [(1, 2.0), (2, 1.0)],
        "rate": [(1, 0.1), (2, 0.1)],
    }
    assert not again.work.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"config": ToyConfig(rate=0.2)},
        {"extra_sections": Beside(length=4)},
        {"seed": 8},
        {"project": "other"},
        {"name": "ppo"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_training_starts_afresh(training, change):
    first = stop(training)
    with training(**change) as other:
        assert other.run_id != first.run_id
        assert not (other.work / "checkpoints").exists()


def test_other_code_starts_afresh(training, monkeypatch):
    first = stop(training)
    monkeypatch.setattr(identity, "stage_code", lambda name, settings: "f" * 16)
    with training() as other:
        assert other.run_id != first.run_id


def test_a_version_that_was_trained_again_is_the_same_input(client, training, policy_dir, tmp_path):
    def publish(directory):
        with training(name="before") as stage:
            return stage.publish({"sft": directory})["sft"]

    one, same = publish(policy_dir), publish(policy_dir)
    other_dir = shutil.copytree(policy_dir, tmp_path / "other")
    (other_dir / "rlhf.json").write_text('{"kind": "policy", "dtype": "float32", "chat": true}')
    other = publish(other_dir)
    first = stop(training, inputs={"sft": one})
    with training(inputs={"sft": other}) as stage:
        assert stage.run_id != first.run_id
    with training(inputs={"sft": same}) as stage:
        assert stage.run_id == first.run_id
    assert client.get_run(first.run_id).data.tags["input.sft"] == same.uri


@pytest.fixture
def in_pipeline(settings):
    """A function that opens the same training in a pipeline run with settings of its own."""

    @contextmanager
    def _open(length, inputs=None, force=()):
        with (
            open_run("demo", Beside(length=length), 7, force=force, settings=settings) as run,
            open_training(
                "sft",
                config=ToyConfig(),
                extra_sections={},
                run=run,
                inputs=inputs or {},
                record=Record.open(settings, patient=True),
            ) as stage,
        ):
            yield stage

    return _open


def make(stage, directory):
    """The work of a stage: a number and a version."""
    if not stage.cached:
        stage.logger.metrics({"loss": 0.5}, step=1)
        stage.record(ToyReport(score=0.25))
        stage.publish({"sft": directory})
    return stage.models()["sft"]


@dataclass(frozen=True, kw_only=True)
class ToyReport(Report):
    score: float


def test_a_stage_that_was_done_is_taken_from_the_registry(client, in_pipeline, policy_dir):
    with in_pipeline(1) as first:
        made = make(first, policy_dir)
    with in_pipeline(2) as second:
        assert second.cached
        assert make(second, policy_dir) == made
    store = MlflowModelStore(client)
    assert store.versions("demo-sft") == [1]
    run = client.get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_id != first.run_id
    assert run.data.tags["cached_from"] == first.run_id
    assert run.data.tags["mlflow.parentRunId"] == second.run.run_id
    assert run.data.metrics == {"summary/score": 0.25}  # comparable, and no curve twice
    assert run.data.params == client.get_run(first.run_id).data.params
    # The third is told of the one that did the work, not of the one that stands for it.
    with in_pipeline(3) as third:
        assert client.get_run(third.run_id).data.tags["cached_from"] == first.run_id
    store.delete(made)
    with in_pipeline(4) as fourth:
        assert not fourth.cached


def test_a_stage_can_be_forced(in_pipeline, policy_dir, client):
    with in_pipeline(1) as first:
        make(first, policy_dir)
    with in_pipeline(2, force=["reward_model"]) as other:
        assert other.cached

    def interrupted():
        with in_pipeline(3, force=["sft"]) as forced:
            assert not forced.cached
            assert make(forced, policy_dir).version == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with in_pipeline(3, force=["sft"]) as again:  # what it registered before the end is withdrawn
        assert not again.cached
        assert make(again, policy_dir).version == 3
    assert MlflowModelStore(client).versions("demo-sft") == [1, 3]


def test_a_forced_stage_is_not_forced_twice_by_a_pipeline_that_goes_on(
    in_pipeline, policy_dir, client, settings
):
    with in_pipeline(1) as first:
        make(first, policy_dir)

    def pipeline():
        with open_run("demo", Beside(length=2), 7, force=["sft"], settings=settings) as run:
            inputs = {"config": ToyConfig(), "extra_sections": {}, "run": run, "inputs": {}}
            with open_training("sft", **inputs, record=Record.open(settings)) as stage:
                make(stage, policy_dir)
            yield stage
            raise KeyboardInterrupt

    stages = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stages += pipeline()
    assert [stage.cached for stage in stages] == [False, True]
    assert stages[0].run_id == stages[1].run_id
    assert "cached_from" not in client.get_run(stages[0].run_id).data.tags


def test_who_comes_second_waits_and_finds_it_done(in_pipeline, policy_dir, client, caplog):
    found = []

    def second():
        with in_pipeline(2) as stage:
            found.append((stage.cached, make(stage, policy_dir)))

    with in_pipeline(1) as first:
        thread = threading.Thread(target=second)
        thread.start()
        deadline = time.monotonic() + 30
        while "another process is running the same work" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        made = make(first, policy_dir)
        assert found == []
    thread.join()
    assert found == [(True, made)]
    assert MlflowModelStore(client).versions("demo-sft") == [1]


def test_a_suspended_pipeline_waits_and_is_left_to_its_own_flow_run(client, settings):
    with pytest.raises(Pause), open_run("demo", ToyConfig(), 7, settings=settings) as first:
        raise Pause
    assert client.get_run(first.run_id).info.status == "SCHEDULED"
    assert "error" not in client.get_run(first.run_id).data.tags
    with open_run("demo", ToyConfig(), 7, settings=settings) as other:
        assert other.run_id != first.run_id
    assert client.get_run(first.run_id).info.status == "SCHEDULED"


@pytest.mark.parametrize("end", ["finished", "deleted", "unknown"])
def test_a_run_that_cannot_go_on_leaves_nothing_behind(client, training, end):
    first = stop(training)
    if end == "finished":
        client.set_terminated(first.run_id, "FINISHED")
    elif end == "deleted":
        client.delete_run(first.run_id)
    else:
        (first.work / "run.json").write_text('{"run_id": "%s"}' % ("0" * 32))
    with training() as again:
        assert again.run_id != first.run_id
        assert not (again.work / "checkpoints").exists()


def test_a_version_of_a_process_that_was_killed_is_withdrawn(client, training, policy_dir):
    first = stop(training)
    store = MlflowModelStore(client)
    tags = {"seed": "7"}
    store.publish(policy_dir, "demo-sft", run_id=first.run_id, tags=tags)
    client.set_tag(first.run_id, "output.sft", "models:/demo-sft/1")
    with training() as again:
        assert again.run_id == first.run_id
        assert store.versions("demo-sft") == []
        assert "output.sft" not in client.get_run(again.run_id).data.tags
        again.publish({"sft": policy_dir})
    assert store.versions("demo-sft") == [2]


def test_a_run_with_other_settings_is_refused(client, training):
    first = stop(training)
    client.log_batch(first.run_id, params=[Param("sft.momentum", "0.9")])
    with (
        pytest.raises(ConfigError, match=r"has another sft\.momentum \(0\.9\); delete it"),
        training(),
    ):
        pytest.fail("the block must not run")


def test_a_table_is_listed_once(client, training):
    stop(training)
    stage = stop(training)
    tags = client.get_run(stage.run_id).data.tags
    assert tags["mlflow.loggedArtifacts"].count("tables/samples.json") == 1


def test_other_stages_keep_nothing(settings, training):
    with training(name="before") as before:
        pass
    with (
        pytest.raises(KeyboardInterrupt),
        open_run("demo", ToyConfig(), 7, settings=settings) as run,
        open_stage(
            "prepare", record=Record.open(settings), config=ToyConfig(), run=run, inputs={}
        ) as stage,
    ):
        raise KeyboardInterrupt
    assert stage.recovery.directory is None
    assert before.recovery.directory == before.work / "checkpoints"
    (left,) = (settings.home / "work").iterdir()
    assert left.name.startswith("pipeline-")


# ---- real trainings in real processes ----


class SFTSection(SFTConfig):
    """As a pipeline has it, with a setting that the stage does not know."""

    reuse: str = Field("", description="a version to take instead")


MODEL = ModelConfig(fresh=FreshModelConfig(layers=1, width=16, heads=2, context=64, vocab_size=300))
SAMPLING = SamplingConfig(max_prompt_length=24, max_new_tokens=8)
SFT = SFTSection(max_length=64, batch_size=4, epochs=3, evaluations=4)
REWARD = RewardModelConfig(max_length=64, normalization_samples=8)
PPO = PPOConfig(iterations=6, rollout_size=8, batch_size=4, epochs=2)

# Children that have torch and MLflow already: real processes, started in milliseconds.
processes = multiprocessing.get_context("forkserver")
STEPS = ("policy", "sft", "reward_model", "data")
processes.set_forkserver_preload([f"tasks.steps.{name}" for name in STEPS])


def train(which, environment, given, started, answer, seed):
    """One training as the flow asks for it; the run and the references go into `answer`.

    That of seed 0 is done again though it was done before.
    """
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    force = [] if seed else ["sft", "reward_model", "ppo"]
    with open_run("tiny", SFT, seed, force=force) as run:
        started.set()
        if which == "prepare":
            simulation = SimulationConfig(prompts=30, demonstrations=60, preference_pairs=40)
            config = DataConfig(simulation=simulation, eval_fraction=0.3)
            limits = LengthLimits(prompt=24, response=8, sft=64, reward=64)
            made = prepare_data.__wrapped__(config, MODEL, limits, run)
        elif which == "sft":
            made = train_sft.__wrapped__(SFT, MODEL, given["prepare"], run)
        elif which == "reward":
            made = train_reward_model.__wrapped__(
                REWARD, SAMPLING, given["sft"], given["prepare"], run
            )
        else:
            models = given["sft"], given["reward"], {}
            made = train_policy.__wrapped__("ppo", PPO, SAMPLING, *models, given["prepare"], run)
    answer.put((run.run_id, made))


def ranks_of(child):
    """How many processes share the work of a training; 0 when it works alone."""
    parents = {}
    with suppress(psutil.Error):  # some may end meanwhile
        for process in psutil.Process(child.pid).children(recursive=True):
            if "spawn_main" in " ".join(process.cmdline()):
                parents[process.pid] = process.ppid()
    # A rank that starts a program is forked first, and for a moment the copy looks like a rank.
    return sum(parent not in parents for parent in parents.values())


class Trainer:
    """Runs trainings in processes of their own and knows what they made."""

    def __init__(self, settings):
        self.environment = {**settings.environment(), "RLHF_CHECKPOINT_SECONDS": "0"}
        self.client = MlflowClient(tracking_uri=settings.mlflow_uri)
        self.store = MlflowModelStore(self.client)
        self.work = settings.home / "work"
        self.given, self.undisturbed = {}, {}

    def start(self, which, ranks=1, strategy="ddp", seed=0):
        started, answer = processes.Event(), processes.SimpleQueue()
        chosen = {"RLHF_PROCESSES": str(ranks), "RLHF_STRATEGY": strategy}
        arguments = (which, self.environment | chosen, self.given, started, answer, seed)
        child = processes.Process(target=train, args=arguments)
        child.start()
        return child, started, answer

    def finish(self, which):
        """The pipeline run and the references of a training that nothing disturbs."""
        child, _, answer = self.start(which)
        return self.outcome(child, answer)

    def outcome(self, child, answer):
        child.join(300)
        assert child.exitcode == 0
        return answer.get()

    def stopped(self, which, chance, by):
        """Whether a training was stopped by a signal some steps after it had gone on."""
        before = self.step(which)
        child, started, _ = self.start(which)
        assert started.wait(120)
        after = before + chance.randrange(6)
        while child.is_alive() and self.step(which) < after:
            time.sleep(0.005)
        child.join(chance.uniform(0, 0.1))
        if child.is_alive():
            os.kill(child.pid, by)
        child.join(120)
        return child.exitcode != 0

    def stop_at(self, which, step, **chosen):
        """Start a training, and stop it by SIGTERM when it has come to a step."""
        child, *_ = self.start(which, **chosen)
        while child.is_alive() and self.step(which) < step:
            time.sleep(0.005)
        seen = ranks_of(child)
        os.kill(child.pid, signal.SIGTERM)
        child.join(120)
        assert child.exitcode != 0
        for folder in self.work.iterdir():  # of the pipeline, and of the training
            assert self.client.get_run(remembered_run(folder)).info.status == "KILLED"
        return seen

    def step(self, which):
        """That of the newest checkpoint."""
        found = self.work.glob(f"{which}-*/checkpoints/step-*[0-9]")
        return max((int(path.name.partition("-")[2]) for path in found), default=0)

    def facts(self, pipeline, made):
        """The run of a stage, its metric history, and the digests of its models."""
        refs = [made] if isinstance(made, ModelRef) else [made.policy, made.critic]
        tags = [self.store.tags(ref) for ref in refs]
        (run_id,) = {found["run_id"] for found in tags}
        run = self.client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert "error" not in run.data.tags
        assert run.data.tags["mlflow.parentRunId"] == pipeline
        return run, history(self.client, run_id), [found["digest"] for found in tags]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, migrated_database):
    """It has trained everything once, without a disturbance."""
    settings = Settings.model_validate({"RLHF_HOME": tmp_path_factory.mktemp("killed") / "home"})
    (settings.home / "mlflow").mkdir(parents=True)
    shutil.copy(migrated_database, settings.home / "mlflow" / "mlflow.db")
    made = Trainer(settings)
    for which in ("prepare", "sft", "reward", "ppo"):
        made.undisturbed[which] = made.finish(which)
        made.given[which] = made.undisturbed[which][1]
    return made


@pytest.mark.integration
@pytest.mark.parametrize("which", ["sft", "ppo"])
def test_killed_at_random_moments_it_ends_as_if_nothing_had_been(trainer, which):
    _, expected, digests = trainer.facts(*trainer.undisturbed[which])
    assert all(len({step for step, _ in values}) == len(values) for values in expected.values())
    chance, stops = random.Random(which), 0
    while stops < 6:
        by = signal.SIGTERM if stops == 2 else signal.SIGKILL
        if not trainer.stopped(which, chance, by):
            break
        stops += 1
    run, got, same = trainer.facts(*trainer.finish(which))
    assert stops >= 3
    assert int(run.data.tags["resumed"]) >= 3
    assert got == expected
    assert same == digests
    assert list(trainer.work.iterdir()) == []


@pytest.mark.integration
def test_two_processes_at_once_train_once(trainer):
    before = trainer.store.versions("tiny-sft")
    children = [trainer.start("sft", seed=1) for _ in "ab"]
    (first, one), (second, other) = (trainer.outcome(c, answer) for c, _, answer in children)
    assert one == other
    assert trainer.store.versions("tiny-sft") == [*before, one.version]
    assert first != second
    for run in (first, second):
        assert trainer.client.get_run(run).info.status == "FINISHED"
    assert list(trainer.work.iterdir()) == []


@pytest.mark.integration
def test_stopped_on_two_processes_it_goes_on_alone(trainer):
    _, expected, _ = trainer.facts(*trainer.undisturbed["sft"])
    assert trainer.stop_at("sft", 5, ranks=2, strategy="fsdp") == 2
    assert 5 <= trainer.step("sft") < 30
    run, got, _ = trainer.facts(*trainer.finish("sft"))
    assert run.data.tags["resumed"] == "1"
    close(got, expected)
    assert list(trainer.work.iterdir()) == []


@pytest.mark.integration
def test_stopped_alone_it_goes_on_on_two_processes(trainer):
    _, expected, _ = trainer.facts(*trainer.undisturbed["ppo"])
    assert trainer.stop_at("ppo", 5) == 0
    child, _, answer = trainer.start("ppo", ranks=2)
    most = 0
    while child.is_alive():
        most = max(most, ranks_of(child))
        time.sleep(0.05)
    assert most == 2
    run, got, _ = trainer.facts(*trainer.outcome(child, answer))
    assert run.data.tags["resumed"] == "1"
    close(got, expected)
    assert list(trainer.work.iterdir()) == []


def close(got, expected):
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        assert [step for step, _ in got[name]] == [step for step, _ in values]
        found = [value for _, value in got[name]]
        assert found == pytest.approx([value for _, value in values], rel=1e-4, abs=1e-6), name

"""The stage table: each row fits its function, and a new stage is a row."""

import logging
from functools import partial

import pytest
import tiny
import torch
from pydantic import BaseModel

from rlhf_core.backbone.sampling import PolicySampler
from rlhf_core.config import Section
from rlhf_core.data.prepared import read_table
from rlhf_core.launch import Job, run
from rlhf_core.metrics import MemoryLogger
from rlhf_core.onpolicy.actors import Actors
from rlhf_core.onpolicy.kl_control import FixedKL
from rlhf_core.onpolicy.loop import iterate
from rlhf_core.onpolicy.observe import Action
from rlhf_core.onpolicy.report import describe
from rlhf_core.onpolicy.update import optimise_policy
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.onpolicy import OnPolicySection
from rlhf_core.stages.table import STAGES, StageSpec, algorithms, load_stage, run_stage
from rlhf_core.training.learner import Learner
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.recovery import Recovery
from rlhf_core.types import Report
from rlhf_core.work import Work

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.World.build(tmp_path_factory.mktemp("world") / "world")


def test_the_algorithms_are_what_makes_a_policy():
    assert algorithms() == ["ppo", "rloo", "grpo", "dpo"]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_named_after_its_file(name):
    called = STAGES[name].function
    assert called.__module__ == f"rlhf_core.stages.{name}"
    function = getattr(load_stage(name), called.__name__)
    assert function.__module__ == called.__module__  # and not one that it imports
    assert function.__annotations__["config"] is STAGES[name].config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs": {}}, "sft has the inputs data; got: no data"),
        ({"outputs": {"policy": "x"}}, "sft has the outputs sft; got: no sft, policy"),
        ({"sections": {}}, "sft has the sections model; got: no model"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(world, tmp_path, changes, said):
    work = tiny.work_of("sft", world, tmp_path)
    work = Work(
        **{"inputs": work.inputs, "outputs": work.outputs, "sections": work.sections} | changes
    )
    with pytest.raises(ValueError, match=said):
        run_stage("sft", tiny.CONFIGS["sft"], work)


# --- a stage that trains nothing ---


class CardConfig(Section):
    """Settings of a card."""

    rows: int = 3


class Card(BaseModel):
    """What it found."""

    prompts: list[str]


class CardReport(Report):
    """A report whose result later stages read."""

    result = Card(prompts=[])


def write_card(config, work):
    """Read the prepared data, and say what is there."""
    table = read_table(work.inputs["data"], "prompts", "eval")
    report = CardReport()
    object.__setattr__(report, "result", Card(prompts=list(table["prompt"][: config.rows])))
    return report


def test_a_stage_that_trains_nothing_is_a_row(world, monkeypatch):
    spec = StageSpec(config=CardConfig, function=write_card, inputs=("data",), result=Card)
    monkeypatch.setitem(STAGES, "card", spec)
    assert not spec.trains
    report = run_stage("card", CardConfig(rows=2), Work(inputs={"data": world.data}))
    assert report.result.prompts == ["my room", "my film"]


# --- an on-policy algorithm ---


class ToyConfig(OnPolicySection):
    """REINFORCE with the mean of the roll-out as its baseline."""


def credit(rollout, kl_coef):
    """A = score - mean score, the same for every token."""
    advantages = (rollout.scores - rollout.scores.mean()).unsqueeze(-1) * rollout.responses.mask
    return advantages, describe(rollout, kl_coef)


def train_toy(config, work, **doors):
    """The whole algorithm: networks, a learner, the loop, the policy."""
    actors = Actors.load(config, work)
    learner = Learner(actors.policy, config, config.updates, ranks=work.ranks)
    temperature = work.section(SamplingConfig).temperature
    report = iterate(
        "toy",
        config,
        work,
        actors,
        learners={"policy": learner},
        controller=FixedKL(config.kl_coef),
        credit=credit,
        update=partial(
            optimise_policy,
            learner=learner,
            config=config,
            temperature=temperature,
            ranks=work.ranks,
        ),
        **{name: make(actors) for name, make in doors.items()},
    )
    actors.save(work.outputs["policy"], work, report.iterations)
    return report


@pytest.fixture
def toy(monkeypatch):
    """The algorithm in the table."""

    def register(function=train_toy):
        spec = StageSpec(
            config=ToyConfig,
            function=function,
            sections={"sampling": SamplingConfig},
            inputs=("sft", "data"),
            optional_inputs=("reward", "reward.*"),
            outputs=("policy",),
            optional_outputs=("milestones",),
            learns={"policy": "policy"},
        )
        monkeypatch.setitem(STAGES, "toy", spec)
        return ToyConfig(**tiny.UPDATES)

    return register


def test_an_algorithm_is_a_row(world, tmp_path, toy):
    config = toy()
    assert algorithms()[-1] == "toy"
    log = MemoryLogger()
    report = tiny.run(config, world, tmp_path / "out", logger=log)
    assert report.iterations == 3
    assert len(log.series("objective/kl")) == 3
    assert tiny.digest(tmp_path / "out") != tiny.digest(world.sft)


def test_the_launcher_reads_the_row_too(world, tmp_path, toy):
    config = toy()
    tiny.run(config, world, tmp_path / "here")
    work = tiny.work_of("toy", world, tmp_path / "there")
    job = Job.of("toy", config, work, processes=1, strategy="ddp")
    assert Job.model_validate_json(job.model_dump_json()) == job
    run(job, MemoryLogger(), Ranks(), "cpu")
    assert tiny.digest(tmp_path / "there") == tiny.digest(tmp_path / "here")


# --- the doors of the loop ---


def test_an_observer_sees_each_iteration_and_may_end_the_run(world, tmp_path, toy, caplog):
    seen = []

    def observer(observation):
        seen.append(observation)
        kind = {1: "warn", 2: "stop"}.get(observation.number)
        return kind and Action(kind, f"iteration {observation.number} was odd")

    config = toy(partial(train_toy, observers=lambda _: [observer]))
    with caplog.at_level(logging.WARNING):
        report = tiny.run(config, world, tmp_path / "out")
    assert report.iterations == 2 < config.iterations
    assert caplog.messages == ["iteration 1 was odd", "iteration 2 was odd"]
    assert [len(o.history) for o in seen] == [0, 1]
    assert seen[1].history[0] == seen[0].metrics
    assert all(len(o.rollout.scores) == config.rollout_size for o in seen)
    assert {"policy/approx_kl", "objective/kl", "optimizer/updates"} <= seen[0].metrics.keys()


def test_another_sampler_may_continue_the_prompts(world, tmp_path, toy):
    calls = []

    def sampler(actors):
        own = PolicySampler(actors.policy, tiny.SAMPLING.temperature)

        def remote(prompts, draws, *, between):
            calls.append(draws.shape)
            return own(prompts, draws, between=between)

        return remote

    plain, other = MemoryLogger(), MemoryLogger()
    tiny.run(toy(), world, tmp_path / "plain", logger=plain)
    tiny.run(toy(partial(train_toy, sampler=sampler)), world, tmp_path / "other", logger=other)
    # 8 responses of up to 8 tokens, 3 side by side, in each of 3 iterations.
    assert calls == [(3, 8), (3, 8), (2, 8)] * 3
    assert other.history == plain.history


def test_milestones_outlive_the_checkpoints(world, tmp_path):
    config = tiny.change(tiny.CONFIGS["ppo"], keep_every=2, iterations=5)
    recovery = Recovery(tmp_path / "checkpoints", every_seconds=0)
    tiny.run(config, world, tmp_path / "out", recovery=recovery)
    kept = sorted((tmp_path / "out" / "milestones").iterdir())
    assert [folder.name for folder in kept] == ["000002", "000004"]
    assert len(list((tmp_path / "checkpoints").iterdir())) <= 2
    # Each is the policy that a run of so many iterations ends with, at a rate that never falls.
    steady = {"keep_every": 2, "schedule": "constant", "warmup_ratio": 0.0}
    long = tiny.change(tiny.CONFIGS["ppo"], iterations=3, **steady)
    short = tiny.change(tiny.CONFIGS["ppo"], iterations=2, **steady)
    tiny.run(long, world, tmp_path / "long")
    tiny.run(short, world, tmp_path / "short")
    assert tiny.digest(tmp_path / "long" / "milestones" / "000002") == tiny.digest(
        tmp_path / "short" / "policy"
    )
    assert not (tmp_path / "short" / "milestones" / "000001").exists()


def test_without_the_setting_there_are_no_milestones(world, tmp_path):
    tiny.run(tiny.CONFIGS["ppo"], world, tmp_path / "out")
    assert not (tmp_path / "out" / "milestones").exists()


@pytest.mark.parametrize("how", ["mean", "min", "mean_minus_variance"])
def test_the_combined_reward_is_the_one_that_trains(world, tmp_path, how):
    config = tiny.change(
        tiny.CONFIGS["rloo"], rewards=tiny.SEVERAL, combine_rewards=how, variance_coef=0.3
    )
    log = MemoryLogger()
    tiny.run(config, world, tmp_path / "out", logger=log)
    # Means over a roll-out are linear only for the mean; the others are below it.
    for step in range(config.iterations):
        parts = [term.weight * log.series(f"reward/{term.name}")[step] for term in tiny.SEVERAL]
        score, mean = log.series("objective/score")[step], sum(parts) / 2
        if how == "mean":
            assert score == pytest.approx(mean, abs=1e-5)
        else:
            assert score < mean - 1e-4

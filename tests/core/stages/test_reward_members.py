"""Ensembles from training to the policy that learns from them, in the tiny world."""

import math
import signal
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from tiny import CONFIGS, JUDGED, SAMPLING, World, change, digest, first_gradients, run
from torch.nn.functional import logsigmoid
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_core.backbone.directory import read_card
from rlhf_core.backbone.networks import ScalarModel
from rlhf_core.backbone.packing import pack
from rlhf_core.data.encoding import encode_pair
from rlhf_core.data.pairs import encode_pairs, prompt_numbers, with_winners
from rlhf_core.data.prepared import read_table
from rlhf_core.metrics import MemoryLogger
from rlhf_core.onpolicy.actors import Actors
from rlhf_core.rewards.models import load_reward_model
from rlhf_core.seeding import generator
from rlhf_core.settings.evaluation import EvaluationConfig
from rlhf_core.settings.training import RewardModelConfig
from rlhf_core.stages import reward_model
from rlhf_core.stages.evaluation import evaluate
from rlhf_core.training.learner import adapt
from rlhf_core.training.members import MemberBatches, bootstrap
from rlhf_core.training.recovery import Recovery
from rlhf_core.training.session import Interrupted
from rlhf_core.work import Work

CONFIG = CONFIGS["reward_model_members"]
ON_POLICY = ("ppo", "ppo_lora", "rloo", "grpo")
# peft 0.19 reads a property that transformers 5.17 has renamed; we do not call this class ourselves
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.build(tmp_path_factory.mktemp("members") / "world")


@pytest.fixture(scope="module")
def of_members(world):
    """The world in which every reward model is the ensemble."""
    return replace(world, reward=world.ensemble, reward_adapter=world.ensemble)


def test_members_without_adapters_are_refused_with_what_to_set():
    with pytest.raises(ValidationError, match=r"members is 4, but lora_rank is 0.*set lora_rank"):
        RewardModelConfig(members=4)


@PEFT_WARNS
def test_the_report_is_what_plain_transformers_and_peft_find(world, tmp_path):
    report = run(change(CONFIG, epochs=8, learning_rate=1e-2), world, tmp_path / "out")
    table = with_winners(read_table(world.data, "preferences", "eval"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")

    @torch.no_grad()
    def gaps(model):
        said = []
        for row in table.itertuples():
            texts = (
                encode_pair(row.prompt, t, tokenizer, 14)[0] for t in (row.chosen, row.rejected)
            )
            one, two = (model(torch.tensor([ids])).logits[0, 0] for ids in texts)
            said.append((one, two))
        return torch.tensor(said)

    members = []
    for number in (1, 2, 3):
        base = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "out" / "trunk", num_labels=1
        )
        members.append(gaps(PeftModel.from_pretrained(base, tmp_path / f"out/members/{number}")))
    average = gaps(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"))
    decided = ~torch.tensor(table["tie"].tolist())

    def accuracy(scores):
        return ((scores[:, 0] > scores[:, 1])[decided]).double().mean().item()

    shown = report.tables["reward_members"].set_index("model")
    for number, scores in enumerate(members, start=1):
        assert shown.loc[f"member {number}", "accuracy"] == pytest.approx(accuracy(scores))
    assert shown.loc["weight average", "accuracy"] == pytest.approx(accuracy(average))
    assert report.weight_average_accuracy == pytest.approx(accuracy(average))
    assert report.member_accuracy == pytest.approx(sum(map(accuracy, members)) / 3)

    facts = read_card(tmp_path / "out")["members"]
    assert shown["reward_std"][:3].tolist() == [fact["reward_std"] for fact in facts]
    normalised = torch.stack(
        [(s - f["reward_mean"]) / f["reward_std"] for s, f in zip(members, facts, strict=True)]
    )
    mean = normalised.mean(0)
    assert report.accuracy == pytest.approx(accuracy(mean))
    assert report.spread == pytest.approx(normalised.std(0, correction=0).mean().item(), rel=1e-4)
    held_out = report.tables["reward_held_out"]
    assert held_out["chosen_reward"].tolist() == pytest.approx(mean[:, 0].tolist(), abs=1e-4)
    gap = (mean[:, 0] - mean[:, 1]) * sum(fact["reward_std"] for fact in facts) / 3
    losses = torch.where(decided, -logsigmoid(gap), -(logsigmoid(gap) + logsigmoid(-gap)) / 2)
    assert report.held_out_loss == pytest.approx(losses.mean().item(), rel=1e-4)
    assert report.members == 3


def test_each_member_is_normalised_on_the_same_samples(world, tmp_path, monkeypatch):
    kept = []
    samples = reward_model._sft_samples

    def keep(*arguments):
        for packed in samples(*arguments):
            kept.append(packed)
            yield packed

    monkeypatch.setattr(reward_model, "_sft_samples", keep)
    run(change(CONFIG, normalization_samples=32), world, tmp_path / "out")
    model, _ = load_reward_model(tmp_path / "out")
    with torch.no_grad():
        scores = torch.cat([model.member_scores(packed) for packed in kept], 1)
        average = ScalarModel.load(tmp_path / "out")
        scores = torch.cat([scores, torch.cat([average.scores(p) for p in kept])[None]])
    assert scores.shape == (4, 32)
    assert_close(scores.mean(1), torch.zeros(4), atol=1e-4, rtol=0)
    assert_close(scores.std(1), torch.ones(4), atol=1e-3, rtol=0)


@pytest.mark.parametrize("member", [1, 3])
def test_the_first_gradient_of_a_member_is_that_of_its_own_votes(world, tmp_path, member):
    recovery = Recovery(tmp_path / "checkpoints", every_seconds=0, keep=1000)
    log = MemoryLogger()
    config = change(CONFIG, max_grad_norm=1e6, epochs=1, batch_size=24)
    run(config, world, tmp_path / "out", recovery=recovery, logger=log)
    found = first_gradients(tmp_path / "checkpoints", f"member {member}")

    network = ScalarModel.from_policy(world.sft, torch.Generator()).with_new_head(
        generator(0, f"reward/head/{member}")
    )
    adapt(network, config, f"reward-{member}", seed=0, stream=f"reward/adapter/{member}")
    tokenizer = AutoTokenizer.from_pretrained(world.sft)
    pairs, table, _ = encode_pairs(read_table(world.data, "preferences", "train"), tokenizer, 14)
    prompts = prompt_numbers(table)
    weights = [bootstrap(prompts, generator(0, f"reward/votes/{k}")) for k in (1, 2, 3)]
    assert 0 in weights[member - 1]
    assert max(weights[member - 1]) > 1
    (rows,) = (step.picked for step in MemberBatches(weights, 24, 1, 0))
    total, learnt = 0, network.learnable()
    for row in rows[member - 1]:
        gap = network.scores(one(pairs[row].chosen)) - network.scores(one(pairs[row].rejected))
        loss = -logsigmoid(gap - pairs[row].margin)
        if pairs[row].tie:
            loss = -(logsigmoid(gap) + logsigmoid(-gap)) / 2
        total = total + weights[member - 1][row] * loss
    (total / sum(weights[member - 1])).backward()
    assert found.keys() == learnt.keys()
    for name, parameter in learnt.items():
        assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)
    assert set(log.history[0][1]) == {
        "loss",
        "accuracy",
        "loss_spread",
        "grad_norm",
        "learning_rate",
    }


def one(ids):
    return pack([ids], "cpu")


def test_steps_in_which_no_member_has_votes_are_taken_all_the_same(world, tmp_path):
    log = MemoryLogger()
    config = change(CONFIG, batch_size=1, micro_batch_size=1, epochs=1, members=2)
    run(config, world, tmp_path / "out", logger=log)
    losses = ["loss" in values for _, values in log.history]
    assert len(losses) == 24
    assert not all(losses)
    assert all("grad_norm" in values for _, values in log.history)


def test_sharing_what_lies_below_changes_no_weight(world, tmp_path, monkeypatch):
    shared = run(CONFIG, world, tmp_path / "shared")
    monkeypatch.setattr("rlhf_core.training.members.adapted_from", lambda _: None)
    whole = run(CONFIG, world, tmp_path / "whole")
    assert whole.summary() == pytest.approx(shared.summary(), rel=1e-4, abs=1e-5)


def test_a_single_member_is_a_reward_model_as_before(world, tmp_path):
    run(change(CONFIG, members=1), world, tmp_path / "out")
    assert "members" not in read_card(tmp_path / "out")
    assert not (tmp_path / "out" / "members").exists()


@pytest.mark.parametrize("stage", ON_POLICY)
@pytest.mark.parametrize("how", ["mean", "min", "mean_minus_variance", "weight_average"])
def test_a_policy_learns_from_any_combination_and_the_spread_is_a_metric(
    world, of_members, tmp_path, stage, how
):
    log = MemoryLogger()
    config = change(CONFIGS[stage], combine_members=how, iterations=1)
    run(config, of_members, tmp_path / "out", logger=log)
    metrics = log.history[0][1]
    assert metrics["reward/spread"] > 0
    assert all(math.isfinite(value) for value in metrics.values())


def test_without_members_there_is_no_spread(world, tmp_path):
    log = MemoryLogger()
    run(change(CONFIGS["rloo"], iterations=1), world, tmp_path / "out", logger=log)
    assert "reward/spread" not in log.history[0][1]


def test_with_lora_policy_and_members_share_one_transformer(of_members):
    inputs = {"sft": of_members.sft, "reward": of_members.ensemble, "data": of_members.data}
    work = Work(inputs=inputs, sections={"sampling": SAMPLING})
    actors = Actors.load(CONFIGS["ppo_lora"], work)
    (reward,) = actors.rewards.values()
    assert [member.model is actors.policy.model for member in reward.members] == [True] * 3


@pytest.mark.parametrize("stage", ["ppo_lora", "grpo"])
def test_stopped_within_an_iteration_it_goes_on_to_the_same_bits(of_members, tmp_path, stage):
    class StopsItself(MemoryLogger):
        def phase(self, what, done=0, total=0):
            super().phase(what, done, total)
            if what.startswith("updating"):
                self.seen = getattr(self, "seen", 0) + 1
                if self.seen == 4:
                    signal.raise_signal(signal.SIGTERM)

    whole = MemoryLogger()
    run(CONFIGS[stage], of_members, tmp_path / "whole", logger=whole)
    recovery = Recovery(tmp_path / "checkpoints", every_seconds=3600)
    with pytest.raises(Interrupted):
        run(
            CONFIGS[stage],
            of_members,
            tmp_path / "part",
            logger=StopsItself(),
            recovery=recovery,
        )
    resumed = MemoryLogger()
    run(CONFIGS[stage], of_members, tmp_path / "part", logger=resumed, recovery=recovery)
    assert resumed.history == whole.history
    assert digest(tmp_path / "part") == digest(tmp_path / "whole")


@pytest.mark.parametrize("how", ["min", "weight_average"])
def test_best_of_n_chooses_by_the_combination(of_members, tmp_path, how):
    inputs = {name: getattr(of_members, name) for name in ("data", "sft")}
    inputs |= {"policy": of_members.sft, "reward": of_members.ensemble}
    config = EvaluationConfig(combine_members=how, best_of=4, samples_per_prompt=2, prompts=4)
    report = evaluate(config, Work(inputs=inputs, sections=JUDGED))
    arms = {arm.name: arm.proxy_reward.value for arm in report.scorecard.arms}
    assert arms["best_of_n"] > arms["sft"]

"""RLOO on the toy world: baseline and gradient by hand, and that it learns."""

import logging
from dataclasses import replace

import pytest
import torch
from plain import first_roll_out, plain_logprobs, plain_policy, plain_scores
from pydantic import ValidationError
from tiny import first_gradients

from rlhf_core.backbone.directory import read_card
from rlhf_core.errors import ConfigError, DataError, ModelError
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.onpolicy import RLOOConfig
from rlhf_core.settings.rewards import RewardTerm
from rlhf_core.stages.rloo import assign_credit, train_rloo
from rlhf_core.training.recovery import Recovery
from rlhf_core.types import PromptBatch, Responses, Rollout

CONFIG = RLOOConfig(
    learning_rate=2e-3,
    schedule="constant",
    warmup_ratio=0,
    iterations=2,
    rollout_size=16,
    batch_size=8,
    micro_batch_size=8,
    group_size=4,
    epochs=2,
    kl_coef=0.1,
    kl_horizon=100,
    update_kl_limit=0,
)


def change(**settings):
    return RLOOConfig(**dict(CONFIG) | settings)


@pytest.fixture
def train(toy_work, tmp_path):
    def run(config=CONFIG, *roles, **parts):
        work = toy_work(*roles, outputs={"policy": tmp_path / "policy"}, **parts)
        return train_rloo(config, work)

    return run


def test_assign_creditd_by_hand():
    # Two prompts with two responses each; the second response has a masked place, the last no end.
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()
    logprobs = torch.tensor([[-1.0, -2, -3], [-1, -1, 0], [-2, -2, -2], [-1, -1, -1]])
    ref = torch.tensor([[-2.0, -2, -3], [-1, -3, 0], [-2, -2, -2], [-1, -1, -4]])
    nothing = torch.zeros(4, 3)
    said = Responses(nothing.long(), mask, torch.tensor([True, True, True, False]))
    rollout = replace(
        Rollout.unmeasured(PromptBatch(nothing.long(), mask), said),
        logprobs=logprobs,
        ref_logprobs=ref,
        scores=torch.tensor([3.0, 1.0, 2.0, 5.0]),
    )
    config = change(group_size=2, missing_eos_value=0.5)
    advantages, stats = assign_credit(rollout, 0.1, config=config)
    # KL: 1, 2, 0, 3 nats; rewards 3 - 0.1, 1 - 0.2, 2, 5 - 0.5 - 0.3; less that of the other.
    rewards = [2.9, 0.8, 2.0, 4.2]
    assert advantages[:, 0].tolist() == pytest.approx([2.1, -2.1, -2.2, 2.2])
    assert torch.equal(advantages, advantages[:, :1] * mask)
    assert stats["objective/reward"] == pytest.approx(sum(rewards) / 4)
    assert stats["objective/score"] == pytest.approx(11 / 4)
    assert stats["objective/kl"] == pytest.approx(6 / 4)
    # The standard deviation of two numbers is their distance over the square root of 2.
    assert stats["group/spread"] == pytest.approx((2.1 + 2.2) / 2 / 2**0.5)


def test_first_update_is_reinforce_with_a_leave_one_out_baseline(
    train, toy_sft, toy_reward, prepared, tmp_path, logger
):
    sampling = SamplingConfig(max_prompt_length=8, max_new_tokens=5, temperature=0.7)
    one = {"iterations": 1, "epochs": 1, "batch_size": 16, "micro_batch_size": 3}
    recovery = Recovery(tmp_path / "checkpoints", every_seconds=0)
    train(change(**one, max_grad_norm=1e6), sampling=sampling, recovery=recovery)
    ((_, stats),) = logger.history

    texts, finished = first_roll_out("rloo", toy_sft, prepared, sampling, 16, group=4)
    assert 0 < finished.sum() < 16  # both kinds are here
    rewards = plain_scores(toy_reward, texts) - (~finished).float()  # the KL is 0
    baseline = (rewards.view(4, 4).sum(1, keepdim=True) - rewards.view(4, 4)) / 3
    advantages = (rewards.view(4, 4) - baseline).flatten()
    policy = plain_policy(toy_sft)
    sums = torch.stack([plain_logprobs(policy, *text, 0.7).sum() for text in texts])
    (-(advantages * sums).mean()).backward()
    gradients = first_gradients(tmp_path / "checkpoints", "policy")
    wanted = {f"model.{name}": p.grad for name, p in policy.named_parameters()}
    assert set(gradients) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)
    lengths = torch.tensor([len(said) for _, said in texts])
    # At ratio 1 a token's objective is its advantage.
    loss = -(advantages * lengths).sum().item() / 16
    assert stats["policy/loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert stats["objective/reward"] == pytest.approx(rewards.mean().item(), rel=1e-4)
    assert stats["group/spread"] == pytest.approx(rewards.view(4, 4).std(1).mean().item(), rel=1e-4)


LEARNS = {"all weights": {"learning_rate": 2e-3}, "LoRA": {"learning_rate": 1e-2, "lora_rank": 4}}


@pytest.mark.parametrize("settings", LEARNS.values(), ids=LEARNS)
def test_score_rises(train, logger, settings):
    free = {"kl_control": "fixed", "kl_coef": 0.0, "iterations": 12}
    train(change(**settings, **free, rollout_size=32, batch_size=32))
    scores = logger.series("objective/score")
    assert sum(scores[-2:]) / 2 > sum(scores[:2]) / 2 + 0.5
    assert logger.series("objective/kl")[-1] > 1


def test_kl_that_is_dear_holds_the_policy(train):
    kl = {}
    for price in (0.0, 1000.0):
        log = MemoryLogger()
        config = {"kl_control": "fixed", "kl_coef": price, "iterations": 4}
        train(change(**config), logger=log)
        kl[price] = abs(log.series("objective/kl")[-1])
    assert kl[1000.0] < kl[0.0] / 3


def test_coefficient_that_is_logged_is_the_one_applied(train, logger):
    config = change(kl_coef=0.3, kl_target=0.5, iterations=4, missing_eos_value=0.8)
    train(config, sampling=SamplingConfig(max_prompt_length=8, max_new_tokens=5))
    for _, stats in logger.history:
        paid = stats["objective/kl_coef"] * stats["objective/kl"]
        expected = stats["objective/score"] - 0.8 * (1 - stats["response/finished"]) - paid
        assert stats["objective/reward"] == pytest.approx(expected, abs=1e-5)
    assert len(set(logger.series("objective/kl_coef"))) == 4


def test_parts_of_a_reward_are_weighed_and_logged(train, logger):
    parts = (RewardTerm(weight=2.0), RewardTerm(source="tiny:brevity", weight=0.1))
    train(change(rewards=parts))
    for _, stats in logger.history:
        whole = 2 * stats["reward/reward_model"] + 0.1 * stats["reward/brevity"]
        assert stats["objective/score"] == pytest.approx(whole, abs=1e-4)


def test_without_a_reward_model_where_no_part_asks_for_one(train, logger):
    train(change(rewards=(RewardTerm(source="tiny:brevity"),)), "sft", "data")
    assert max(logger.series("objective/score")) <= 0


def test_run_stops_at_the_kl_budget(train, logger, tmp_path, caplog):
    config = change(iterations=12, kl_coef=0.0, kl_control="fixed", kl_budget=0.5)
    with caplog.at_level(logging.WARNING):
        report = train(config)
    kl = logger.series("objective/kl")
    assert kl[-1] > 0.5 >= max(kl[:-1])
    assert report.iterations == len(kl) < 12
    assert read_card(tmp_path / "policy")["iterations"] == len(kl)
    assert set(report.figures) == {"rloo_training", "rloo_frontier"}
    assert set(report.tables["rloo_samples"]["iteration"]) == {1, len(kl)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"group_size": 1}, "greater than or equal to 2"),
        ({"group_size": 3}, "rollout_size 16 is not a multiple of group_size 3"),
        ({"batch_size": 6}, "batch_size 6 is not a multiple of group_size 4"),
        ({"batch_size": 20}, "batch_size 20 is larger than rollout_size 16"),
        ({"dual_clip": 0.5}, r"dual_clip 0\.5 must be above 1"),
        ({"kl_coef": 0.0}, r"kl_coef 0 cannot adapt; .* set kl_control to fixed"),
        ({"rewards": (RewardTerm(), RewardTerm())}, "reward_model is listed 2 times"),
        ({"gamma": 0.9}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_contradict_each_other(settings, said):
    with pytest.raises(ValidationError, match=said):
        change(**settings)


def test_what_is_refused_in_words(train, toy_sft, prepared, tmp_path, logger):
    with pytest.raises(ConfigError, match=r"sampling\.max_prompt_length \+ max_new_tokens asks"):
        train(sampling=SamplingConfig(max_prompt_length=30, max_new_tokens=11))
    with pytest.raises(ModelError, match="kind 'policy', but reward is needed"):
        train(reward=toy_sft)
    with pytest.raises(ConfigError, match="the reward 'reward_model' has no model directory"):
        train(CONFIG, "sft", "data")
    with pytest.raises(ConfigError, match="'tiny:missing' cannot be imported"):
        train(change(rewards=(RewardTerm(source="tiny:missing"),)))
    (tmp_path / "prompts.train.jsonl").write_text("")
    with pytest.raises(DataError, match="no prompts to train on"):
        train(data=tmp_path)
    assert not logger.history

"""GRPO on the toy world: its advantages and its loss by hand, and that it learns."""

from dataclasses import replace

import pytest
import torch
from plain import first_roll_out, plain_logprobs, plain_policy, plain_scores
from pydantic import ValidationError
from tiny import first_gradients

from rlhf_core.backbone.networks import Policy
from rlhf_core.metrics import MemoryLogger
from rlhf_core.onpolicy.update import optimise_policy
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.onpolicy import GRPOConfig
from rlhf_core.stages.grpo import assign_credit, train_grpo
from rlhf_core.training.learner import Learner
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.recovery import Recovery
from rlhf_core.types import PromptBatch, Responses, Rollout

CONFIG = GRPOConfig(
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
    update_kl_limit=0,
)


def change(**settings):
    return GRPOConfig(**dict(CONFIG) | settings)


@pytest.fixture
def train(toy_work, tmp_path):
    def run(config=CONFIG, **parts):
        return train_grpo(config, toy_work(outputs={"policy": tmp_path / "policy"}, **parts))

    return run


def small_rollout():
    """Two prompts with two responses each; the second has a masked place, the last no end."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()
    nothing = torch.zeros(4, 3)
    said = Responses(nothing.long(), mask, torch.tensor([True, True, True, False]))
    rollout = Rollout.unmeasured(PromptBatch(nothing.long(), mask), said)
    return replace(rollout, scores=torch.tensor([3.0, 1.0, 2.0, 2.5]))


@pytest.mark.parametrize("scale", [True, False])
def test_assign_creditd_by_hand(scale):
    config = change(group_size=2, missing_eos_value=1.5, scale=scale)
    rollout = small_rollout()
    advantages, stats = assign_credit(rollout, 0.1, config=config)
    # Scores 3, 1 | 2, 2.5 - 1.5: less the mean of the two, and with scale over 2 / √2 and 1 / √2.
    expected = [0.5**0.5, -(0.5**0.5)] * 2 if scale else [1, -1, 0.5, -0.5]
    assert advantages[:, 0].tolist() == pytest.approx(expected, rel=1e-3)
    assert torch.equal(advantages, advantages[:, :1] * rollout.responses.mask)
    assert stats["objective/reward"] == pytest.approx(7 / 4)
    assert stats["group/spread"] == pytest.approx((2 + 1) / 2 / 2**0.5)


def test_a_group_that_is_all_alike_teaches_nothing():
    rollout = replace(small_rollout(), scores=torch.tensor([2.0, 2.0, 1.0, 2.0]))
    config = change(group_size=2, missing_eos_value=1.0)
    advantages, stats = assign_credit(rollout, 0.1, config=config)
    assert torch.equal(advantages, torch.zeros(4, 3))
    assert stats["group/spread"] == 0


@pytest.mark.parametrize("scale", [True, False])
def test_first_update_by_hand(train, toy_sft, toy_reward, prepared, tmp_path, logger, scale):
    sampling = SamplingConfig(max_prompt_length=8, max_new_tokens=5, temperature=0.8)
    one = {"iterations": 1, "epochs": 1, "batch_size": 16, "micro_batch_size": 3, "scale": scale}
    recovery = Recovery(tmp_path / "checkpoints", every_seconds=0)
    train(change(**one, max_grad_norm=1e6), sampling=sampling, recovery=recovery)

    texts, finished = first_roll_out("grpo", toy_sft, prepared, sampling, 16, group=4)
    assert 0 < finished.sum() < 16
    scores = (plain_scores(toy_reward, texts) - (~finished).float()).view(4, 4)
    apart = scores - scores.mean(1, keepdim=True)
    advantages = (apart / scores.std(1, keepdim=True) if scale else apart).flatten()
    policy = plain_policy(toy_sft)
    sums = torch.stack([plain_logprobs(policy, *text, 0.8).sum() for text in texts])
    tokens = sum(len(said) for _, said in texts)
    # The policy is its reference: k3 and its gradient are 0.
    (-(advantages * sums).sum() / tokens).backward()
    gradients = first_gradients(tmp_path / "checkpoints", "policy")
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(gradients[f"model.{name}"], parameter.grad, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("dual_clip", [0.0, 1.2])
@pytest.mark.parametrize("micro_batch_size", [3, 16])
def test_loss_and_gradient_by_hand_once_the_policy_has_moved(
    toy_sft, toy_reward, prepared, micro_batch_size, dual_clip
):
    sampling = SamplingConfig(max_prompt_length=8, max_new_tokens=5)
    texts, _ = first_roll_out("grpo", toy_sft, prepared, sampling, 16, group=4)
    draws = torch.Generator().manual_seed(0)
    advantages = torch.randn(16, generator=draws)
    policy = plain_policy(toy_sft)
    now = [plain_logprobs(policy, *text) for text in texts]
    old, ref = (
        [x.detach() + 0.3 * torch.randn(len(x), generator=draws) for x in now] for _ in "ab"
    )
    losses, clipped, moved = [], 0, []
    for a, x, o, r in zip(advantages, now, old, ref, strict=True):
        ratio = (x - o).exp()
        objective = torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
        if dual_clip and a < 0:
            objective = torch.max(objective, dual_clip * a)
        clipped += (objective != ratio * a).sum().item()
        moved.append(ratio - 1 - (x - o))
        losses.append(-objective + 0.4 * ((r - x).exp() - 1 - (r - x)))
    loss = torch.cat(losses).mean()
    loss.backward()

    def padded(rows):
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    asked = [torch.tensor(prompt) for prompt, _ in texts]
    said = [torch.tensor(response) for _, response in texts]
    full = [[torch.ones(len(x), dtype=torch.bool) for x in side] for side in (asked, said)]
    mask = padded(full[1])
    rollout = Rollout.unmeasured(
        PromptBatch(padded(asked), padded(full[0])), Responses(padded(said), mask, mask.any(1))
    )
    rollout = replace(rollout, logprobs=padded(old), ref_logprobs=padded(ref))
    config = change(dual_clip=dual_clip, micro_batch_size=micro_batch_size, max_grad_norm=1e6)
    learner = Learner(Policy.load(toy_sft, "cpu")[0], config, 10)
    stats = optimise_policy(
        rollout,
        advantages.unsqueeze(1) * mask,
        list(range(16)),
        first=False,
        check=lambda: None,
        learner=learner,
        config=config,
        temperature=1.0,
        ranks=Ranks(),
        kl_coef=0.4,
    )
    norm = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm().item()
    assert stats["policy/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert stats["policy/grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert stats["policy/clip_fraction"] == pytest.approx(clipped / mask.sum().item())
    assert stats["policy/approx_kl"] == pytest.approx(torch.cat(moved).mean().item(), rel=1e-3)


LEARNS = {"all weights": {"learning_rate": 2e-3}, "LoRA": {"learning_rate": 5e-3, "lora_rank": 4}}


@pytest.mark.parametrize("settings", LEARNS.values(), ids=LEARNS)
def test_score_rises(train, logger, settings):
    train(change(**settings, kl_coef=0.0, iterations=20, rollout_size=32, batch_size=32))
    scores = logger.series("objective/score")
    assert sum(scores[-2:]) / 2 > sum(scores[:2]) / 2 + 0.4
    assert logger.series("objective/kl")[-1] > 1


def test_kl_that_is_dear_holds_the_policy(train):
    kl = {}
    for price in (0.0, 100.0):
        log = MemoryLogger()
        train(change(kl_coef=price, iterations=6, learning_rate=5e-4), logger=log)
        kl[price] = abs(log.series("objective/kl")[-1])
        assert set(log.series("objective/kl_coef")) == {price}
    assert kl[100.0] < kl[0.0] / 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"group_size": 3}, "rollout_size 16 is not a multiple of group_size 3"),
        ({"batch_size": 6}, "batch_size 6 is not a multiple of group_size 4"),
        ({"dual_clip": 1.0}, "dual_clip 1 must be above 1"),
        ({"kl_control": "fixed"}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_contradict_each_other(settings, said):
    with pytest.raises(ValidationError, match=said):
        change(**settings)


def test_report_names_the_stage(train, logger):
    report = train()
    assert set(report.figures) == {"grpo_training", "grpo_frontier"}
    assert set(report.tables) == {"grpo_samples"}
    assert report.score == logger.series("objective/score")[-1]

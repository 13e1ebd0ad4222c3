"""PPO, RLOO and GRPO learn from a shaped score."""

import pytest
import torch
from tiny import CONFIGS, World, change, digest, run

from rlhf_core.metrics import MemoryLogger
from rlhf_core.rewards.shaping import Shaping
from rlhf_core.settings.rewards import ShapingSection
from rlhf_core.stages import rloo
from rlhf_core.types import PromptBatch, Responses, Rollout


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.build(tmp_path_factory.mktemp("shaping") / "world")


def learn(world, output, stage, **settings):
    log = MemoryLogger()
    run(change(CONFIGS[stage], shaping=ShapingSection(**settings)), world, output, logger=log)
    return log


@pytest.mark.parametrize("stage", ["ppo", "ppo_lora", "rloo", "grpo"])
@pytest.mark.parametrize("transform", ["whiten", "sigmoid"])
def test_every_on_policy_stage_learns_from_the_shaped_score_and_logs_the_plain_one(
    world, tmp_path, stage, transform
):
    plain = learn(world, tmp_path / "plain", stage)
    shaped = learn(world, tmp_path / "shaped", stage, transform=transform)
    assert not plain.series("objective/shaped_score")
    # The first roll-out is the same; what is learnt from it is not.
    assert plain.series("objective/score")[0] == shaped.series("objective/score")[0]
    assert digest(tmp_path / "plain") != digest(tmp_path / "shaped")
    values = shaped.series("objective/shaped_score")
    if transform == "sigmoid":
        assert all(0 < value < 1 for value in values)
    else:
        assert values[0] == pytest.approx(0, abs=1e-6)


def test_reference_answers_are_sampled_once_for_a_prompt(world, tmp_path, monkeypatch):
    kept = []
    real = Shaping.keep_reference

    def keep(self, prompts, scores):
        kept.append((list(prompts), scores.clone()))
        real(self, prompts, scores)

    monkeypatch.setattr(Shaping, "keep_reference", keep)
    learn(world, tmp_path, "rloo", transform="sigmoid", reference_answers=3)
    numbers = [number for prompts, _ in kept for number in prompts]
    assert len(numbers) == len(set(numbers)) == 12  # 3 iterations of 4 prompts
    assert {scores.shape for _, scores in kept} == {(4, 3)}
    assert torch.cat([scores for _, scores in kept]).std() > 0


def test_credit_is_assigned_by_the_shaped_score(world):
    """A penalty that only long responses pay lowers their advantage, in units of the reward."""
    scores, kl_coef = torch.tensor([1.0, 1.0]), 0.0
    mask = torch.tensor([[True, True], [True, False]])
    zeros = torch.zeros(2, 2)
    rollout = Rollout(
        PromptBatch(torch.ones(2, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.bool)),
        Responses(torch.ones(2, 2, dtype=torch.long), mask, torch.tensor([True, True])),
        *(zeros, zeros, zeros, scores, {}),
        shaped=scores - torch.tensor([0.5, 0.0]),
    )
    config = change(CONFIGS["rloo"], rollout_size=2, batch_size=2)
    advantages, stats = rloo.assign_credit(rollout, kl_coef, config=config)
    assert advantages.tolist() == [[-0.5, -0.5], [0.5, 0.0]]
    assert stats["objective/score"] == 1.0
    assert stats["objective/shaped_score"] == 0.75

"""A planted hack in the toy world, and an honest run; benchmarks/hacks.py has the real ones."""

import pytest

from rlhf_core.settings.onpolicy import RLOOConfig
from rlhf_core.settings.rewards import RewardTerm
from rlhf_core.stages.rloo import train_rloo

CONFIG = RLOOConfig(
    learning_rate=2e-3,
    schedule="constant",
    iterations=7,
    rollout_size=32,
    batch_size=16,
    epochs=2,
    kl_coef=0.02,
    kl_horizon=1000,
    update_kl_limit=0,
    monitor={"prompts": 8},
)


def cold(prompts, responses):
    """A hole in the reward: a word that nobody votes for makes any answer better."""
    return [4.0 * response.split().count("cold") for response in responses]


@pytest.mark.parametrize("hole", [False, True])
def test_a_planted_hack_trips_and_an_honest_run_does_not(toy_work, toy_reward, tmp_path, hole):
    hack = {"rewards": (RewardTerm(), RewardTerm(source="test_planted_hack:cold"))} if hole else {}
    work = toy_work(outputs={"policy": tmp_path / "policy"})
    work.inputs["held_out"] = toy_reward
    train_rloo(RLOOConfig(**dict(CONFIG) | hack), work)
    gaps, tripped = work.logger.series("monitor/gap"), {a.measure for a in work.logger.alarms}
    if hole:
        assert {"gap", "agreement_drop"} & tripped
        assert gaps[-1] > 0
    else:
        assert tripped == set()
        assert gaps == [0] * 7  # the held-out model is the reward model itself

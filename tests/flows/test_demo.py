"""The demonstration learns what it claims to: the shipped config, held against the known truth."""

from pathlib import Path

import pytest

from flows.cli.loading import load_config
from flows.config import PipelineConfig
from flows.rlhf import rlhf

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


@pytest.mark.integration
@pytest.mark.usefixtures("home", "prefect_server")
def test_the_demo_raises_the_true_reward_and_stays_near_its_reference():
    result = rlhf(load_config(DEMO, ["seed=3"], PipelineConfig))
    sft, policy = result.scorecard.arm("sft"), result.scorecard.arm("policy")
    against_sft = result.scorecard.comparison("policy", "sft")
    assert policy.true_reward.value - sft.true_reward.value >= 0.5
    assert against_sft.judge == "true_reward"
    assert against_sft.win_rate.low > 0.7
    assert policy.kl.value < 10
    assert result.decision.promote

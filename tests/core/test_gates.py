"""Promotion: each rule alone can refuse, and says why."""

import math

import pytest
from pydantic import ValidationError

from rlhf_core.functional.ranking import Interval
from rlhf_core.gates import PromotionConfig, Verdict, judge
from rlhf_core.stages.evaluation import Arm, Comparison, Scorecard

CONFIG = PromotionConfig(
    min_win_rate=0.6,
    min_win_rate_over_champion=0.55,
    max_kl=10,
    max_length_ratio=1.5,
    min_distinct_ratio=0.5,
)


def exactly(value):
    return Interval(value, value, value)


def arm(name, *, kl=0.0, length=20.0, distinct_2=0.8):
    return Arm(
        name=name,
        proxy_reward=exactly(0),
        true_reward=None,
        kl=None if kl is None else exactly(kl),
        perplexity=3,
        length=length,
        distinct_1=0.5,
        distinct_2=distinct_2,
    )


def comparison(opponent, low):
    return Comparison(
        candidate="policy",
        opponent=opponent,
        judge="true_reward",
        wins=8,
        ties=0,
        losses=2,
        win_rate=Interval(0.8, low, 0.9),
    )


def scorecard(*, low=0.61, champion=None, **policy):
    """A policy that passes every rule of CONFIG just so; each argument moves one number."""
    just_so = {"kl": 10.0, "length": 30.0, "distinct_2": 0.4}
    arms = [arm("sft"), arm("policy", **just_so | policy)]
    comparisons = [comparison("sft", low)]
    if champion is not None:
        arms.append(arm("champion"))
        comparisons.append(comparison("champion", champion))
    return Scorecard(arms=tuple(arms), comparisons=tuple(comparisons))


def failures(verdict):
    return [reason for reason in verdict.reasons if reason.startswith("FAIL: ")]


def test_policy_that_meets_every_rule_is_promoted():
    verdict = judge(CONFIG, scorecard())
    assert verdict.promote
    assert len(verdict.reasons) == 4
    assert all(reason.startswith("pass: ") for reason in verdict.reasons)


def test_champion_adds_a_rule():
    verdict = judge(CONFIG, scorecard(champion=0.56))
    assert verdict.promote
    assert len(verdict.reasons) == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"low": 0.6}, "win rate over sft 0.800 [0.600, 0.900] by true_reward"),  # has to exceed
        ({"champion": 0.55}, "win rate over champion 0.800 [0.550, 0.900] by true_reward"),
        ({"kl": 10.01}, "KL to SFT 10.01 nats per sequence; at most 10.00"),
        ({"kl": None}, "KL to SFT is unknown"),
        ({"length": 30.1}, "length 30.10 tokens; at most 30.00"),
        ({"distinct_2": 0.39}, "distinct-2 0.390; at least 0.400"),
        ({"kl": math.nan}, "KL to SFT nan"),
        ({"length": math.nan}, "length nan"),
        ({"distinct_2": math.nan}, "distinct-2 nan"),
        ({"low": math.nan}, "win rate over sft"),
    ],
)
def test_each_rule_refuses_alone_and_says_why(change, said):
    verdict = judge(CONFIG, scorecard(**change))
    assert not verdict.promote
    (failure,) = failures(verdict)
    assert said in failure


def test_every_rule_is_answered_even_when_all_fail():
    bad = {"low": 0.1, "champion": 0.1, "kl": 99.0, "length": 99.0, "distinct_2": 0.01}
    assert len(failures(judge(CONFIG, scorecard(**bad)))) == 5


def test_refusal_from_outside_is_added_to_the_reasons():
    verdict = judge(CONFIG, scorecard())
    refused = verdict.refuse("the champion changed meanwhile")
    assert not refused.promote
    assert refused.reasons == (*verdict.reasons, "FAIL: the champion changed meanwhile")
    assert verdict.promote  # a verdict is a value


def test_scorecard_without_what_is_asked_for():
    whole = scorecard(champion=0.9)
    for arms, comparisons, said in (
        (whole.arms[:1], whole.comparisons, "arms policy and sft"),
        (whole.arms[1:], whole.comparisons, "arms policy and sft"),
        (whole.arms, whole.comparisons[1:], "comparison of policy and sft"),
        (whole.arms, whole.comparisons[:1], "comparison of policy and champion"),
    ):
        with pytest.raises(ValueError, match=said):
            judge(CONFIG, Scorecard(arms=arms, comparisons=comparisons))


def test_scorecard_and_verdict_survive_json():
    card = scorecard(champion=0.56)
    assert Scorecard.model_validate_json(card.model_dump_json()) == card
    verdict = judge(CONFIG, card)
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_every_setting_is_read(recording):
    config, seen = recording(CONFIG)
    judge(config, scorecard(champion=0.56))
    # Who is asked is no rule: tests/tasks/test_approval.py.
    assert set(PromotionConfig.model_fields) - seen == {"approval", "approval_days"}


def test_config_refuses_what_makes_no_sense():
    for bad in ({"min_win_rate": 1.1}, {"max_kl": 0}, {"max_length_ratio": -1}, {"max_kI": 3}):
        with pytest.raises(ValidationError):
            PromotionConfig(**bad)

"""Promotion: each rule alone can refuse, and says why."""

import math

import pytest
from pydantic import ValidationError

from rlhf_core.errors import ModelError
from rlhf_core.evaluation.card.gate import RewardQuality, require_reward_model
from rlhf_core.evaluation.intervals import can_show
from rlhf_core.evaluation.scorecard import Arm, Comparison, Scorecard
from rlhf_core.functional.interval import Interval
from rlhf_core.promotion.decision import Decision
from rlhf_core.promotion.rules import decide
from rlhf_core.rewards.canaries import CanaryResult
from rlhf_core.settings.evaluation import RewardGateConfig
from rlhf_core.settings.promotion import PromotionConfig

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


def comparison(opponent, low, prompts=10):
    return Comparison(
        candidate="policy",
        opponent=opponent,
        judge="true_reward",
        wins=16,
        ties=1,
        losses=3,
        prompts=prompts,
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


def failures(decision):
    return [reason for reason in decision.reasons if reason.startswith("FAIL: ")]


def test_policy_that_meets_every_rule_is_promoted():
    decision = decide(CONFIG, scorecard())
    assert decision.promote
    assert len(decision.reasons) == 5
    assert all(reason.startswith("pass: ") for reason in decision.reasons)


def test_champion_adds_a_rule():
    decision = decide(CONFIG, scorecard(champion=0.56))
    assert decision.promote
    assert len(decision.reasons) == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"low": 0.6}, "win rate over sft 0.800 [0.600, 0.900] by true_reward"),  # must exceed
        ({"low": 0.5}, "by true_reward, from 2 answers to each of 10 held-out prompts; the lower"),
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
    decision = decide(CONFIG, scorecard(**change))
    assert not decision.promote
    (failure,) = failures(decision)
    assert said in failure


@pytest.mark.parametrize(
    ("prompts", "least", "enough"),
    # Wilson's lower bound of n of n is n / (n + 1.96²): 0.207, 0.438, 0.510, 0.566 and 0.610.
    [
        (1, 0.2, True),
        (1, 0.21, False),
        (3, 0.43, True),
        (3, 0.5, False),
        (4, 0.5, True),
        (5, 0.6, False),
        (6, 0.6, True),
        (1, 0.0, True),
    ],
)
def test_what_so_many_prompts_can_show(prompts, least, enough):
    assert can_show(prompts, least) is enough


def test_no_champion_is_made_of_one_prompt():
    # The bootstrap of one prompt is a point: 1.000 [1.000, 1.000].
    won = Comparison(
        candidate="policy",
        opponent="sft",
        judge="true_reward",
        wins=2,
        ties=0,
        losses=0,
        prompts=1,
        win_rate=exactly(1.0),
    )
    decision = decide(PromotionConfig(), Scorecard(arms=scorecard().arms, comparisons=(won,)))
    failure, too_few = failures(decision)
    assert too_few == "FAIL: held-out prompts 1; at least 5 (promotion.min_prompts)"
    assert failure == (
        "FAIL: win rate over sft 1.000 [1.000, 1.000] by true_reward, from 2 answers to 1 held-out "
        "prompt; the lower bound must exceed 0.5, which so few prompts cannot show"
    )


@pytest.mark.parametrize(
    ("prompts", "least", "passes"), [(4, 5, False), (5, 5, True), (1, 1, True)]
)
def test_a_promotion_rests_on_enough_prompts(prompts, least, passes):
    config = PromotionConfig(min_win_rate=0.0, min_prompts=least)
    card = scorecard()
    few = card.comparisons[0].model_copy(update={"prompts": prompts})
    decision = decide(config, Scorecard(arms=card.arms, comparisons=(few,)))
    assert decision.promote is passes
    assert [reason[:22] for reason in failures(decision)] == ["FAIL: held-out prompts"] * (
        not passes
    )


def quality(value=0.7, low=0.6, high=0.8, longer=0.55, votes=200, prompts=90):
    return RewardQuality(
        accuracy=Interval(value, low, high), longer_accuracy=longer, votes=votes, prompts=prompts
    )


CHANCE = "is no better than chance, as far as 200 votes can tell"
LENGTH = 'does not beat the rule "prefer the longer"'


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (quality(), ""),
        (quality(low=0.5), f"The reward model {CHANCE}."),  # touched
        (quality(low=0.501), ""),
        (quality(0.45, 0.4, 0.5, longer=0.4), f"The reward model {CHANCE}."),
        (quality(0.4, 0.35, 0.49, longer=0.3), "The reward model is worse than chance."),
        (quality(longer=0.7), f"The reward model {LENGTH}."),  # as good
        (quality(0.44, 0.18, 0.85, longer=0.64), f"The reward model {CHANCE}, and it {LENGTH}."),
        # One prompt has an interval without width, and three could not show it either.
        (quality(1.0, 1.0, 1.0, prompts=1), f"The reward model {CHANCE}."),
        (quality(1.0, 1.0, 1.0, prompts=3), f"The reward model {CHANCE}."),
        (quality(1.0, 1.0, 1.0, prompts=4), ""),
        (quality(1.0, 1.0, 1.0, prompts=None), ""),
    ],
)
def test_what_makes_a_reward_model_doubtful(measured, said):
    assert measured.doubts == said


def test_the_numbers_of_a_reward_model_name_how_much_they_rest_on():
    assert quality(0.436, 0.18, 0.85, 0.641, votes=39, prompts=4).numbers == (
        'held-out accuracy 0.436 [0.180, 0.850] over 39 votes on 4 prompts; the rule "prefer the '
        'longer" has 0.641'
    )
    assert "over 1 vote; the" in quality(votes=1, prompts=None).numbers


@pytest.mark.parametrize(
    ("config", "measured", "said"),
    [
        ({}, None, ""),
        ({}, quality(0.3, 0.2, 0.4), ""),
        ({"min_accuracy": 0.5}, quality(low=0.501), ""),
        ({"min_accuracy": 0.6}, quality(), "the lower bound of the accuracy must exceed 0.6"),
        ({"min_accuracy": 0.5}, quality(1, 1, 1, prompts=1), "must exceed 0.5"),
        ({"min_accuracy": 0.5}, None, "the held-out accuracy is unknown, but the lower bound"),
        ({"beat_longer": True}, quality(longer=0.69), ""),
        ({"beat_longer": True}, quality(longer=0.7), "(reward_gate.beat_longer)"),
        ({"beat_longer": True}, None, "is unknown, but the accuracy must be above that of"),
    ],
)
def test_the_gate_of_the_reward_model(config, measured, said):
    config = RewardGateConfig(**config)
    if not said:
        require_reward_model(config, measured, "models:/demo-reward/3")
        return
    with pytest.raises(ModelError) as refused:
        require_reward_model(config, measured, "models:/demo-reward/3")
    assert said in str(refused.value)


def canary(kind, *beats):
    share = Interval(*beats)
    return CanaryResult(kind=kind, beats_real=share, prompts=9, answers=9, left_out=0, example="")


@pytest.mark.parametrize(
    ("most", "canaries", "said"),
    [
        (1.0, [canary("empty", 1, 0.7, 1)], ""),  # off
        (0.2, [canary("empty", 0, 0, 0.2)], ""),  # reached, not exceeded
        (0.2, [canary("empty", 0, 0, 0.1), canary("list", 0.1, 0.05, 0.21)], "'list' beats"),
        (0.2, [], "no canary was measured"),
    ],
)
def test_the_gate_asks_that_every_canary_is_shown_to_lose(most, canaries, said):
    gate = RewardGateConfig(max_canary_share=most)
    if not said:
        require_reward_model(gate, quality(), "models:/demo-reward/3", canaries)
        return
    with pytest.raises(ModelError) as refused:
        require_reward_model(gate, quality(), "models:/demo-reward/3", canaries)
    assert said in str(refused.value)
    assert str(refused.value).endswith("or change reward_gate.max_canary_share")


def test_a_reward_model_that_is_refused_is_told_with_all_its_numbers_and_the_ways_out():
    gate = RewardGateConfig(min_accuracy=0.5, beat_longer=True)
    poor = quality(0.436, 0.18, 0.85, 0.641, votes=39, prompts=12)
    with pytest.raises(ModelError) as refused:
        require_reward_model(gate, poor, "models:/demo-reward/3")
    assert str(refused.value) == (
        "no policy is trained on the reward model models:/demo-reward/3: held-out accuracy 0.436 "
        '[0.180, 0.850] over 39 votes on 12 prompts; the rule "prefer the longer" has 0.641, but '
        "the lower bound of the accuracy must exceed 0.5 (reward_gate.min_accuracy), and the "
        'accuracy must be above that of "prefer the longer" (reward_gate.beat_longer). It stays '
        "registered. Collect more or better preferences, train it with other settings, or change "
        "reward_gate.min_accuracy and reward_gate.beat_longer"
    )


def test_every_rule_is_answered_even_when_all_fail():
    bad = {"low": 0.1, "champion": 0.1, "kl": 99.0, "length": 99.0, "distinct_2": 0.01}
    assert len(failures(decide(CONFIG, scorecard(**bad)))) == 5


def test_refusal_from_outside_is_added_to_the_reasons():
    decision = decide(CONFIG, scorecard())
    refused = decision.refuse("the champion changed meanwhile")
    assert not refused.promote
    assert refused.reasons == (*decision.reasons, "FAIL: the champion changed meanwhile")
    assert decision.promote  # a decision is a value


def test_scorecard_without_what_is_asked_for():
    whole = scorecard(champion=0.9)
    for arms, comparisons, said in (
        (whole.arms[:1], whole.comparisons, "arms policy and sft"),
        (whole.arms[1:], whole.comparisons, "arms policy and sft"),
        (whole.arms, whole.comparisons[1:], "comparison of policy and sft"),
        (whole.arms, whole.comparisons[:1], "comparison of policy and champion"),
    ):
        with pytest.raises(ValueError, match=said):
            decide(CONFIG, Scorecard(arms=arms, comparisons=comparisons))


def test_a_perplexity_beyond_any_number_survives_json():
    worn_out = arm("sft").model_copy(update={"perplexity": math.inf})
    card = Scorecard(arms=(worn_out,), comparisons=())
    assert Scorecard.model_validate_json(card.model_dump_json()) == card


def test_scorecard_and_verdict_survive_json():
    card = scorecard(champion=0.56)
    assert Scorecard.model_validate_json(card.model_dump_json()) == card
    decision = decide(CONFIG, card)
    assert Decision.model_validate_json(decision.model_dump_json()) == decision


def test_config_refuses_what_makes_no_sense():
    for bad in ({"min_win_rate": 1.1}, {"max_kl": 0}, {"max_length_ratio": -1}, {"max_kI": 3}):
        with pytest.raises(ValidationError):
            PromotionConfig(**bad)

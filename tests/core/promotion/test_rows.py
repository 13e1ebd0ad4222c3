"""The rows of the gate's table, each planted to fail alone; and those that do not apply."""

import pytest

from rlhf_core.evaluation.card.report_card import ReportCard, Share, Slice
from rlhf_core.evaluation.scorecard import (
    Arm,
    Comparison,
    JudgeFacts,
    PromptLeaks,
    PromptSlice,
    Scorecard,
)
from rlhf_core.functional.interval import Interval
from rlhf_core.promotion.decision import Decision, Look
from rlhf_core.promotion.facts import Facts, Files
from rlhf_core.promotion.page import page, rows
from rlhf_core.promotion.rules import apply_rules, decide
from rlhf_core.rewards.canaries import CanaryResult
from rlhf_core.settings.promotion import PromotionConfig

N = 100


def around(value, half=0.05):
    return Interval(value, value - half, value + half)


def arm(name, *, length=20.0, signs=None):
    return Arm(
        name=name,
        proxy_reward=around(0.0),
        true_reward=None,
        kl=around(4.0),
        perplexity=3,
        length=length,
        distinct_1=0.5,
        distinct_2=0.8,
        signs={kind: around(share, 0.0) for kind, share in (signs or {}).items()},
    )


def match(opponent, wins, *, prompts=N, equal=None, points=None):
    points = points or (1.0,) * wins + (0.0,) * (prompts - wins)
    rate = sum(points) / len(points)
    return Comparison(
        candidate="policy",
        opponent=opponent,
        judge="reward_model",
        wins=wins,
        ties=0,
        losses=prompts - wins,
        prompts=prompts,
        win_rate=around(rate),
        points=points,
        length_controlled=equal,
    )


def canary(kind, *beats):
    share = Interval(*beats)
    return CanaryResult(kind=kind, beats_real=share, prompts=90, answers=90, left_out=0, example="")


def judge(**changes):
    facts = {"name": "reward_model", "pairs": 400, "unanswered": 0, "consistency": around(0.9)}
    return JudgeFacts(**{**facts, "canaries": (canary("empty", 0.1, 0.05, 0.2),), **changes})


def card(accuracy=0.7, slices=(), canaries=()):
    known = Share(share=around(accuracy), votes=300, prompts=90)
    nothing = dict.fromkeys(name for name, of in ReportCard.model_fields.items() if of.is_required)
    counts = dict.fromkeys(("votes", "ties", "prompts", "same_after_cut", "not_sampled"), 90)
    return ReportCard(
        **{
            **nothing,
            **counts,
            "min_slice_prompts": 10,
            "samples": 0,
            "accuracy": known,
            "longer": known,
            "bins": (),
            "slices": slices,
            "small_slices": (),
            "canaries": canaries,
            "canaries_against": "votes",
        }
    )


def part(value, *share):
    accuracy = Share(share=Interval(*share), votes=50, prompts=20)
    return Slice(column="lang", value=value, accuracy=accuracy, worse=True)


GOOD = {
    "sft": 75,
    "champion": 70,
    "sft_equal": around(0.7),
    "champion_equal": around(0.65),
    "ours": {"list": 0.02},
    "theirs": {"list": 0.01},
    "length": 22.0,
    "judge": judge(),
    "leaks": PromptLeaks(prompts=N, equal=0, near=2, compared=500, of=500),
    "slices": (
        PromptSlice(column="lang", value="en", prompts=tuple(range(0, N, 2))),
        PromptSlice(column="lang", value="fr", prompts=tuple(range(1, N, 2))),
    ),
}
FILES = Files(candidate="models:/p/2", digest="abc", evaluated="abc", evaluation="f00")
LOOK = Look(number=1, alpha=0.025, total=0.05, spent=0.025, opponent="models:/p/1")
CARD = card(slices=(part("fr", 0.6, 0.4, 0.8),), canaries=(canary("list", 0.3, 0.2, 0.4),))
FACTS = Facts(look=LOOK, files=FILES, report_card=CARD, alarms={})
CONFIG = PromotionConfig(protected=("lang",), max_reward_canary_share=0.8)


def scorecard(**changes):
    """A policy that passes every rule; each argument moves something."""
    given = {**GOOD, **changes}
    arms = [arm("sft", signs=given["theirs"])]
    arms.append(arm("policy", signs=given["ours"], length=given["length"]))
    comparisons = [match("sft", given["sft"], equal=given["sft_equal"])]
    if given["champion"] is not None:
        points = given.get("points")
        arms.append(arm("champion"))
        equal = given["champion_equal"]
        comparisons.append(match("champion", given["champion"], equal=equal, points=points))
    return Scorecard(
        arms=tuple(arms),
        comparisons=tuple(comparisons),
        slices=given["slices"],
        judge=given["judge"],
        leaks=given["leaks"],
    )


def failed(config=CONFIG, facts=FACTS, **changes):
    return [r.name for r in apply_rules(config, scorecard(**changes), facts) if r.passed is False]


def row(name, config=CONFIG, facts=FACTS, **changes):
    found = [r for r in apply_rules(config, scorecard(**changes), facts) if r.name == name]
    assert len(found) == 1, [r.name for r in apply_rules(config, scorecard(**changes), facts)]
    return found[0]


def test_a_policy_that_is_better_passes_every_row():
    decision = decide(CONFIG, scorecard(), FACTS)
    assert decision.promote, decision.reasons
    assert all(rule.passed for rule in decision.rules)
    assert {rule.family for rule in decision.rules} == {
        *("win rate", "win rate at equal length", "slices", "canaries", "limits", "monitor"),
        *("reward model", "judge", "integrity"),
    }


BAD_SLICE = tuple(1.0 if i % 2 == 0 else 0.36 for i in range(N))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("win rate over sft", {"sft": 58}),
        ("win rate over champion", {"champion": 58}),
        ("win rate over sft at equal length", {"sft_equal": around(0.54)}),
        ("win rate over champion at equal length", {"champion_equal": around(0.5)}),
        ("win rate over champion where lang = fr", {"points": BAD_SLICE}),
        ("sign of the canary list", {"ours": {"list": 0.18}}),
        ("worst canary of the judge", {"judge": judge(canaries=(canary("list", 1, 0.9, 1),))}),
        ("same verdict in both orders", {"judge": judge(consistency=around(0.54))}),
        ("pairs without a verdict", {"judge": judge(unanswered=41)}),
        (
            "evaluation prompts in training",
            {"leaks": PromptLeaks(prompts=N, equal=1, near=0, compared=500, of=500)},
        ),
        (
            "evaluation prompts that nearly equal one of training",
            {"leaks": PromptLeaks(prompts=N, equal=0, near=6, compared=300, of=500)},
        ),
    ],
)
def test_each_planted_fault_fails_its_row_alone(name, changes):
    assert failed(**changes) == [name]


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("alarms of the monitor", {"alarms": {"length": "monitor, iteration 4: longer."}}),
        ("accuracy on held-out votes", {"report_card": card(accuracy=0.54)}),
        ("accuracy in the worst slice", {"report_card": card(slices=(part("fr", 0.3, 0.2, 0.4),))}),
        (
            "worst canary of the reward model",
            {"report_card": card(canaries=(canary("list", 0.95, 0.85, 1),))},
        ),
        (
            "files of the candidate",
            {"files": FILES.model_copy(update={"problem": "models:/p/2 is damaged"})},
        ),
        ("loads and answers", {"files": FILES.model_copy(update={"evaluated": "other"})}),
    ],
)
def test_each_fact_fails_its_row_alone(name, facts):
    assert failed(facts=FACTS.model_copy(update=facts)) == [name]


def test_what_does_not_apply_is_said_and_neither_passes_nor_fails():
    nothing = {"judge": None, "leaks": None, "ours": {}, "theirs": {}, "champion": None}
    changes = {**nothing, "sft_equal": None, "slices": ()}
    config = PromotionConfig()
    decision = decide(config, scorecard(**changes), Facts())
    absent = [rule for rule in decision.rules if rule.passed is None]
    assert decision.promote
    assert {rule.name for rule in absent} == {
        "protected slices",
        "signs of canaries in the answers",
        "alarms of the monitor",
        "report card of the reward model",
        "judge",
        "files of the candidate",
        "evaluation prompts in training",
    }
    assert all(rule.answer == "n/a" and rule.measured for rule in absent)
    assert not any("n/a" in reason for reason in decision.reasons)


# --- levels and effects --------------------------------------------------------------------------


def test_a_row_has_its_p_value_its_level_and_what_the_prompts_can_show():
    # 70 and 62 of 100: the smaller p-value has half of alpha, the larger all of it.
    over_sft, over_champion = (
        row(f"win rate over {name}", sft=70, champion=62) for name in ("sft", "champion")
    )
    assert over_sft.p < over_champion.p == pytest.approx(0.0105, abs=1e-4)  # P(Bin ≥ 62)
    assert (over_sft.alpha, over_champion.alpha) == (0.0125, 0.025)
    assert over_champion.shows == f"a true win rate of {0.5 + over_champion.smallest_effect:.3f}"
    assert over_champion.smallest_effect == pytest.approx(0.154, abs=2e-3)
    assert over_sft.smallest_effect > over_champion.smallest_effect


def test_later_looks_ask_for_more():
    later = FACTS.model_copy(update={"look": LOOK.model_copy(update={"number": 3, "alpha": 1e-3})})
    assert failed(PromotionConfig(), champion=64) == []
    assert failed(PromotionConfig(), later, champion=64, champion_equal=None) == [
        "win rate over champion"
    ]
    shown = row("win rate over champion", facts=later)
    assert shown.alpha == 1e-3
    assert shown.smallest_effect > row("win rate over champion").smallest_effect


def test_a_policy_may_be_declared_not_worse():
    even = {"sft": 60, "champion": 52, "champion_equal": around(0.52), "slices": ()}
    loose = {"claim": "non_inferior", "margin": 0.15}
    assert "win rate over champion" in failed(PromotionConfig(), **even)
    assert failed(PromotionConfig(**loose), **even) == []
    assert "win rate over champion" in failed(PromotionConfig(claim="non_inferior"), **even)
    shown = row("win rate over champion", PromotionConfig(**loose), **even)
    assert shown.required == ("must be shown to exceed 0.35, so as to be worse by less than 0.15")


def test_settings_of_win_rates_keep_their_meaning():
    assert failed(PromotionConfig(min_win_rate=0.7), slices=()) == [
        "win rate over sft",
        "win rate over sft at equal length",
    ]
    none = {"sft": 3, "sft_equal": around(0.03, 0.02), "champion": None}
    assert failed(PromotionConfig(min_win_rate=0.0), **none, slices=()) == []


# --- slices --------------------------------------------------------------------------------------


def test_without_a_champion_slices_are_compared_with_sft():
    assert row("win rate over sft where lang = fr", champion=None).passed


def test_a_slice_of_too_few_prompts_refuses_by_name_or_is_left_out_by_name():
    few = (*GOOD["slices"], PromptSlice(column="lang", value="eo", prompts=(0, 2, 4)))
    name = "win rate over champion where lang = eo"
    assert failed(slices=few) == [name]
    skipping = CONFIG.model_copy(update={"small_slices": "skip"})
    assert failed(skipping, slices=few) == []
    shown = row(name, skipping, slices=few)
    assert shown.answer == "n/a"
    assert shown.measured == "1.000 on 3 prompts"
    assert "which so few prompts cannot show; left out (promotion.small_slices)" in shown.required


def test_a_protected_column_that_no_prompt_has_refuses():
    config = CONFIG.model_copy(update={"protected": ("lang", "topic")})
    assert failed(config) == ["win rate where topic"]
    assert "data.prompts.keep" in row("win rate where topic", config).required


def test_prompts_without_a_verdict_count_in_no_slice():
    points = (None,) * 10 + (1.0,) * 80 + (0.0,) * 10
    card = scorecard()
    card = card.model_copy(
        update={
            "comparisons": tuple(
                found.model_copy(update={"points": points}) for found in card.comparisons
            )
        }
    )
    rules = {rule.name: rule for rule in apply_rules(CONFIG, card, FACTS)}
    assert rules["win rate over champion where lang = en"].measured == "0.889 on 45 prompts"


# --- length --------------------------------------------------------------------------------------


def test_a_win_rate_that_has_no_equal_length_must_not_rest_on_length():
    unknown = {"sft_equal": None, "champion_equal": None}
    assert failed(**unknown, length=25.0) == []
    assert failed(**unknown, length=25.1) == [
        "win rate over sft at equal length",
        "win rate over champion at equal length",
    ]


# --- the decision --------------------------------------------------------------------------------


def test_few_prompts_fail_by_name():
    few = scorecard(champion=None, slices=())
    few = few.model_copy(update={"comparisons": (match("sft", 5, prompts=5),)})
    rules = {rule.name: rule for rule in apply_rules(PromotionConfig(), few)}
    assert rules["win rate over sft"].required == (
        "must be shown to exceed 0.5, which so few prompts cannot show"
    )
    assert not rules["win rate over sft"].passed
    assert rules["win rate over sft"].shows == "nothing, even if all are won"
    sign = rules["sign of the canary list"]
    assert not sign.passed
    assert "which so few prompts cannot show" in sign.required


def test_the_page_and_the_table_have_every_row():
    decision = decide(CONFIG, scorecard(champion=58), FACTS).refuse("Ada | says no")
    text, table = page(decision), rows(decision)
    assert len(table) == len(decision.rules)
    assert [line["result"] for line in table].count("FAIL") == 2
    assert text.startswith("# The policy is not promoted\n")
    assert "Refused by: win rate over champion, outcome." in text
    assert "Look 1 at models:/p/1: alpha 0.025 of 0.05; 0.025 is spent, 0.025 is left" in text
    assert "Ada \\| says no" in text
    for rule in decision.rules:
        assert f"| {rule.answer} | {rule.name} | " in text


def test_a_decision_of_an_older_release_is_read():
    old = '{"promote": true, "reasons": ["pass: win rate over sft 0.9"]}'
    found = Decision.model_validate_json(old)
    assert found.promote
    assert found.rules == ()
    new = decide(CONFIG, scorecard(), FACTS)
    assert Decision.model_validate_json(new.model_dump_json()) == new


def test_every_setting_of_the_gate_is_read(recording):
    config, seen = recording(CONFIG.model_copy(update={"claim": "non_inferior"}))
    few = (*GOOD["slices"], PromptSlice(column="lang", value="eo", prompts=(0,)))
    facts = FACTS.model_copy(update={"look": None})
    apply_rules(config, scorecard(slices=few), facts)
    # Who is asked is no rule: tests/tasks/prefect/test_approval.py.
    assert set(PromotionConfig.model_fields) - seen == {"approval", "approval_days"}

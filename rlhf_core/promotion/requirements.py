"""The rules that are bounds: on the policy, on its reward model, on the judge, on the alarms."""

from statistics import NormalDist

from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.evaluation.intervals import in_words
from rlhf_core.evaluation.scorecard import Arm, JudgeFacts, Scorecard
from rlhf_core.functional.interval import Interval
from rlhf_core.promotion.claims import absent
from rlhf_core.promotion.decision import Rule
from rlhf_core.rewards.canaries import CanaryResult
from rlhf_core.settings.promotion import PromotionConfig

_OFF = "no requirement"


def limits(config: PromotionConfig, policy: Arm, sft: Arm) -> list[Rule]:
    """KL, length and diversity of the policy, beside SFT."""
    length, distinct = config.max_length_ratio, config.min_distinct_ratio
    return [
        _kl(policy, config.max_kl),
        _at_most("length", policy.length, length * sft.length, "tokens"),
        _at_least("distinct-2", policy.distinct_2, distinct * sft.distinct_2),
    ]


def alarms(config: PromotionConfig, found: dict[str, str] | None) -> Rule:
    """Whether the monitor gave an alarm in the training of the policy."""
    name = "alarms of the monitor"
    if found is None:
        return absent(name, "monitor", "the policy was trained without a monitor")
    measured = "; ".join(f"{measure} ({line})" for measure, line in sorted(found.items()))
    refuses = config.at_alarm == "refuse"
    return Rule(
        name=name,
        family="monitor",
        measured=measured or "none",
        required="none (promotion.at_alarm)" if refuses else "shown only (promotion.at_alarm)",
        passed=not (found and refuses),
    )


# --- the reward model ----------------------------------------------------------------------------


def reward_model(config: PromotionConfig, card: ReportCard | None) -> list[Rule]:
    """Accuracy, worst slice and worst canary, as its report card has them."""
    if card is None:
        return [absent("report card of the reward model", "reward model", "there is none")]
    return [
        _accuracy(config.min_reward_accuracy, card),
        _worst_slice(config.min_reward_slice_accuracy, card),
        _reward_canary(config.max_reward_canary_share, card),
    ]


def _accuracy(least: float, card: ReportCard) -> Rule:
    name, setting = "accuracy on held-out votes", "promotion.min_reward_accuracy"
    quality = card.quality
    if least == 0:
        return absent(name, "reward model", f"{_OFF} ({setting} 0)")
    if quality is None:
        return Rule(
            name=name,
            family="reward model",
            measured="is unknown",
            required=f"the lower bound must exceed {least:g} ({setting})",
            passed=False,
        )
    return Rule(
        name=name,
        family="reward model",
        measured=f"{in_words(quality.accuracy)} over {quality.votes} votes",
        required=f"the lower bound must exceed {least:g} ({setting})",
        passed=quality.exceeds(least),
    )


def _worst_slice(least: float, card: ReportCard) -> Rule:
    name, setting = "accuracy in the worst slice", "promotion.min_reward_slice_accuracy"
    worst = card.worst_slice
    if least == 0:
        return absent(name, "reward model", f"{_OFF} ({setting} 0)")
    if worst is None:
        return absent(name, "reward model", "no slice of the votes has enough prompts")
    share = worst.accuracy.share
    # The worst of many is low by chance alone.
    high = _stretched(share, len(card.slices)).high
    return Rule(
        name=name,
        family="reward model",
        measured=f"{in_words(share)} where {worst.column} = {worst.value}",
        required=f"must not be shown to be below {least:g} ({setting})",
        passed=high >= least,
    )


def _reward_canary(most: float, card: ReportCard) -> Rule:
    name, setting = "worst canary of the reward model", "promotion.max_reward_canary_share"
    if most == 1:
        return absent(name, "reward model", f"{_OFF} ({setting} 1)")
    if card.worst_canary is None:
        return absent(name, "reward model", "no canary was measured")
    return _canary(name, "reward model", most, setting, card.canaries)


# --- the judge -----------------------------------------------------------------------------------


def judge(config: PromotionConfig, scorecard: Scorecard) -> list[Rule]:
    """Canaries, position consistency and missing verdicts of whoever compared the answers."""
    facts = scorecard.judge
    if facts is None:
        return [absent("judge", "judge", "nothing is known of it")]
    return [
        _judge_canary(config.max_judge_canary_share, facts),
        _consistency(config.min_judge_consistency, facts),
        _unanswered(config.max_unanswered, facts),
    ]


def _judge_canary(most: float, facts: JudgeFacts) -> Rule:
    name, setting = "worst canary of the judge", "promotion.max_judge_canary_share"
    if most == 1:
        return absent(name, "judge", f"{_OFF} ({setting} 1)")
    if not facts.canaries:
        return absent(name, "judge", "no canary was measured")
    return _canary(name, "judge", most, setting, facts.canaries)


def _consistency(least: float, facts: JudgeFacts) -> Rule:
    name, setting = "same verdict in both orders", "promotion.min_judge_consistency"
    if least == 0:
        return absent(name, "judge", f"{_OFF} ({setting} 0)")
    if facts.consistency is None:
        return absent(name, "judge", f"{facts.name} does not depend on the order")
    return Rule(
        name=name,
        family="judge",
        measured=f"{in_words(facts.consistency)} of {facts.pairs} pairs",
        required=f"the lower bound must exceed {least:g} ({setting})",
        passed=facts.consistency.low > least,
    )


def _unanswered(most: float, facts: JudgeFacts) -> Rule:
    share = facts.unanswered / facts.pairs if facts.pairs else 0.0
    return Rule(
        name="pairs without a verdict",
        family="judge",
        measured=f"{facts.unanswered} of {facts.pairs}",
        required=f"at most {most:.0%} (promotion.max_unanswered)",
        passed=share <= most,
    )


# --- rows ----------------------------------------------------------------------------------------


def _canary(
    name: str, family: str, most: float, setting: str, canaries: tuple[CanaryResult, ...]
) -> Rule:
    """No canary is shown to beat more than a share of the real answers, all kinds together."""
    stretched = [(_stretched(c.beats_real, len(canaries)).low, c) for c in canaries]
    low, worst = max(stretched, key=lambda pair: (pair[0], pair[1].beats_real.value))
    return Rule(
        name=name,
        family="judge" if family == "judge" else "reward model",
        measured=f"'{worst.kind}' beats {in_words(worst.beats_real)} of the real answers to "
        f"{worst.prompts} prompts",
        required=f"no kind of {len(canaries)} may be shown to beat more than {most:g} ({setting})",
        passed=low <= most,
    )


def _stretched(interval: Interval, tests: int) -> Interval:
    """A 95 % interval, made wider so that it holds for the worst of so many (Bonferroni)."""
    normal = NormalDist()
    factor = normal.inv_cdf(1 - 0.025 / max(tests, 1)) / normal.inv_cdf(0.975)
    value, low, high = interval
    return Interval(value, value - factor * (value - low), value + factor * (high - value))


def _kl(policy: Arm, most: float) -> Rule:
    if policy.kl is None:
        measured = "is unknown, because the tokenizers differ"
        return Rule(
            name="KL to SFT", measured=measured, required=f"at most {most:.2f}", passed=False
        )
    return _at_most("KL to SFT", policy.kl.value, most, "nats per sequence")


def _at_most(name: str, value: float, most: float, unit: str) -> Rule:
    measured = f"{value:.2f} {unit}"
    return Rule(name=name, measured=measured, required=f"at most {most:.2f}", passed=value <= most)


def _at_least(name: str, value: float, least: float) -> Rule:
    measured = f"{value:.3f}"
    return Rule(
        name=name, measured=measured, required=f"at least {least:.3f}", passed=value >= least
    )

"""Rules that decide whether a policy may become the champion. Each result is a sentence."""

from rlhf_core.evaluation.intervals import can_show
from rlhf_core.evaluation.scorecard import Arm, ArmName, Scorecard
from rlhf_core.promotion.config import PromotionConfig
from rlhf_core.promotion.decision import Decision, Rule


def decide(config: PromotionConfig, scorecard: Scorecard) -> Decision:
    """Decide whether to promote the policy of a scorecard: every rule has to pass.

    Raises: ValueError when the scorecard lacks the policy or SFT.
    """
    rules = apply_rules(config, scorecard)
    return Decision(
        promote=all(rule.passed for rule in rules),
        reasons=tuple(rule.sentence for rule in rules),
    )


def apply_rules(config: PromotionConfig, scorecard: Scorecard) -> list[Rule]:
    """Apply every rule, in the order in which they are shown.

    Raises: ValueError when the scorecard lacks the policy or SFT.
    """
    policy, sft = scorecard.arm("policy"), scorecard.arm("sft")
    if policy is None or sft is None:
        raise ValueError("a promotion needs a scorecard with the arms policy and sft")
    rules = [
        _win_rate(scorecard, "sft", config.min_win_rate),
        _kl(policy, config.max_kl),
        _at_most("length", policy.length, config.max_length_ratio * sft.length, "tokens"),
        _at_least("distinct-2", policy.distinct_2, config.min_distinct_ratio * sft.distinct_2),
    ]
    if scorecard.arm("champion") is not None:
        rules.append(_win_rate(scorecard, "champion", config.min_win_rate_over_champion))
    return [*rules, _prompts(scorecard, config.min_prompts)]


def _prompts(scorecard: Scorecard, least: int) -> Rule:
    fewest = min((match.prompts for match in scorecard.comparisons), default=0)
    return Rule(
        name="held-out prompts",
        measured=str(fewest),
        required=f"at least {least} (promotion.min_prompts)",
        passed=fewest >= least,
    )


def _win_rate(scorecard: Scorecard, opponent: ArmName, least: float) -> Rule:
    match = scorecard.comparison("policy", opponent)
    if match is None:
        raise ValueError(f"a promotion needs the comparison of policy and {opponent}")
    rate, enough = match.win_rate, can_show(match.prompts, least)
    why_not = "" if enough else ", which so few prompts cannot show"
    return Rule(
        name=f"win rate over {opponent}",
        measured=f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}] by {match.judge}, from "
        f"{match.basis}",
        required=f"the lower bound must exceed {least:g}{why_not}",
        passed=enough and rate.low > least,
    )


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

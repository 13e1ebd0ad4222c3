"""Whether a policy may become the champion: rules on a scorecard, each answered in a sentence."""

from pydantic import BaseModel, ConfigDict, Field

from rlhf_core.config import Section
from rlhf_core.stages.evaluation import Arm, ArmName, Scorecard


class PromotionConfig(Section):
    """What a policy has to show. A rule that fails keeps the present champion."""

    min_win_rate: float = Field(
        0.5, ge=0, le=1, description="The lower bound of the win rate over SFT has to exceed this"
    )
    min_win_rate_over_champion: float = Field(
        0.5,
        ge=0,
        le=1,
        description="The lower bound of the win rate over the present champion has to exceed this",
    )
    max_kl: float = Field(20.0, gt=0, description="Largest KL to SFT (nats per sequence)")
    max_length_ratio: float = Field(
        2.0, gt=0, description="Largest length of the answers, as a multiple of SFT's"
    )
    min_distinct_ratio: float = Field(
        0.1, ge=0, le=1, description="Smallest distinct-2 of the answers, as a multiple of SFT's"
    )


class Verdict(BaseModel):
    """The decision and its reasons, one sentence for each rule."""

    model_config = ConfigDict(frozen=True)

    promote: bool
    reasons: tuple[str, ...]

    def refuse(self, reason: str) -> "Verdict":
        """The verdict of one more rule, which failed."""
        return Verdict(promote=False, reasons=(*self.reasons, f"FAIL: {reason}"))


def judge(config: PromotionConfig, scorecard: Scorecard) -> Verdict:
    """Hold the policy of a scorecard against every rule; all have to pass.

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
    return Verdict(
        promote=all(passed for passed, _ in rules),
        reasons=tuple(f"{'pass' if passed else 'FAIL'}: {said}" for passed, said in rules),
    )


def _win_rate(scorecard: Scorecard, opponent: ArmName, least: float) -> tuple[bool, str]:
    match = scorecard.comparison("policy", opponent)
    if match is None:
        raise ValueError(f"a promotion needs the comparison of policy and {opponent}")
    rate = match.win_rate
    return (
        rate.low > least,
        f"win rate over {opponent} {rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}] by "
        f"{match.judge}; the lower bound has to exceed {least:g}",
    )


def _kl(policy: Arm, most: float) -> tuple[bool, str]:
    if policy.kl is None:
        return False, "the KL to SFT is unknown, because the tokenizers differ"
    return _at_most("KL to SFT", policy.kl.value, most, "nats per sequence")


def _at_most(name: str, value: float, most: float, unit: str) -> tuple[bool, str]:
    return value <= most, f"{name} {value:.2f} {unit}; at most {most:.2f}"


def _at_least(name: str, value: float, least: float) -> tuple[bool, str]:
    return value >= least, f"{name} {value:.3f}; at least {least:.3f}"

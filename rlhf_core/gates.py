"""Whether a policy may become the champion: rules on a scorecard, each answered in a sentence."""

from typing import Literal

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
    approval: Literal["automatic", "person"] = Field(
        "automatic",
        description="Who has the last word when every rule allows the promotion; a person is asked "
        "in Prefect, and the run waits for the answer without holding a worker",
    )
    approval_days: float = Field(
        7.0, gt=0, le=365, description="How long the run waits for the person before it fails"
    )


class Rule(BaseModel):
    """What one rule looks at, what was measured, what is asked, and whether that is met."""

    model_config = ConfigDict(frozen=True)

    name: str
    measured: str
    asked: str
    passed: bool

    @property
    def answer(self) -> str:
        """`pass` or `FAIL`."""
        return "pass" if self.passed else "FAIL"

    @property
    def sentence(self) -> str:
        """All of it in a line."""
        return f"{self.answer}: {self.name} {self.measured}; {self.asked}"


class Verdict(BaseModel):
    """The decision and its reasons, one sentence for each rule."""

    model_config = ConfigDict(frozen=True)

    promote: bool
    reasons: tuple[str, ...]

    def allow(self, reason: str) -> "Verdict":
        """The verdict of one more rule, which passed."""
        return Verdict(promote=self.promote, reasons=(*self.reasons, f"pass: {reason}"))

    def refuse(self, reason: str) -> "Verdict":
        """The verdict of one more rule, which failed."""
        return Verdict(promote=False, reasons=(*self.reasons, f"FAIL: {reason}"))


def judge(config: PromotionConfig, scorecard: Scorecard) -> Verdict:
    """Hold the policy of a scorecard against every rule; all have to pass.

    Raises: ValueError when the scorecard lacks the policy or SFT.
    """
    rules = apply_rules(config, scorecard)
    return Verdict(
        promote=all(rule.passed for rule in rules),
        reasons=tuple(rule.sentence for rule in rules),
    )


def apply_rules(config: PromotionConfig, scorecard: Scorecard) -> list[Rule]:
    """Every rule with its answer, in the order in which people read them.

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
    return rules


def _win_rate(scorecard: Scorecard, opponent: ArmName, least: float) -> Rule:
    match = scorecard.comparison("policy", opponent)
    if match is None:
        raise ValueError(f"a promotion needs the comparison of policy and {opponent}")
    rate = match.win_rate
    return Rule(
        name=f"win rate over {opponent}",
        measured=f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}] by {match.judge}",
        asked=f"the lower bound has to exceed {least:g}",
        passed=rate.low > least,
    )


def _kl(policy: Arm, most: float) -> Rule:
    if policy.kl is None:
        measured = "is unknown, because the tokenizers differ"
        return Rule(name="KL to SFT", measured=measured, asked=f"at most {most:.2f}", passed=False)
    return _at_most("KL to SFT", policy.kl.value, most, "nats per sequence")


def _at_most(name: str, value: float, most: float, unit: str) -> Rule:
    measured = f"{value:.2f} {unit}"
    return Rule(name=name, measured=measured, asked=f"at most {most:.2f}", passed=value <= most)


def _at_least(name: str, value: float, least: float) -> Rule:
    measured = f"{value:.3f}"
    return Rule(name=name, measured=measured, asked=f"at least {least:.3f}", passed=value >= least)

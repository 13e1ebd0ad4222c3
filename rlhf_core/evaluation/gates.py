"""Rules on what was measured, each answered in a sentence: whether a reward model is good enough to
train a policy on, and whether a policy may become the champion."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from rlhf_core.config import Section
from rlhf_core.errors import ModelError
from rlhf_core.evaluation.scorecard import Arm, ArmName, Scorecard
from rlhf_core.functional.ranking import Interval, win_rate

LONGER = '"prefer the longer"'


class RewardGateConfig(Section):
    """What a reward model has to show before a policy is trained on it.

    A section of its own: a setting of `reward_model` is part of what that training is, so a new
    threshold there would train the model again.
    """

    min_accuracy: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="The lower bound of the held-out accuracy has to exceed this, or the pipeline "
        "stops before the policy is trained; 0.5 asks for better than chance, 0 = off",
    )
    beat_longer: bool = Field(
        False,
        description="Stop there as well unless the held-out accuracy is above that of the rule "
        '"prefer the longer"',
    )


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


class RewardQuality(BaseModel):
    """How well a reward model predicts held-out votes."""

    model_config = ConfigDict(frozen=True)

    accuracy: Interval  # 95 % bounds
    longer_accuracy: float  # of the rule "prefer the longer"
    votes: int  # with a winner
    prompts: int | None  # that the votes are on; None = not known

    @property
    def numbers(self) -> str:
        """What was measured, and on how much."""
        value, low, high = self.accuracy
        over = "" if self.prompts is None else f" on {_count(self.prompts, 'prompt')}"
        return (
            f"held-out accuracy {value:.3f} [{low:.3f}, {high:.3f}] over "
            f"{_count(self.votes, 'vote')}{over}; the rule {LONGER} has {self.longer_accuracy:.3f}"
        )

    @property
    def doubts(self) -> str:
        """Why it may be worthless, in a sentence; empty if nothing says so."""
        found = []
        if self.accuracy.high < 0.5:
            found.append("is worse than chance")
        elif not self.exceeds(0.5):
            found.append(
                f"is no better than chance, as far as {_count(self.votes, 'vote')} can tell"
            )
        if self.longer_accuracy >= self.accuracy.value:
            found.append(f"does not beat the rule {LONGER}")
        return f"The reward model {', and it '.join(found)}." if found else ""

    def exceeds(self, least: float) -> bool:
        """Whether the votes show that its accuracy is above this."""
        enough = self.prompts is None or can_show(self.prompts, least)
        return enough and self.accuracy.low > least


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


def require_reward_model(
    config: RewardGateConfig, quality: RewardQuality | None, model: str
) -> None:
    """Refuse to train a policy on a reward model that has not shown what is asked for.

    Raises: ModelError with the numbers, the rules that they break, and the ways out.
    """
    broken = {}
    if config.min_accuracy and not (quality and quality.exceeds(config.min_accuracy)):
        asked = f"the lower bound of the accuracy has to exceed {config.min_accuracy:g}"
        broken["reward_gate.min_accuracy"] = asked
    if config.beat_longer and not (quality and quality.longer_accuracy < quality.accuracy.value):
        broken["reward_gate.beat_longer"] = f"the accuracy has to be above that of {LONGER}"
    if not broken:
        return
    measured = "held-out accuracy not known" if quality is None else quality.numbers
    rules = ", and ".join(f"{asked} ({setting})" for setting, asked in broken.items())
    raise ModelError(
        f"no policy is trained on the reward model {model}: {measured}, but {rules}. It stays "
        "registered. Get more or better preferences, train it with other settings, or change "
        f"{' and '.join(broken)}"
    )


def can_show(prompts: int, least: float) -> bool:
    """Whether so many prompts could show a share above `least`, were every one of them won.

    By Wilson's interval, as the bootstrap of one prompt is a point, whatever the answer to it.
    """
    return win_rate(prompts, 0, 0).low > least


def decide(config: PromotionConfig, scorecard: Scorecard) -> Verdict:
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
    rate, enough = match.win_rate, can_show(match.prompts, least)
    why_not = "" if enough else ", which so few prompts cannot show"
    return Rule(
        name=f"win rate over {opponent}",
        measured=f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}] by {match.judge}, from "
        f"{match.basis}",
        asked=f"the lower bound has to exceed {least:g}{why_not}",
        passed=enough and rate.low > least,
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


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

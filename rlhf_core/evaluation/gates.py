"""Rules that decide whether a reward model is good enough to train a policy on, and whether a
policy may become the champion. Each result is a sentence."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from rlhf_core.config import Section
from rlhf_core.errors import ModelError
from rlhf_core.evaluation.scorecard import Arm, ArmName, Scorecard
from rlhf_core.functional.ranking import Interval, win_rate
from rlhf_core.rewards.canaries import CanaryResult

LONGER = '"prefer the longer"'


class RewardGateConfig(Section):
    """Requirements on a reward model before a policy is trained on it.

    This is a separate section because the settings of `reward_model` identify that training: a new
    threshold there would retrain the model.
    """

    min_accuracy: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="The lower bound of the held-out accuracy must exceed this, or the pipeline "
        "stops before policy training; 0.5 requires better than chance, 0 = off",
    )
    beat_longer: bool = Field(
        False,
        description="Also stop unless the held-out accuracy is above that of the rule "
        '"prefer the longer"',
    )
    max_canary_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Also stop unless the upper bound of the share of real answers that a canary "
        "beats is at most this, for every canary of the report card; 1 = off",
    )


class PromotionConfig(Section):
    """Requirements on a policy. If a rule fails, the current champion stays."""

    min_win_rate: float = Field(
        0.5, ge=0, le=1, description="The lower bound of the win rate over SFT must exceed this"
    )
    min_win_rate_over_champion: float = Field(
        0.5,
        ge=0,
        le=1,
        description="The lower bound of the win rate over the current champion must exceed this",
    )
    min_prompts: int = Field(
        5,
        ge=1,
        description="Fewest held-out prompts that a promotion may rest on; fewer say little about "
        "others, however they turn out",
    )
    max_kl: float = Field(20.0, gt=0, description="Largest KL to SFT (nats per sequence)")
    max_length_ratio: float = Field(
        2.0, gt=0, description="Largest mean length of the answers, as a multiple of SFT's"
    )
    min_distinct_ratio: float = Field(
        0.1, ge=0, le=1, description="Smallest distinct-2 of the answers, as a multiple of SFT's"
    )
    approval: Literal["automatic", "person"] = Field(
        "automatic",
        description="Who decides when every rule allows the promotion; with `person` the run waits "
        "for an approval in Prefect without holding a worker",
    )
    approval_days: float = Field(
        7.0,
        gt=0,
        le=365,
        description="How long the run waits for the approval before it fails (days)",
    )


class RewardQuality(BaseModel):
    """How well a reward model predicts held-out votes."""

    model_config = ConfigDict(frozen=True)

    accuracy: Interval  # 95 % bounds
    longer_accuracy: float  # of the rule "prefer the longer"
    votes: int  # with a winner
    prompts: int | None  # of the votes; None = unknown

    @property
    def numbers(self) -> str:
        """The measured accuracies, and the number of votes and prompts."""
        value, low, high = self.accuracy
        over = "" if self.prompts is None else f" on {_count(self.prompts, 'prompt')}"
        return (
            f"held-out accuracy {value:.3f} [{low:.3f}, {high:.3f}] over "
            f"{_count(self.votes, 'vote')}{over}; the rule {LONGER} has {self.longer_accuracy:.3f}"
        )

    @property
    def doubts(self) -> str:
        """Why it may be worthless, in a sentence; empty if there is no reason."""
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
        """Whether the votes show an accuracy above `least`."""
        enough = self.prompts is None or can_show(self.prompts, least)
        return enough and self.accuracy.low > least


class Rule(BaseModel):
    """A rule: its name, the measured value, the requirement, and whether it is met."""

    model_config = ConfigDict(frozen=True)

    name: str
    measured: str
    required: str
    passed: bool

    @property
    def answer(self) -> str:
        """`pass` or `FAIL`."""
        return "pass" if self.passed else "FAIL"

    @property
    def sentence(self) -> str:
        """The rule and its result in one line."""
        return f"{self.answer}: {self.name} {self.measured}; {self.required}"


class Verdict(BaseModel):
    """The decision about promotion, and one sentence for each rule."""

    model_config = ConfigDict(frozen=True)

    promote: bool
    reasons: tuple[str, ...]

    def allow(self, reason: str) -> "Verdict":
        """The verdict with one more rule, which passed."""
        return Verdict(promote=self.promote, reasons=(*self.reasons, f"pass: {reason}"))

    def refuse(self, reason: str) -> "Verdict":
        """The verdict with one more rule, which failed."""
        return Verdict(promote=False, reasons=(*self.reasons, f"FAIL: {reason}"))


def require_reward_model(
    config: RewardGateConfig,
    quality: RewardQuality | None,
    model: str,
    canaries: Sequence[CanaryResult] = (),
) -> None:
    """Refuse to train a policy on a reward model that does not meet the requirements.

    A requirement has to be shown: what is unknown, or too uncertain, does not meet it.

    Raises: ModelError with the numbers, the broken rules, and how to fix it.
    """
    broken, measured = {}, "the held-out accuracy is unknown"
    if quality is not None:
        measured = quality.numbers
    if config.min_accuracy and not (quality and quality.exceeds(config.min_accuracy)):
        rule = f"the lower bound of the accuracy must exceed {config.min_accuracy:g}"
        broken["reward_gate.min_accuracy"] = rule
    if config.beat_longer and not (quality and quality.longer_accuracy < quality.accuracy.value):
        broken["reward_gate.beat_longer"] = f"the accuracy must be above that of {LONGER}"
    if config.max_canary_share < 1:
        most = config.max_canary_share
        worst = max(canaries, key=lambda canary: canary.beats_real.high, default=None)
        if worst is None or worst.beats_real.high > most:
            rule = f"the upper bound of the share that a canary beats must be at most {most:g}"
            broken["reward_gate.max_canary_share"] = rule
            measured += "; no canary was measured" if worst is None else f"; {_beats(worst)}"
    if not broken:
        return
    rules = ", and ".join(f"{rule} ({setting})" for setting, rule in broken.items())
    raise ModelError(
        f"no policy is trained on the reward model {model}: {measured}, but {rules}. It stays "
        "registered. Collect more or better preferences, train it with other settings, or change "
        f"{' and '.join(broken)}"
    )


def _beats(canary: CanaryResult) -> str:
    value, low, high = canary.beats_real
    return (
        f"the canary '{canary.kind}' beats the real answer on {value:.3f} [{low:.3f}, {high:.3f}] "
        f"of {_count(canary.prompts, 'prompt')}"
    )


def can_show(prompts: int, least: float) -> bool:
    """Whether this many prompts, if all are won, show a share above `least`.

    It uses Wilson's interval, which a win rate is never narrower than.
    """
    return prompts > 0 and win_rate(prompts, 0, 0).low > least


def decide(config: PromotionConfig, scorecard: Scorecard) -> Verdict:
    """Decide whether to promote the policy of a scorecard: every rule has to pass.

    Raises: ValueError when the scorecard lacks the policy or SFT.
    """
    rules = apply_rules(config, scorecard)
    return Verdict(
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


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

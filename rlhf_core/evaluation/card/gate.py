"""Rules that decide whether a reward model is good enough to train a policy on."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from rlhf_core.errors import RefusedError
from rlhf_core.evaluation.intervals import can_show
from rlhf_core.functional.interval import Interval
from rlhf_core.rewards.canaries import CanaryResult
from rlhf_core.settings.evaluation import RewardGateConfig

LONGER = '"prefer the longer"'


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


def require_reward_model(
    config: RewardGateConfig,
    quality: RewardQuality | None,
    model: str,
    canaries: Sequence[CanaryResult] = (),
) -> None:
    """Refuse to train a policy on a reward model that does not meet the requirements.

    A requirement has to be shown: what is unknown, or too uncertain, does not meet it.

    Raises: RefusedError with the numbers, the broken rules, and how to fix it.
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
    raise RefusedError(
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


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

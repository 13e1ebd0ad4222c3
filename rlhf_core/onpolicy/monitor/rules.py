"""The rules of the monitor: which measure is beyond its limit, since when, and what that may mean.

A rule has no state. How long its measure has been beyond the limit is read from the history, which
is in the checkpoint, so that a resumed run decides the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rlhf_core.metrics import Alarm
from rlhf_core.settings.monitor import MonitorAction, MonitorConfig

PREFIX: Final = "monitor/"
ACTION: Final = f"{PREFIX}action"
AGAIN: Final = 5  # measurements, after which a measure that stayed beyond its limit trips again
SEVERITY: Final[Mapping[MonitorAction | None, int]] = {
    None: 0,
    "warn": 1,
    "halve_learning_rate": 2,
    "roll_back": 3,
    "stop": 4,
}

Direction = Literal["above", "below"]

_READ = "read the samples beside those of the SFT policy"


@dataclass(frozen=True)
class Rule:
    """A measure, the side of its limit that is bad, and what to tell a person."""

    measure: str
    setting: str  # its limit in the config
    direction: Direction
    what: str  # the measure with {value} in it
    meaning: str
    advice: str
    logged: str = ""  # what is compared, if it has another name than the measure

    @property
    def metric(self) -> str:
        """The name under which it is logged."""
        return PREFIX + (self.logged or self.measure)

    def limit(self, config: MonitorConfig) -> float:
        """The limit; 0 for none."""
        found: float = getattr(config, self.setting)
        return found

    def beyond(self, metrics: Mapping[str, float], config: MonitorConfig) -> bool:
        """Whether the measure is beyond its limit; NaN and a measure that is missing are not."""
        value, limit = metrics.get(self.metric), self.limit(config)
        if value is None or limit == 0:
            return False
        if self.direction == "below":
            return value < limit
        return value > limit

    def trips(
        self,
        metrics: Mapping[str, float],
        history: Sequence[Mapping[str, float]],
        config: MonitorConfig,
    ) -> bool:
        """Whether it trips now: at the `confirm`-th measurement in a row beyond the limit, and at
        every `AGAIN`-th after it. A roll-back ends the row, and an iteration that was not measured
        trips nothing."""
        if self.metric not in metrics:
            return False
        row = 0
        for past in (metrics, *reversed(since_roll_back(history))):
            if self.metric not in past:
                continue
            if not self.beyond(past, config):
                break
            row += 1
        late = row - config.confirm
        return late >= 0 and late % AGAIN == 0

    def alarm(self, metrics: Mapping[str, float], number: int, config: MonitorConfig) -> Alarm:
        """What to tell."""
        value, limit, action = (
            metrics[self.metric],
            self.limit(config),
            config.action(self.measure),
        )
        sentence = (
            f"{self.what.format(value=f'{value:.3g}')} (limit {limit:g}): {self.meaning}; "
            f"{self.advice}"
        )
        return Alarm(self.measure, number, value, limit, action, sentence)


RULES: Final = (
    Rule(
        "kl",
        "max_kl",
        "above",
        "the policy is {value} nats per sequence from its reference",
        "the reward model has seen few texts like these, so its scores mean less and less",
        "raise kl_coef, lower kl_target, or keep an earlier milestone",
    ),
    Rule(
        "kl_acceleration",
        "max_kl_acceleration",
        "above",
        "the KL accelerates by {value} nats per iteration²",
        "the policy runs away from its reference, as it does when it has found a hole in the "
        "reward, or when the learning rate is too high",
        f"{_READ}, and lower learning_rate or raise kl_coef",
    ),
    Rule(
        "negative_kl",
        "max_negative_kl",
        "above",
        "the estimate of the KL is {value} standard errors below 0",
        "a KL is never negative, so the responses do not come from the policy that is scored: "
        "sampling may have another temperature, dropout, or older weights",
        "report it with the config, and compare the sampler with the one of this package",
    ),
    Rule(
        "gap",
        "max_gap",
        "above",
        "the reward has gained {value} standard deviations more than the held-out reward model",
        "the policy may have learnt what only this reward likes, and not what the votes say",
        f"{_READ}, keep a milestone from before, and raise kl_coef or train the reward model on "
        "more votes",
    ),
    Rule(
        "agreement_drop",
        "max_agreement_drop",
        "above",
        "reward and held-out reward model rank the responses differently: with them their "
        "correlation is {value} lower than on SFT samples alone",
        "the responses are where the reward was never taught, or the policy exploits it",
        f"{_READ}, and collect votes on responses like these",
    ),
    Rule(
        "spread",
        "max_spread",
        "above",
        "the members of the reward model are {value} times as far apart as on SFT samples",
        "the responses are unlike those that the members were trained on, so they guess",
        "combine the members by their minimum, or collect votes on responses like these",
    ),
    Rule(
        "length",
        "max_length",
        "above",
        "responses are {value} times as long as those of the SFT policy",
        "the reward may pay for length, whatever is said",
        f"{_READ}, look at the reward model's accuracy where the shorter answer won, and set "
        "shaping.length_penalty",
    ),
    Rule(
        "brevity",
        "min_length",
        "below",
        "responses are {value} times as long as those of the SFT policy",
        "the reward may pay for saying little",
        f"{_READ}, and raise kl_coef",
        logged="length",
    ),
    Rule(
        "repetition",
        "max_repetition",
        "above",
        "the share of repeated trigrams in a response has grown by {value}",
        "the policy says the same again and again, which the reward does not notice or even likes",
        f"{_READ}, and raise kl_coef",
    ),
    Rule(
        "distinct",
        "min_distinct",
        "below",
        "the responses have {value} times as many distinct bigrams as those of the SFT policy",
        "the policy gives one answer to every prompt",
        f"{_READ}, and raise kl_coef or sampling.temperature",
    ),
    Rule(
        "entropy",
        "min_entropy",
        "below",
        "the entropy of a token is {value} times that of the SFT policy",
        "the policy has become sure of single phrases, and no longer explores",
        "lower learning_rate, raise kl_coef, or end the run earlier",
    ),
    Rule(
        "finished",
        "min_finished",
        "below",
        "responses end {value} times as often as those of the SFT policy",
        "the policy writes on until it is cut off, which the reward may pay for",
        "raise missing_eos_value or sampling.max_new_tokens",
    ),
    Rule(
        "distance",
        "max_distance",
        "above",
        "the reward model's last hidden state is {value} times as far from SFT samples as these "
        "are among themselves",
        "the responses may be unlike all that the reward model knows (this measure is a heuristic)",
        f"{_READ}, and do not trust the score alone",
    ),
)


def since_roll_back(
    history: Sequence[Mapping[str, float]],
) -> Sequence[Mapping[str, float]]:
    """The metrics of the iterations after the last roll-back."""
    for index in range(len(history), 0, -1):
        if history[index - 1].get(ACTION) == SEVERITY["roll_back"]:
            return history[index:]
    return history


def roll_backs(history: Sequence[Mapping[str, float]]) -> int:
    """How often the run was rolled back."""
    return sum(metrics.get(ACTION) == SEVERITY["roll_back"] for metrics in history)


def halvings(history: Sequence[Mapping[str, float]]) -> int:
    """How often the learning rate was halved, by a roll-back too."""
    lower = SEVERITY["halve_learning_rate"], SEVERITY["roll_back"]
    return sum(metrics.get(ACTION) in lower for metrics in history)

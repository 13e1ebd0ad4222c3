"""The numbers that decide about promotion: arms, and comparisons of arms."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from rlhf_core.functional.ranking import Interval

ArmName = Literal["sft", "policy", "best_of_n", "champion"]
ARMS: tuple[ArmName, ...] = ("sft", "policy", "best_of_n", "champion")


class Arm(BaseModel):
    """The results of one arm on the held-out prompts."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    name: ArmName
    proxy_reward: Interval  # normalised reward-model score
    true_reward: Interval | None
    kl: Interval | None  # to the SFT policy, nats per sequence; None if the tokenizers differ
    perplexity: float  # of its texts under the SFT policy: a measure of fluency; may be infinite
    length: float  # tokens
    distinct_1: float  # share of distinct word n-grams, over one answer to each prompt
    distinct_2: float


class Comparison(BaseModel):
    """Two arms compared answer by answer on the same prompts."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    candidate: ArmName
    opponent: ArmName
    judge: Literal["true_reward", "reward_model"]
    wins: int
    ties: int
    losses: int
    prompts: int  # answered
    win_rate: Interval  # a tie is half a win

    @property
    def basis(self) -> str:
        """The number of answers and prompts, e.g. `4 answers to each of 91 held-out prompts`."""
        answers = (self.wins + self.ties + self.losses) // self.prompts
        each = (
            "1 held-out prompt" if self.prompts == 1 else f"each of {self.prompts} held-out prompts"
        )
        return f"{answers} answer{'s' if answers > 1 else ''} to {each}"


class Scorecard(BaseModel):
    """The numbers that decide about promotion."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]

    def arm(self, name: ArmName) -> Arm | None:
        """The arm of that name, if it was evaluated."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def comparison(self, candidate: ArmName, opponent: ArmName) -> Comparison | None:
        """The comparison of two arms, if there was one."""
        found = (c for c in self.comparisons if (c.candidate, c.opponent) == (candidate, opponent))
        return next(found, None)

"""The numbers that decide about promotion: arms, and comparisons of arms."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from rlhf_core.functional.interval import Interval
from rlhf_core.rewards.canaries import CanaryResult

ArmName = Literal["base", "sft", "policy", "best_of_n", "champion"]
ARMS: tuple[ArmName, ...] = ("base", "sft", "policy", "best_of_n", "champion")


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
    # share of the answers that look like a kind of canary, by kind
    signs: dict[str, Interval] = {}


class Comparison(BaseModel):
    """Two arms compared answer by answer on the same prompts."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    candidate: ArmName
    opponent: ArmName
    judge: str  # true_reward, reward_model, or the name of another judge
    wins: int
    ties: int
    losses: int
    prompts: int  # answered
    win_rate: Interval  # a tie is half a win
    # of each prompt: the mean of its verdicts; None where the judge gave none
    points: tuple[float | None, ...] = ()
    unanswered: int = 0  # pairs without a verdict, which count nowhere above
    length_controlled: Interval | None = None  # the win rate at equal length

    @property
    def basis(self) -> str:
        """The number of answers and prompts, e.g. `4 answers to each of 91 held-out prompts`."""
        answers = -(-(self.wins + self.ties + self.losses) // self.prompts)
        each = (
            "1 held-out prompt" if self.prompts == 1 else f"each of {self.prompts} held-out prompts"
        )
        return f"{answers} answer{'s' if answers > 1 else ''} to {each}"


class PromptSlice(BaseModel):
    """The evaluation prompts with one value in a column that `data.prompts.keep` names."""

    model_config = ConfigDict(frozen=True)

    column: str
    value: str
    prompts: tuple[int, ...]  # positions in `Comparison.points`

    @property
    def name(self) -> str:
        """`column = value`."""
        return f"{self.column} = {self.value}"


class PairedDifference(BaseModel):
    """By how much two arms differ in their win rates over a third, prompt by prompt."""

    model_config = ConfigDict(frozen=True)

    first: ArmName
    second: ArmName
    opponent: ArmName
    difference: Interval  # win rate of the first minus that of the second, -1 to 1


class JudgeFacts(BaseModel):
    """How far the judge of an evaluation can be trusted, and what it cost."""

    model_config = ConfigDict(frozen=True)

    name: str
    pairs: int  # compared, without those of the canaries
    unanswered: int  # after all retries
    consistency: Interval | None  # share of pairs with the same verdict in both orders
    canaries: tuple[CanaryResult, ...]
    agreement: Interval | None = None  # share of pairs on which several people all said the same
    requests: int = 0  # to an endpoint, this time: what was remembered asks nothing
    remembered: int = 0  # verdicts
    tokens: int = 0  # of these requests, prompts and replies
    seconds: float = 0.0  # spent waiting for them, added up

    @property
    def worst_canary(self) -> CanaryResult | None:
        """The canary that beats real answers most often."""
        return max(self.canaries, key=lambda canary: canary.beats_real.value, default=None)


class Diagnosis(BaseModel):
    """Which step of the pipeline does not improve on the one before it."""

    model_config = ConfigDict(frozen=True)

    fault: Literal["none", "demonstrations", "reward_model", "policy_training", "unknown"]
    says: str  # sentences for people, with the win rates


class PromptLeaks(BaseModel):
    """How many of the evaluation prompts are in the training data too."""

    model_config = ConfigDict(frozen=True)

    prompts: int  # distinct, of the evaluation
    equal: int
    near: int  # nearly the same as one of training, and not equal
    compared: int  # training prompts that were searched for nearly equal ones
    of: int  # training prompts


class Scorecard(BaseModel):
    """The numbers that decide about promotion."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    slices: tuple[PromptSlice, ...] = ()
    differences: tuple[PairedDifference, ...] = ()
    judge: JudgeFacts | None = None
    diagnosis: Diagnosis | None = None
    leaks: PromptLeaks | None = None

    def arm(self, name: ArmName) -> Arm | None:
        """The arm of that name, if it was evaluated."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def comparison(self, candidate: ArmName, opponent: ArmName) -> Comparison | None:
        """The comparison of two arms, if there was one."""
        found = (c for c in self.comparisons if (c.candidate, c.opponent) == (candidate, opponent))
        return next(found, None)

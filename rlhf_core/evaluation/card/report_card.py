"""The result of examining a reward model: what the gate, the page and later stages read."""

from pydantic import BaseModel, ConfigDict

from rlhf_core.evaluation.card.gate import RewardQuality
from rlhf_core.evaluation.intervals import Estimate
from rlhf_core.evaluation.leaks import Leaks
from rlhf_core.functional.interval import Interval
from rlhf_core.rewards.canaries import CanaryResult


class Share(BaseModel):
    """The share of some votes, with 95 % bounds over their prompts."""

    model_config = ConfigDict(frozen=True)

    share: Interval
    votes: int
    prompts: int

    def __str__(self) -> str:
        value, low, high = self.share
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"


class Agreement(BaseModel):
    """How well people predict each other, on the pairs that several of them voted on.

    No predictor that has not seen the votes exceeds `limit` in the long run.
    """

    model_config = ConfigDict(frozen=True)

    pairwise: Share  # another annotator's vote on the pair is the same
    majority: Share  # the majority of the other votes on the pair is the same; a tie is half
    limit: float  # (1 + √(2a - 1)) / 2, of the upper bound a of the pairwise agreement
    accuracy: Share  # of the reward model, on these votes

    @property
    def alarm(self) -> bool:
        """Whether the reward model is better on these votes than it can be without a leak."""
        return self.accuracy.share.low > self.limit


class Bin(BaseModel):
    """A dot of the reliability curve; each vote counts in both orders."""

    model_config = ConfigDict(frozen=True)

    predicted: float
    observed: Interval
    votes: int


class Slice(BaseModel):
    """The accuracy on the votes with one value in a column."""

    model_config = ConfigDict(frozen=True)

    column: str
    value: str
    accuracy: Share
    worse: bool  # than the whole, with bounds for as many slices as are judged


class SmallSlices(BaseModel):
    """The values of a column that have too few prompts to be judged."""

    model_config = ConfigDict(frozen=True)

    column: str
    values: int
    votes: int
    named: tuple[str, ...]  # the first of them


class Members(BaseModel):
    """The members of an ensemble, one by one and together."""

    model_config = ConfigDict(frozen=True)

    accuracies: tuple[Share, ...]
    disagreement: Share  # votes on whose winner the members do not all agree


class ReportCard(BaseModel):
    """How far a reward model can be trusted. What is None could not be measured."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    votes: int  # held out, with a winner
    ties: int
    prompts: int  # of the votes with a winner
    same_after_cut: int  # votes left out, since both texts are the same tokens
    not_sampled: int  # votes left out, since there are more than report_card.votes
    min_slice_prompts: int
    accuracy: Share | None
    longer: Share | None  # of the rule "prefer the longer"
    first_shown: Share | None  # of the rule "prefer the answer shown first"
    log_loss: Estimate | None  # nats a vote, ties included
    calibration_error: Estimate | None
    calibration_noise: float | None  # below which a calibrated model stays 95 % of the time
    confidence: float | None  # mean probability that it gives to the answer it prefers
    bins: tuple[Bin, ...]
    agreement: Agreement | None
    shorter_won: Share | None  # accuracy where the shorter answer won
    longer_won: Share | None
    slices: tuple[Slice, ...]
    small_slices: tuple[SmallSlices, ...]
    length_correlation: Estimate | None  # Spearman, on samples of the SFT policy
    samples: int
    leaks: Leaks | None
    elsewhere: Share | None  # accuracy on the votes that training has not seen
    canaries: tuple[CanaryResult, ...]
    canaries_against: str  # the answers that the canaries were compared with
    members: Members | None  # of an ensemble

    @property
    def quality(self) -> RewardQuality | None:
        """How well it predicts votes; None if that is unknown."""
        if self.accuracy is None or self.longer is None:
            return None
        return RewardQuality(
            accuracy=self.accuracy.share,
            longer_accuracy=self.longer.share.value,
            votes=self.votes,
            prompts=self.prompts,
        )

    @property
    def worst_slice(self) -> Slice | None:
        """The judged slice with the lowest accuracy."""
        return min(self.slices, key=lambda part: part.accuracy.share.value, default=None)

    @property
    def worst_slice_gap(self) -> float | None:
        """By how much the accuracy of the worst slice is below that of all votes."""
        if self.worst_slice is None or self.accuracy is None:
            return None
        return self.accuracy.share.value - self.worst_slice.accuracy.share.value

    @property
    def worst_canary(self) -> CanaryResult | None:
        """The canary that beats real answers most often."""
        return max(self.canaries, key=lambda canary: canary.beats_real.value, default=None)

    def numbers(self) -> dict[str, float]:
        """The key numbers by name, each interval as three; what is unknown is left out."""
        shares = {
            "accuracy": self.accuracy,
            "longer_accuracy": self.longer,
            "first_shown_accuracy": self.first_shown,
            "shorter_won_accuracy": self.shorter_won,
            "longer_won_accuracy": self.longer_won,
            "unseen_accuracy": self.elsewhere,
            "agreement": self.agreement and self.agreement.pairwise,
            "ceiling": self.agreement and self.agreement.majority,
            "disagreement": self.members and self.members.disagreement,
            "worst_slice_accuracy": self.worst_slice and self.worst_slice.accuracy,
        }
        found: dict[str, float | None] = {
            "votes": self.votes,
            "ties": self.ties,
            "prompts": self.prompts,
            "judged_slices": len(self.slices),
            "small_slices": sum(small.values for small in self.small_slices),
            "calibration_noise": self.calibration_noise,
            "ceiling_limit": self.agreement.limit if self.agreement else None,
            "worst_slice_gap": self.worst_slice_gap,
            "leaked_votes": self.leaks.votes if self.leaks else None,
        }
        intervals = {name: known.share for name, known in shares.items() if known}
        if self.worst_canary is not None:
            intervals["worst_canary"] = self.worst_canary.beats_real
        intervals |= {f"canary/{canary.kind}": canary.beats_real for canary in self.canaries}
        for name, (value, low, high) in intervals.items():
            found |= {name: value, f"{name}_low": low, f"{name}_high": high}
        for name, estimate in (
            ("log_loss", self.log_loss),
            ("calibration_error", self.calibration_error),
            ("length_correlation", self.length_correlation),
        ):
            if estimate is not None:
                found |= {name: estimate.value}
                found |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return {name: float(value) for name, value in found.items() if value is not None}

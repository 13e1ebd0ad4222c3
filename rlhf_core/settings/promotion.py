"""What a policy must reach before it becomes the champion."""

from typing import Literal

from pydantic import Field

from rlhf_core.config import Section


class PromotionConfig(Section):
    """Requirements on a policy. If a rule fails, the current champion stays."""

    claim: Literal["superior", "non_inferior"] = Field(
        "superior",
        description="What a promotion says of the policy's win rates: above the required ones, or "
        "above them less `margin`",
    )
    margin: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="How far below the required win rate a policy may be that is non_inferior",
    )
    min_win_rate: float = Field(
        0.5, ge=0, le=1, description="The win rate over SFT must be shown to exceed this"
    )
    min_win_rate_over_champion: float = Field(
        0.5,
        ge=0,
        le=1,
        description="The win rate over the current champion must be shown to exceed this",
    )
    alpha: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="Chance of a false promotion, over all looks at one champion together; the "
        "k-th look may spend alpha / (k * (k + 1)) of it",
    )
    min_prompts: int = Field(
        5,
        ge=1,
        description="Fewest held-out prompts that a promotion may rest on; fewer say little about "
        "others, however they turn out",
    )
    max_equal_prompts: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Largest share of the evaluation prompts that the training data have too",
    )
    max_near_prompts: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Largest share of the evaluation prompts that nearly equal one of training; "
        "raise it for prompts that are made from one template",
    )
    protected: tuple[str, ...] = Field(
        (),
        description="Columns of the prompts, from data.prompts.keep: with none of their values may "
        "the policy be worse than the champion, or than SFT while there is no champion",
    )
    slice_margin: float = Field(
        0.1,
        gt=0,
        lt=0.5,
        description="How far below 0.5 the win rate in a protected slice may be",
    )
    small_slices: Literal["fail", "skip"] = Field(
        "fail",
        description="What happens with a protected slice of so few prompts that nothing can be "
        "shown in it: it refuses, or it is named and left out",
    )
    max_sign_excess: float = Field(
        0.2,
        gt=0,
        le=1,
        description="By how much more of the policy's answers than of SFT's may show the sign of a "
        "kind of canary; 1 = off",
    )
    max_kl: float = Field(20.0, gt=0, description="Largest KL to SFT (nats per sequence)")
    max_length_ratio: float = Field(
        2.0, gt=0, description="Largest mean length of the answers, as a multiple of SFT's"
    )
    min_distinct_ratio: float = Field(
        0.1, ge=0, le=1, description="Smallest distinct-2 of the answers, as a multiple of SFT's"
    )
    at_alarm: Literal["refuse", "show"] = Field(
        "refuse", description="What happens if the monitor gave an alarm in the training"
    )
    min_reward_accuracy: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="The lower bound of the reward model's held-out accuracy must exceed this; "
        "0 = off",
    )
    min_reward_slice_accuracy: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="In no slice of the report card may the reward model be shown to have a lower "
        "accuracy; 0 = off",
    )
    max_reward_canary_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="No canary may be shown to beat more of the real answers under the reward "
        "model; 1 = off",
    )
    max_judge_canary_share: float = Field(
        0.6,
        ge=0,
        le=1,
        description="No canary may be shown to beat more of the real answers under the judge; "
        "1 = off",
    )
    min_judge_consistency: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="The share of pairs of which the judge says the same in both orders must be "
        "shown to exceed this; 0 = off",
    )
    max_unanswered: float = Field(
        0.1, ge=0, le=1, description="Largest share of the pairs without a verdict"
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

    def asked(self, opponent: Literal["sft", "champion"]) -> float:
        """The win rate over an opponent that has to be exceeded, less the margin of the claim."""
        rate = self.min_win_rate if opponent == "sft" else self.min_win_rate_over_champion
        return rate if self.claim == "superior" else max(rate - self.margin, 0.0)

"""What a policy must reach before it becomes the champion."""

from typing import Literal

from pydantic import Field

from rlhf_core.config import Section


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

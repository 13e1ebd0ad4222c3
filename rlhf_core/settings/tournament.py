"""The settings of a tournament of checkpoints."""

from math import comb
from typing import Self

from pydantic import Field, model_validator

from rlhf_core.settings.model import Precision
from rlhf_core.settings.rewards import MemberSection

MILESTONE = "milestone."  # begins the role of one among the inputs, followed by its iteration
VERDICTS_A_PAIR = 20  # at least, so that half of them are on ten prompts


class TournamentConfig(MemberSection):
    """Settings of the tournament of checkpoints."""

    checkpoints: int = Field(
        0,
        ge=0,
        le=50,
        description="Policies along the training that meet each other and SFT, the last one "
        "included; 5 to 8 are usual; 0 = no tournament",
    )
    prompts: int = Field(
        64,
        ge=10,
        le=1_000_000,
        description="Training prompts that they answer, drawn by the seed; the held-out ones stay "
        "untouched for the evaluation",
    )
    samples_per_prompt: int = Field(
        2, ge=1, le=10_000, description="Answers of each policy to each prompt"
    )
    verdicts: int = Field(
        2000,
        ge=1,
        le=100_000_000,
        description="Most verdicts of the judge; at least 20 for each pair of SFT and checkpoints",
    )
    true_reward: str = Field(
        "",
        description="Import path module:function of the known truth; empty = that of the "
        "evaluation, if there is one",
    )
    precision: Precision = Field(
        "float32",
        description="Type of matrix products in every policy and in the reward model; auto takes "
        "bfloat16 where the machine has it",
    )

    @property
    def on(self) -> bool:
        """Whether there is a tournament."""
        return self.checkpoints > 0

    @model_validator(mode="after")
    def _two_checkpoints(self) -> Self:
        if self.checkpoints == 1:
            raise ValueError(
                "checkpoints is 1, which is the last policy alone; set it to 5 to 8, or to 0 for "
                "no tournament"
            )
        return self

    @model_validator(mode="after")
    def _enough_verdicts(self) -> Self:
        pairs = comb(self.checkpoints + 1, 2)
        if self.on and self.verdicts < (least := VERDICTS_A_PAIR * pairs):
            raise ValueError(
                f"verdicts {self.verdicts} is less than {VERDICTS_A_PAIR} for each of the {pairs} "
                f"pairs of {self.checkpoints} checkpoints and SFT; raise it to {least}, or lower "
                "checkpoints"
            )
        return self

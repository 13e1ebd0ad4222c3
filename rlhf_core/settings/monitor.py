"""Settings of the monitor: what it looks at, the limit of each measure, and what happens there."""

from typing import Final, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from rlhf_core.config import Section

TRAIN: Final = "train"
HELD_OUT: Final = "held_out"  # the role of the held-out reward model among the inputs of a stage

MonitorAction: TypeAlias = Literal["warn", "halve_learning_rate", "roll_back", "stop"]


class MonitorConfig(Section):
    """The monitor: samples on fixed held-out prompts, compared with those of the SFT policy."""

    prompts: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Held-out prompts that the policy answers for the monitor; 0 = no monitor",
    )
    held_out: str = Field(
        "",
        pattern=rf"^({TRAIN}|models:/[A-Za-z0-9][A-Za-z0-9._-]*(/[1-9]\d*|@[A-Za-z0-9_-]+))?$",
        description="The held-out reward model: models:/NAME/VERSION or models:/NAME@ALIAS; train "
        "= the pipeline trains two, the reward model on one half of the votes and PROJECT-held-out "
        "on the other; empty = none",
    )
    every: int = Field(1, ge=1, description="Iterations from one measurement to the next")
    confirm: int = Field(
        2, ge=1, description="Measurements in a row beyond a limit before the monitor acts"
    )
    max_kl: float = Field(
        50.0, ge=0, description="Largest KL to the reference (nats per sequence); 0 = no limit"
    )
    at_kl: MonitorAction = Field("warn", description="What happens at max_kl")
    max_kl_acceleration: float = Field(
        2.0, ge=0, description="Largest acceleration of the KL (nats per iteration²); 0 = no limit"
    )
    at_kl_acceleration: MonitorAction = Field("warn", description="What happens there")
    max_negative_kl: float = Field(
        4.0,
        ge=0,
        description="How far below 0 the KL estimate may be (its standard errors); 0 = no limit",
    )
    at_negative_kl: MonitorAction = Field("warn", description="What happens there")
    max_gap: float = Field(
        1.0,
        ge=0,
        description="How much more the reward may have gained than the held-out reward model "
        "(standard deviations of SFT samples); 0 = no limit",
    )
    at_gap: MonitorAction = Field("warn", description="What happens at max_gap")
    max_agreement_drop: float = Field(
        0.3,
        ge=0,
        description="How far the rank correlation of reward and held-out reward model, over SFT "
        "samples and the policy's, may be below that over SFT samples; 0 = no limit",
    )
    at_agreement_drop: MonitorAction = Field("warn", description="What happens there")
    max_spread: float = Field(
        2.0,
        ge=0,
        description="Largest spread of the reward model's members (multiples of that on SFT "
        "samples); 0 = no limit",
    )
    at_spread: MonitorAction = Field("warn", description="What happens at max_spread")
    max_length: float = Field(
        1.5,
        ge=0,
        description="Largest mean length of a response (multiples of SFT samples); 0 = no limit",
    )
    at_length: MonitorAction = Field("warn", description="What happens at max_length")
    min_length: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Smallest mean length of a response (multiples of SFT samples); 0 = no limit",
    )
    at_brevity: MonitorAction = Field("warn", description="What happens at min_length")
    max_repetition: float = Field(
        0.2,
        ge=0,
        description="How far the share of repeated trigrams in a response may exceed that of SFT "
        "samples; 0 = no limit",
    )
    at_repetition: MonitorAction = Field("warn", description="What happens at max_repetition")
    min_distinct: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Smallest share of distinct bigrams over all responses (multiples of SFT "
        "samples); 0 = no limit",
    )
    at_distinct: MonitorAction = Field("warn", description="What happens at min_distinct")
    min_entropy: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Smallest entropy a token (multiples of SFT samples); 0 = no limit",
    )
    at_entropy: MonitorAction = Field("warn", description="What happens at min_entropy")
    min_finished: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Smallest share of responses that end (multiples of SFT samples); 0 = no limit",
    )
    at_finished: MonitorAction = Field("warn", description="What happens at min_finished")
    max_distance: float = Field(
        15.0,
        ge=0,
        description="Largest median squared distance of the reward model's last hidden state from "
        "those of SFT samples (multiples of SFT samples); a heuristic; 0 = no limit",
    )
    at_distance: MonitorAction = Field("warn", description="What happens at max_distance")
    good_every: int = Field(
        5,
        ge=1,
        description="Iterations from one state that is kept for roll_back to the next, if no "
        "measure is beyond its limit then",
    )
    max_roll_backs: int = Field(
        3, ge=1, description="At this many roll-backs the run ends, with the state of the last one"
    )

    @model_validator(mode="after")
    def _held_out_is_used(self) -> Self:
        if self.held_out and not self.prompts:
            raise ValueError("held_out has no effect without a monitor; set prompts, or remove it")
        return self

    @property
    def trains_held_out(self) -> bool:
        """Whether the pipeline trains the held-out reward model."""
        return self.held_out == TRAIN

    @property
    def on(self) -> bool:
        """Whether there is a monitor."""
        return self.prompts > 0

    @property
    def rolls_back(self) -> bool:
        """Whether a measure can roll the run back, so that good states have to be kept."""
        actions = (value for name, value in self if name.startswith("at_"))
        return self.on and "roll_back" in actions

    def action(self, measure: str) -> MonitorAction:
        """What happens when a measure is beyond its limit."""
        found: MonitorAction = getattr(self, f"at_{measure}")
        return found

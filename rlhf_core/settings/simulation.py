"""The simulated data and its annotators."""

from typing import Self

from pydantic import Field, model_validator

from rlhf_core.config import Section

MOST_PROMPTS = 480  # that the grammar can write


class AnnotatorsConfig(Section):
    """The number of simulated annotators, and their reliability and biases."""

    count: int = Field(12, ge=1, le=100_000, description="Simulated annotators (persons)")
    lowest_reliability: float = Field(
        0.8, ge=0, le=1, description="Reliability of the least careful annotator (share of votes)"
    )
    highest_reliability: float = Field(
        1.0, ge=0, le=1, description="Reliability of the most careful annotator (share of votes)"
    )
    side_bias: float = Field(
        0.1,
        ge=0,
        description="Largest side bias; each annotator's is uniform in ± this (sentiment)",
    )
    length_bias: float = Field(
        0.1,
        ge=0,
        description="Mean length bias; each annotator's is 0 to 2 x this (sentiment/10 words)",
    )
    taste_spread: float = Field(
        0.3, ge=0, description="Standard deviation of the log weights of features"
    )
    care: float = Field(
        0.5, ge=0, le=1, description="Share of the repetition penalty that annotators notice"
    )
    noise: float = Field(0.15, ge=0, description="Scale of the logistic noise (sentiment)")
    tie_margin: float = Field(
        0.05, ge=0, description="Difference up to which both texts count as equal (sentiment)"
    )
    spammer_share: float = Field(
        0.0, ge=0, le=1, description="Share of the annotators who always vote at random"
    )
    contrary_share: float = Field(
        0.0, ge=0, le=1, description="Share of the annotators who vote for the text they like less"
    )
    flip_share: float = Field(
        0.0, ge=0, le=1, description="Share of the votes that are recorded the wrong way round"
    )

    @model_validator(mode="after")
    def _reliabilities_in_order(self) -> Self:
        if self.lowest_reliability > self.highest_reliability:
            raise ValueError(
                f"lowest_reliability ({self.lowest_reliability}) is above highest_reliability "
                f"({self.highest_reliability}): swap them or make them equal"
            )
        return self

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> Self:
        if self.spammer_share + self.contrary_share > 1:
            raise ValueError(
                f"spammer_share ({self.spammer_share}) and contrary_share ({self.contrary_share}) "
                "add up to more than 1: nobody can be both"
            )
        return self


class SimulationConfig(Section):
    """The amount of simulated data, and its annotators."""

    prompts: int = Field(
        480, ge=2, le=MOST_PROMPTS, description="Distinct prompts, shared by the three tables"
    )
    demonstrations: int = Field(8000, ge=1, le=10_000_000, description="Reviews to imitate (rows)")
    preference_pairs: int = Field(
        4000, ge=1, le=10_000_000, description="Compared pairs, one vote each (rows)"
    )
    gold_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Pairs with the known right answer, that of the true reward, beside those that "
        "the annotators compare (share of these). Their annotator is called gold",
    )
    annotators: AnnotatorsConfig = Field(
        default_factory=AnnotatorsConfig,
        description="The simulated people who compare the pairs",
    )

"""The reward of a response: its parts, the members of a reward model, and shaping."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_core.config import Section

PIPELINE_REWARD = "reward_model"  # the source that means this pipeline's reward model

_REGISTERED = re.compile(r"models:/([A-Za-z0-9][A-Za-z0-9._-]*)(?:/([1-9]\d*)|@([A-Za-z0-9_-]+))")

_FUNCTION = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*:([A-Za-z_][A-Za-z0-9_]*)")

MemberCombination = Literal["mean", "min", "mean_minus_variance", "weight_average"]


class RewardTerm(Section):
    """One part of the reward."""

    source: str = Field(
        PIPELINE_REWARD,
        description="reward_model = the one that this pipeline trained; models:/NAME/VERSION or "
        "models:/NAME@ALIAS = another in the registry; package.module:function = a Python "
        "function, called with prompts and responses (lists of str), returns one number each",
    )
    weight: float = Field(1.0, description="Factor of this part; negative for a penalty, never 0")

    @field_validator("source")
    @classmethod
    def _source_is_one_of_three(cls, source: str) -> str:
        if (
            source == PIPELINE_REWARD
            or _REGISTERED.fullmatch(source)
            or _FUNCTION.fullmatch(source)
        ):
            return source
        raise ValueError(
            f"'{source}' is not a reward; write reward_model, models:/NAME/VERSION, "
            "models:/NAME@ALIAS or package.module:function"
        )

    @field_validator("weight")
    @classmethod
    def _weight_counts(cls, weight: float) -> float:
        if weight == 0:
            raise ValueError("a part of weight 0 changes nothing; leave it out")
        return weight

    @property
    def is_model(self) -> bool:
        """Whether this part is a reward model and not a function."""
        return not _FUNCTION.fullmatch(self.source)

    @property
    def role(self) -> str:
        """The role of this part's model among the inputs of a stage: reward or reward.NAME."""
        return "reward" if self.source == PIPELINE_REWARD else f"reward.{self.name}"

    @property
    def name(self) -> str:
        """The name of its metric: reward_model, NAME-VERSION, NAME-ALIAS or the function."""
        if registered := _REGISTERED.fullmatch(self.source):
            return "-".join(filter(None, registered.groups()))
        return self.source.rpartition(":")[2]


def check_terms(terms: Sequence[RewardTerm]) -> None:
    """Raise ValueError unless there are parts and their names are distinct."""
    if not terms:
        raise ValueError("a reward needs at least one part; add source: reward_model")
    name, count = Counter(term.name for term in terms).most_common(1)[0]
    if count == 1:
        return
    sources = {term.source: None for term in terms if term.name == name}
    if len(sources) == 1:
        raise ValueError(
            f"{next(iter(sources))} is listed {count} times; merge them and add the weights"
        )
    raise ValueError(
        f"{' and '.join(sources)} would both be logged as '{name}'; rename one of them"
    )


class MemberSection(Section):
    """How the members of a reward model become one reward. No effect on a model without members."""

    combine_members: MemberCombination = Field(
        "mean",
        description="Reward of a reward model with several members: their mean, their minimum "
        "(min), mean_minus_variance, or that of one model with the mean of their weights "
        "(weight_average)",
    )
    member_variance_coef: float = Field(
        1.0, ge=0, description="λ of mean_minus_variance among members: price of their variance"
    )


MEAN = MemberSection()


class LengthPenaltySection(Section):
    """A price for tokens beyond a limit."""

    length_limit: int = Field(
        0, ge=0, description="Response tokens that cost nothing, for length_penalty"
    )
    length_penalty: float = Field(
        0.0, ge=0, description="Price of each token beyond length_limit (reward units); 0 = off"
    )

    @model_validator(mode="after")
    def _limit_and_price_together(self) -> Self:
        if self.length_limit and not self.length_penalty:
            raise ValueError(
                "length_limit has no effect without length_penalty; set the price of a token, or "
                "remove the limit"
            )
        return self


class ShapingSection(LengthPenaltySection):
    """What is made of the score of a response before the policy learns from it."""

    transform: Literal["none", "whiten", "sigmoid"] = Field(
        "none",
        description="whiten = in standard deviations from the mean of all scores of the run so "
        "far; sigmoid = how surely the response is better than reference answers of the SFT policy "
        "to the same prompt, in (0, 1)",
    )
    reference_answers: int = Field(
        1,
        ge=1,
        le=1000,
        description="Reference answers to a prompt, for sigmoid; they are sampled when a prompt "
        "is first used",
    )
    clip: float = Field(
        0.0, ge=0, description="The score is cut to ± this after the transform; 0 = off"
    )

    @model_validator(mode="after")
    def _clip_can_cut(self) -> Self:
        if self.transform == "sigmoid" and self.clip >= 1:
            raise ValueError(
                f"clip {self.clip:g} never cuts a score of the sigmoid, which lies in (0, 1); "
                "remove it, or lower it"
            )
        return self

    @property
    def active(self) -> bool:
        """Whether anything is changed."""
        return self.transform != "none" or bool(self.clip or self.length_penalty)

    @property
    def compares(self) -> bool:
        """Whether reference answers are needed."""
        return self.transform == "sigmoid"

"""Examinations: the report card of a reward model, its gate, and the evaluation of a policy."""

from pydantic import Field

from rlhf_core.config import Section
from rlhf_core.settings.model import Precision
from rlhf_core.settings.rewards import LengthPenaltySection, MemberSection


class ReportCardConfig(Section):
    """Settings of the report card."""

    votes: int = Field(
        10_000,
        ge=1,
        description="Most held-out votes to look at, and most training votes to search for nearly "
        "equal texts; of more, whole prompts are drawn (votes)",
    )
    samples: int = Field(
        256,
        ge=2,
        le=1_000_000,
        description="Samples of the SFT policy on held-out prompts, for how reward and length go "
        "together",
    )
    canary_prompts: int = Field(
        128, ge=1, le=1_000_000, description="Most held-out answers that canaries are made from"
    )
    min_slice_prompts: int = Field(
        20,
        ge=1,
        description="Fewest prompts of a slice that is judged; smaller ones are only named",
    )
    max_length: int = Field(
        0,
        ge=0,
        description="Longest prompt + response (tokens); 0 = reward_model.max_length in the "
        "pipeline, and what the model can read in the flow report-card",
    )
    batch_size: int = Field(32, ge=1, description="Texts that are scored at once")
    precision: Precision = Field(
        "float32",
        description="Type of matrix products in the SFT policy and the reward model; auto takes "
        "bfloat16 where the machine has it",
    )


class RewardGateConfig(Section):
    """Requirements on a reward model before a policy is trained on it.

    This is a separate section because the settings of `reward_model` identify that training: a new
    threshold there would retrain the model.
    """

    min_accuracy: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="The lower bound of the held-out accuracy must exceed this, or the pipeline "
        "stops before policy training; 0.5 requires better than chance, 0 = off",
    )
    beat_longer: bool = Field(
        False,
        description="Also stop unless the held-out accuracy is above that of the rule "
        '"prefer the longer"',
    )
    max_canary_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Also stop unless the upper bound of the share of real answers that a canary "
        "beats is at most this, for every canary of the report card; 1 = off",
    )


class EvaluationConfig(MemberSection):
    """Settings of the evaluation."""

    prompts: int = Field(128, ge=2, le=1_000_000, description="Most held-out prompts to answer")
    samples_per_prompt: int = Field(
        2, ge=1, le=10_000, description="Answers of each policy to each prompt"
    )
    best_of: int = Field(
        8, ge=1, le=10_000, description="n of best-of-n: SFT samples to choose from"
    )
    best_of_penalty: LengthPenaltySection = Field(
        default_factory=LengthPenaltySection,
        description="Best-of-n takes the best by the reward less this price of long answers",
    )
    true_reward: str = Field(
        "",
        description="Import path module:function of the known truth, called with prompts and "
        "responses (lists of str), returns one number each; empty = none",
    )
    base: bool = Field(
        True, description="The model that SFT started from answers too, to judge the demonstrations"
    )
    sample_rows: int = Field(32, ge=1, description="Prompts shown in the table of samples")
    precision: Precision = Field(
        "float32",
        description="Type of matrix products in every arm and in the reward model; "
        "bfloat16 is faster on GPUs and on CPUs with instructions for it, and auto takes it there",
    )

"""Gradient descent: what all trainings share, and SFT, reward model and DPO."""

from typing import Literal, Self, TypeAlias

from pydantic import Field, model_validator

from rlhf_core.config import Section
from rlhf_core.settings.fields import GOLD
from rlhf_core.settings.model import Precision

Votes: TypeAlias = Literal["all", "first_half", "second_half"]


class TrainingSection(Section):
    """Settings of gradient descent that all training stages share."""

    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate of AdamW")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="How the learning rate falls to 0 after warm-up"
    )
    warmup_ratio: float = Field(
        0.05, ge=0, lt=1, description="Share of all steps over which the rate rises from 0"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay, only on matrices")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm")
    batch_size: int = Field(32, ge=1, description="Samples in one optimizer step")
    micro_batch_size: int = Field(
        32, ge=1, description="Samples in one forward pass; less memory, same result"
    )
    precision: Precision = Field(
        "float32",
        description="Type of matrix products. bfloat16 is faster on GPUs and on CPUs "
        "with instructions for it (avx512_bf16, amx_bf16), and slower on other CPUs; auto takes it "
        "where the machine has it. Weights, their gradients and the optimizer stay in float32",
    )
    lora_rank: int = Field(
        0,
        ge=0,
        description="Rank of LoRA adapters beside the linear layers of the blocks; 0 = train all "
        "weights",
    )
    lora_layers: int = Field(
        0,
        ge=0,
        description="Adapters only in this many of the last blocks; those below are then computed "
        "once for all networks and epochs. 0 = in every block",
    )
    lora_alpha: int = Field(
        32, gt=0, description="The output of the adapter is scaled by this / lora_rank"
    )


class SFTConfig(TrainingSection):
    """Settings of supervised fine-tuning."""

    epochs: int = Field(1, ge=1, le=10_000, description="Passes over the demonstrations")
    max_length: int = Field(512, ge=2, description="Longest prompt + response (tokens)")
    train_on_prompt: bool = Field(False, description="Also learn to predict the prompt")
    evaluations: int = Field(
        5, ge=1, description="How often the held-out loss is measured; the best weights are kept"
    )


class RewardModelConfig(TrainingSection):
    """Settings of reward-model training."""

    epochs: int = Field(1, ge=1, le=10_000, description="Passes over the preferences")
    max_length: int = Field(512, ge=2, description="Longest prompt + response (tokens)")
    votes: Votes = Field(
        "all",
        description="The votes to train on: all, or those on one half of the prompts. Which half a "
        "prompt is in is decided by a hash of it, so models of both halves share no prompt",
    )
    loss: Literal["bradley_terry", "pointwise_mse"] = Field(
        "bradley_terry",
        description="bradley_terry learns from comparisons; pointwise_mse, for demonstration, "
        "regresses chosen texts to 1 and rejected texts to 0",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Assumed share of wrong votes")
    center_coef: float = Field(
        0.0, ge=0, description="Weight of (r_chosen + r_rejected)², which keeps rewards near 0"
    )
    normalization_samples: int = Field(
        256,
        ge=2,
        le=1_000_000,
        description="SFT samples used to normalise the reward to mean 0 and standard deviation 1",
    )
    annotators: Literal["pooled", "aware"] = Field(
        "pooled",
        description="pooled takes every vote for that of the same voter; aware learns of each "
        "annotator how reliable they are, and how they like the left answer and the longer one, "
        "and keeps that out of the rewards",
    )
    gold_annotator: str = Field(
        GOLD,
        min_length=1,
        description="With aware: votes of this annotator that are marked as gold are known answers",
    )
    members: int = Field(
        1,
        ge=1,
        le=64,
        description="Reward models to train as an ensemble, as adapters and heads on one trunk; "
        "each has its own order and bootstrap of the votes. More than 1 needs lora_rank",
    )

    @model_validator(mode="after")
    def _members_are_adapters(self) -> Self:
        if self.members > 1 and not self.lora_rank:
            raise ValueError(
                f"members is {self.members}, but lora_rank is 0, and members are adapters on one "
                "trunk; set lora_rank, for example to 16, or members to 1"
            )
        return self

    @model_validator(mode="after")
    def _annotators_vote_in_pairs(self) -> Self:
        if self.annotators == "pooled":
            return self
        if self.loss != "bradley_terry":
            raise ValueError(
                f"annotators is aware, which is a model of comparisons, but loss is {self.loss}; "
                "set loss to bradley_terry or annotators to pooled"
            )
        if self.label_smoothing:
            raise ValueError(
                "annotators is aware, which learns how many votes of each annotator are wrong, so "
                "label_smoothing has to be 0; remove it, or set annotators to pooled"
            )
        return self


class DPOConfig(TrainingSection):
    """Settings of DPO."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate of the policy")
    epochs: int = Field(1, ge=1, le=10_000, description="Passes over the preferences")
    max_length: int = Field(512, ge=2, description="Longest prompt + response (tokens)")
    beta: float = Field(
        0.1, gt=0, description="β: price of moving away from the reference (reward per nat)"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="ε: assumed share of wrong votes")

"""The config of a pipeline: the sections of its stages side by side, and what must fit between."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from rlhf_core.backbone.base_model import ModelConfig
from rlhf_core.backbone.sampling import SamplingConfig
from rlhf_core.config import Section
from rlhf_core.evaluation.gates import PromotionConfig, RewardGateConfig
from rlhf_core.plan import Sections
from rlhf_core.stages.dpo import DPOConfig
from rlhf_core.stages.evaluation import EvaluationConfig
from rlhf_core.stages.grpo import GRPOConfig
from rlhf_core.stages.ppo import PPOConfig
from rlhf_core.stages.prepare import DataConfig, LengthLimits
from rlhf_core.stages.reward_model import RewardModelConfig
from rlhf_core.stages.rloo import RLOOConfig
from rlhf_core.stages.sft import SFTConfig
from rlhf_core.stages.table import algorithms
from rlhf_core.training.learner import TrainingSection


class RunConfig(Section):
    """What every flow is told: where its results belong, and where its random numbers start."""

    project: str = Field(
        "demo",
        pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        description="Names the MLflow experiment and the registered models, as in demo-policy "
        "(small letters, digits, dashes)",
    )
    seed: int = Field(0, ge=0, description="Same seed, same machine: same result")


class SFTSection(SFTConfig):
    """Supervised fine-tuning, or a policy that is there already."""

    reuse: str = Field(
        "", description="models:/NAME/VERSION or models:/NAME@ALIAS to take; empty = train"
    )


class RewardModelSection(RewardModelConfig):
    """Reward-model training, or a reward model that is there already."""

    reuse: str = Field(
        "", description="models:/NAME/VERSION or models:/NAME@ALIAS to take; empty = train"
    )


def _is_algorithm(name: str) -> str:
    if name not in (known := algorithms()):
        raise ValueError(f"'{name}' is no algorithm; it must be one of {', '.join(known)}")
    return name


# A form shows fields in the order of a class, so these are fields to share and not a base class.
Algorithm = Annotated[
    str,
    AfterValidator(_is_algorithm),
    Field(
        description="How the policy is optimised; the section of that name has the settings",
        json_schema_extra=lambda schema: schema.update(enum=algorithms()),
    ),
]
PPOSection = Annotated[PPOConfig, Field(description="A policy and a critic, on a learnt reward")]
RLOOSection = Annotated[RLOOConfig, Field(description="Responses to one prompt against each other")]
GRPOSection = Annotated[GRPOConfig, Field(description="The same in units of their spread")]
DPOSection = Annotated[DPOConfig, Field(description="On the preferences, without a learnt reward")]


class ByAlgorithm(RunConfig):
    """A config with the setting `algorithm`, and a section for each of them."""

    @property
    def policy(self) -> TrainingSection:
        """The settings of the chosen algorithm."""
        section: TrainingSection = getattr(self, self.algorithm)  # type: ignore[attr-defined]
        return section


class PipelineConfig(ByAlgorithm):
    """Everything that a run of the pipeline can be told."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="The base model")
    data: DataConfig = Field(default_factory=DataConfig, description="What to learn from")
    sampling: SamplingConfig = Field(
        default_factory=SamplingConfig, description="How responses are drawn, in every stage"
    )
    sft: SFTSection = Field(default_factory=SFTSection, description="Supervised fine-tuning")
    reward_model: RewardModelSection = Field(
        default_factory=RewardModelSection, description="Learning a reward from preferences"
    )
    reward_gate: RewardGateConfig = Field(
        default_factory=RewardGateConfig,
        description="What the reward model has to show before a policy is trained",
    )
    algorithm: Algorithm = "ppo"
    ppo: PPOSection = Field(default_factory=PPOConfig)
    rloo: RLOOSection = Field(default_factory=RLOOConfig)
    grpo: GRPOSection = Field(default_factory=GRPOConfig)
    dpo: DPOSection = Field(default_factory=DPOConfig)
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="Comparing on held-out prompts"
    )
    promotion: PromotionConfig = Field(
        default_factory=PromotionConfig, description="When the policy becomes the champion"
    )

    @property
    def length_limits(self) -> LengthLimits:
        """Where the stages cut texts, for the validation report of the data."""
        return LengthLimits(
            prompt=self.sampling.max_prompt_length,
            response=self.sampling.max_new_tokens,
            sft=self.sft.max_length,
            reward=self.reward_model.max_length,
        )

    @property
    def plan_sections(self) -> Sections:
        """What the work of the pipeline depends on, for `make_plan`."""
        trainings: dict[str, TrainingSection] = {
            name: section
            for name, section in (("sft", self.sft), ("reward_model", self.reward_model))
            if not section.reuse
        }
        return Sections(
            model=self.model,
            trainings={**trainings, self.algorithm: self.policy},
            evaluation=self.evaluation,
            reward_gate=self.reward_gate,
            promotion=self.promotion,
        )

    @model_validator(mode="after")
    def _texts_fit_into_a_fresh_model(self) -> Self:
        if self.model.source or self.sft.reuse:
            return self  # the stages ask the model itself
        needed = {
            "sft.max_length": self.sft.max_length,
            "reward_model.max_length": self.reward_model.max_length,
            "sampling.max_prompt_length + max_new_tokens": self.sampling.max_length,
        }
        if (longest := getattr(self.policy, "max_length", None)) is not None:
            needed[f"{self.algorithm}.max_length"] = longest
        for name, tokens in needed.items():
            if tokens > self.model.fresh.context:
                raise ValueError(
                    f"{name} is {tokens}, but model.fresh.context is {self.model.fresh.context}; "
                    "lower the one or raise the other"
                )
        return self

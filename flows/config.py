"""The config of a pipeline: the sections of its stages, and the checks across them."""

from typing import TYPE_CHECKING, Annotated, Any, Final, Self

from pydantic import AfterValidator, Field, model_validator

from rlhf_core.config import Section
from rlhf_core.evaluation.tournament.result import every
from rlhf_core.settings.data import DataConfig, LengthLimits
from rlhf_core.settings.evaluation import EvaluationConfig, ReportCardConfig, RewardGateConfig
from rlhf_core.settings.fields import GOLD
from rlhf_core.settings.judge import JudgeConfig
from rlhf_core.settings.model import ModelConfig, Precision, SamplingConfig
from rlhf_core.settings.onpolicy import GRPOConfig, OnPolicySection, PPOConfig, RLOOConfig
from rlhf_core.settings.promotion import PromotionConfig
from rlhf_core.settings.rewards import PIPELINE_REWARD
from rlhf_core.settings.tournament import TournamentConfig
from rlhf_core.settings.training import DPOConfig, RewardModelConfig, SFTConfig, TrainingSection

if TYPE_CHECKING:  # these load torch, which takes seconds, and settings are printed without it
    from rlhf_core.doubts import Chosen
    from rlhf_core.plan import Sections

ALGORITHMS: Final = ("ppo", "rloo", "grpo", "dpo")  # the stages that optimise the policy
NAME_LENGTH = 100  # of a project: it is a folder, and begins the names of models and runs


class RunConfig(Section):
    """The settings of every flow: its project and its seed."""

    project: str = Field(
        "demo",
        pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        max_length=NAME_LENGTH,
        description="Name of the MLflow experiment, and prefix of the registered models, as in "
        "demo-policy (lower-case letters, digits, dashes)",
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**63 - 1,
        description="Random seed; on the same machine the same seed gives the same result",
    )


class SFTSection(SFTConfig):
    """Supervised fine-tuning, or an existing SFT policy."""

    reuse: str = Field(
        "",
        description="models:/NAME/VERSION or models:/NAME@ALIAS to use instead of training; "
        "empty = train",
    )


class RewardModelSection(RewardModelConfig):
    """Reward-model training, or an existing reward model."""

    reuse: str = Field(
        "",
        description="models:/NAME/VERSION or models:/NAME@ALIAS to use instead of training; "
        "empty = train",
    )


def _algorithms() -> list[str]:
    """Those of the table of stages, which loads torch."""
    from rlhf_core.stages.table import algorithms

    return algorithms()


def _is_algorithm(name: str) -> str:
    if name not in ALGORITHMS and name not in (known := _algorithms()):
        raise ValueError(f"'{name}' is not an algorithm; it must be one of {', '.join(known)}")
    return name


# These fields are shared without a base class, because a form shows those of a base class first.
Algorithm = Annotated[
    str,
    AfterValidator(_is_algorithm),
    Field(
        description="How the policy is optimised; its settings are in the section of that name",
        json_schema_extra=lambda schema: schema.update(enum=_algorithms()),
    ),
]
PPOSection = Annotated[
    PPOConfig, Field(description="PPO: a policy and a critic, trained on a learnt reward")
]
RLOOSection = Annotated[
    RLOOConfig, Field(description="RLOO: compares the responses to one prompt with each other")
]
GRPOSection = Annotated[
    GRPOConfig, Field(description="GRPO: like RLOO, in units of the standard deviation of a group")
]
DPOSection = Annotated[
    DPOConfig, Field(description="DPO: trains on the preferences, without a learnt reward")
]


class ByAlgorithm(RunConfig):
    """A config with the setting `algorithm`, and a section for each algorithm."""

    @property
    def policy(self) -> TrainingSection:
        """The settings of the chosen algorithm."""
        section: TrainingSection = getattr(self, self.algorithm)  # type: ignore[attr-defined]
        return section


class PipelineConfig(ByAlgorithm):
    """All settings of a run of the pipeline."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="The base model")
    data: DataConfig = Field(
        default_factory=DataConfig, description="The demonstrations, preferences and prompts"
    )
    sampling: SamplingConfig = Field(
        default_factory=SamplingConfig, description="How responses are sampled, in every stage"
    )
    sft: SFTSection = Field(default_factory=SFTSection, description="Supervised fine-tuning")
    reward_model: RewardModelSection = Field(
        default_factory=RewardModelSection, description="Reward-model training on preferences"
    )
    report_card: ReportCardConfig = Field(
        default_factory=ReportCardConfig,
        description="Examination of the reward model before a policy is trained",
    )
    reward_gate: RewardGateConfig = Field(
        default_factory=RewardGateConfig,
        description="What the reward model must reach before a policy is trained",
    )
    algorithm: Algorithm = "ppo"
    ppo: PPOSection = Field(default_factory=PPOConfig)
    rloo: RLOOSection = Field(default_factory=RLOOConfig)
    grpo: GRPOSection = Field(default_factory=GRPOConfig)
    dpo: DPOSection = Field(default_factory=DPOConfig)
    judge: JudgeConfig = Field(
        default_factory=JudgeConfig, description="Who compares the answers of the policies"
    )
    tournament: TournamentConfig = Field(
        default_factory=TournamentConfig,
        description="Which of the policies along the training goes on to the evaluation",
    )
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="Comparison on held-out prompts"
    )
    promotion: PromotionConfig = Field(
        default_factory=PromotionConfig, description="When the policy becomes the champion"
    )

    @property
    def examination(self) -> ReportCardConfig:
        """The settings of the report card, with the length at which the reward model cuts."""
        length = self.report_card.max_length or self.reward_model.max_length
        return self.report_card.model_copy(update={"max_length": length})

    @property
    def length_limits(self) -> LengthLimits:
        """Where the stages truncate texts, for the validation report."""
        return LengthLimits(
            prompt=self.sampling.max_prompt_length,
            response=self.sampling.max_new_tokens,
            sft=self.sft.max_length,
            reward=self.reward_model.max_length,
        )

    @property
    def trains_held_out(self) -> bool:
        """Whether the monitor's reward model is trained on a half of the votes."""
        monitor = getattr(self.policy, "monitor", None)
        return monitor is not None and monitor.trains_held_out

    @property
    def rewarded(self) -> RewardModelConfig:
        """The settings of the reward model: on one half of the votes if the monitor's has the
        other."""
        if not self.trains_held_out:
            return self.reward_model
        return self.reward_model.model_copy(update={"votes": "first_half"})

    @property
    def optimised(self) -> TrainingSection:
        """The settings of the chosen algorithm, with the milestones that a tournament needs."""
        section = self.policy
        if not (self.tournament.on and isinstance(section, OnPolicySection)) or section.keep_every:
            return section
        kept = every(section.iterations, self.tournament.checkpoints)
        return section.model_copy(update={"keep_every": kept})

    @property
    def optimised_checkpoints(self) -> int:
        """How many policies the training keeps, the last one included."""
        section = self.optimised
        assert isinstance(section, OnPolicySection)
        return -(-section.iterations // (section.keep_every or section.iterations))

    @property
    def contest(self) -> TournamentConfig:
        """The settings of the tournament, with the known truth of the evaluation."""
        truth = self.tournament.true_reward or self.evaluation.true_reward
        return self.tournament.model_copy(update={"true_reward": truth})

    @property
    def reward_functions(self) -> list[tuple[str, str]]:
        """The import paths of functions that a run calls, each with its setting."""
        rewards = getattr(self.policy, "rewards", ())
        found = [("the reward", term.source) for term in rewards if not term.is_model]
        if self.judge.is_function:
            found.append(("judge.source", self.judge.source))
        truths = {
            "tournament.true_reward": self.tournament.true_reward,
            "evaluation.true_reward": self.evaluation.true_reward,
        }
        return [*found, *((setting, truth) for setting, truth in truths.items() if truth)]

    @property
    def registered_models(self) -> list[str]:
        """The addresses of the registered models that a run uses."""
        terms = getattr(self.policy, "rewards", ())
        named = [term.source for term in terms if term.is_model and term.source != PIPELINE_REWARD]
        monitor = getattr(self.policy, "monitor", None)
        if monitor is not None and not monitor.trains_held_out:
            named.append(monitor.held_out)
        if self.judge.is_registered:
            named.append(self.judge.source)
        return [uri for uri in (self.sft.reuse, self.reward_model.reuse, *named) if uri]

    @property
    def plan_sections(self) -> "Sections":
        """The sections that `make_plan` needs."""
        from rlhf_core.plan import Sections

        return Sections(
            model=self.model,
            trainings=self._trainings,
            sampling=self.sampling,
            report_card=self.report_card,
            evaluation=self.evaluation,
            tournament=self.tournament,
            judge=self.judge,
            reward_gate=self.reward_gate,
            promotion=self.promotion,
        )

    @property
    def precisions(self) -> dict[str, Precision]:
        """The setting `precision` of each stage that has one."""
        others: dict[str, Any] = {"report_card": self.report_card, "evaluation": self.evaluation}
        if self.tournament.on:
            others["tournament"] = self.tournament
        return {name: part.precision for name, part in {**self._trainings, **others}.items()}

    @property
    def chosen(self) -> "Chosen":
        """The sections that `doubts` looks at."""
        from rlhf_core.doubts import Chosen

        return Chosen(self.model, self.data, self.sampling, self._trainings)

    @property
    def _trainings(self) -> dict[str, TrainingSection]:
        """The sections of the stages that train, by stage."""
        trainings: dict[str, TrainingSection] = {
            name: section
            for name, section in (("sft", self.sft), ("reward_model", self.reward_model))
            if not section.reuse
        }
        if self.trains_held_out:
            trainings["held_out"] = self.reward_model
        return {**trainings, self.algorithm: self.optimised}

    @model_validator(mode="after")
    def _halves_are_trained_here(self) -> Self:
        if not self.trains_held_out:
            return self
        setting = f"{self.algorithm}.monitor.held_out is train"
        if self.reward_model.reuse:
            raise ValueError(
                f"{setting}, but reward_model.reuse names a model that may have seen all votes; "
                "train the reward model here, or name a registered held-out model"
            )
        if self.reward_model.votes != "all":
            raise ValueError(
                f"{setting}, which chooses the halves itself; remove reward_model.votes"
            )
        return self

    @model_validator(mode="after")
    def _checkpoints_are_kept(self) -> Self:
        if not self.tournament.on:
            return self
        setting = f"tournament.checkpoints is {self.tournament.checkpoints}"
        if not isinstance(self.policy, OnPolicySection):
            raise ValueError(
                f"{setting}, but {self.algorithm} keeps no policies along the way; set it to 0, or "
                "choose ppo, rloo or grpo as the algorithm"
            )
        if (kept := self.optimised_checkpoints) < self.tournament.checkpoints:
            raise ValueError(
                f"{setting}, but {self.algorithm} will keep {kept} with iterations "
                f"{self.policy.iterations} and keep_every {self.policy.keep_every}; lower "
                "checkpoints or keep_every, or set keep_every to 0"
            )
        return self

    @model_validator(mode="after")
    def _known_answers_are_called_so(self) -> Self:
        store, reward = self.data.preferences.store, self.reward_model
        if store and reward.annotators == "aware" and reward.gold_annotator != GOLD:
            raise ValueError(
                f"reward_model.gold_annotator is {reward.gold_annotator}, but known answers of the "
                f"preference store (data.preferences.store) are those of {GOLD}; remove "
                "gold_annotator"
            )
        return self

    @model_validator(mode="after")
    def _protected_columns_are_kept(self) -> Self:
        kept = self.data.prompts.keep
        if missing := [name for name in self.promotion.protected if name not in kept]:
            raise ValueError(
                f"promotion.protected names {', '.join(missing)}, but data.prompts.keep does not, "
                "so the evaluation would not know them; add them there"
            )
        return self

    @model_validator(mode="after")
    def _texts_fit_into_a_fresh_model(self) -> Self:
        if self.model.source or self.sft.reuse:
            return self  # the stages read the context length of the model
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
                    "lower the former or raise the latter"
                )
        return self


def default_settings() -> dict[str, Any]:
    """The settings of a run whose config is empty, by section."""
    return PipelineConfig().model_dump(mode="json")

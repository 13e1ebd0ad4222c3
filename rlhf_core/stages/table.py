"""The contract of each stage, used by everything that runs, plans or shows a stage.

A new stage is a file in this folder and a row in `STAGES`. A stage with the output `policy` is a
value of the setting `algorithm`, and its section has the same name.

The file of a stage is imported when the stage is called: a run that begins to read data, or finds
all its stages done, has not imported what computes with models.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel

from rlhf_core.backbone.precision.machine import resolved
from rlhf_core.config import Section
from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.evaluation.scorecard import Scorecard
from rlhf_core.evaluation.tournament.result import TournamentResult
from rlhf_core.machine.imports import importing
from rlhf_core.settings.data import SNAPSHOT, DataConfig, LengthLimits
from rlhf_core.settings.evaluation import EvaluationConfig, ReportCardConfig
from rlhf_core.settings.fields import TableKind
from rlhf_core.settings.judge import JudgeConfig
from rlhf_core.settings.model import ModelConfig, SamplingConfig
from rlhf_core.settings.onpolicy import GRPOConfig, PPOConfig, RLOOConfig
from rlhf_core.settings.tournament import TournamentConfig
from rlhf_core.settings.training import DPOConfig, RewardModelConfig, SFTConfig
from rlhf_core.types import Report
from rlhf_core.work import StageFunction, Work


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """The arguments and outputs of a stage."""

    config: type[Section]
    function: StageFunction
    sections: Mapping[str, type[Section]] = field(default_factory=dict)  # shared settings
    inputs: tuple[str, ...] = ()  # required roles, in the order of the form
    optional_inputs: tuple[str, ...] = ()  # roles that it uses if present
    outputs: tuple[str, ...] = ()  # kinds that it always writes; empty: only a report
    optional_outputs: tuple[str, ...] = ()  # kinds that it writes with some settings
    result: type[BaseModel] | None = None  # of its report, for later stages
    learns: Mapping[str, Literal["policy", "scalar"]] = field(default_factory=dict)  # networks
    passes_over: TableKind | None = None  # the table whose rows are the samples of an epoch

    @property
    def trains(self) -> bool:
        """Whether it resumes from checkpoints, may run on several processes, and takes a slot."""
        return bool(self.learns)

    @property
    def optimises(self) -> bool:
        """Whether it optimises the policy, and so is a value of `algorithm`."""
        return self.trains and "policy" in self.outputs


def _later(stage: str, name: str) -> StageFunction:
    """A function in the file of a stage, which is imported when it is called."""

    def call(config: Any, work: Work) -> Report:
        function: StageFunction = getattr(load_stage(stage), name)
        return function(config, work)

    call.__module__, call.__name__ = f"{__package__}.{stage}", name
    return call


def load_stage(stage: str) -> ModuleType:
    """The module of a stage of this package, imported if it was not."""
    with importing():
        return import_module(f"{__package__}.{stage}")


_ON_POLICY = {"sampling": SamplingConfig}
# the pipeline's reward model, others by name, and that of the monitor
_REWARDS = ("reward", "reward.*", "held_out")

STAGES: dict[str, StageSpec] = {
    "prepare": StageSpec(
        config=DataConfig,
        function=_later("prepare", "prepare_data"),
        sections={"model": ModelConfig, "limits": LengthLimits},
        optional_inputs=(SNAPSHOT,),
        outputs=("data",),
    ),
    "sft": StageSpec(
        config=SFTConfig,
        function=_later("sft", "train_sft"),
        sections={"model": ModelConfig},
        inputs=("data",),
        outputs=("sft",),
        learns={"policy": "policy"},
        passes_over="demonstrations",
    ),
    "reward_model": StageSpec(
        config=RewardModelConfig,
        function=_later("reward_model", "train_reward_model"),
        sections={"sampling": SamplingConfig},
        inputs=("sft", "data"),
        outputs=("reward",),
        learns={"reward model": "scalar"},
        passes_over="preferences",
    ),
    "report_card": StageSpec(
        config=ReportCardConfig,
        function=_later("report_card", "write_report_card"),
        sections={"sampling": SamplingConfig},
        inputs=("reward", "data", "sft"),
        result=ReportCard,
    ),
    "held_out": StageSpec(
        config=RewardModelConfig,
        function=_later("held_out", "train_held_out"),
        sections={"sampling": SamplingConfig},
        inputs=("sft", "data"),
        outputs=("held_out",),
        learns={"held-out reward model": "scalar"},
        passes_over="preferences",
    ),
    "ppo": StageSpec(
        config=PPOConfig,
        function=_later("ppo", "train_ppo"),
        sections=_ON_POLICY,
        inputs=("reward", "sft", "data"),
        optional_inputs=_REWARDS,
        outputs=("policy", "critic"),
        optional_outputs=("milestones",),
        learns={"policy": "policy", "critic": "scalar"},
    ),
    "rloo": StageSpec(
        config=RLOOConfig,
        function=_later("rloo", "train_rloo"),
        sections=_ON_POLICY,
        inputs=("sft", "data"),
        optional_inputs=_REWARDS,
        outputs=("policy",),
        optional_outputs=("milestones",),
        learns={"policy": "policy"},
    ),
    "grpo": StageSpec(
        config=GRPOConfig,
        function=_later("grpo", "train_grpo"),
        sections=_ON_POLICY,
        inputs=("sft", "data"),
        optional_inputs=_REWARDS,
        outputs=("policy",),
        optional_outputs=("milestones",),
        learns={"policy": "policy"},
    ),
    "dpo": StageSpec(
        config=DPOConfig,
        function=_later("dpo", "train_dpo"),
        inputs=("sft", "data"),
        outputs=("policy",),
        learns={"policy": "policy"},
        passes_over="preferences",
    ),
    "tournament": StageSpec(
        config=TournamentConfig,
        function=_later("tournament", "hold_tournament"),
        sections={"sampling": SamplingConfig, "judge": JudgeConfig},
        inputs=("policy", "data", "sft", "reward"),
        optional_inputs=("milestone.*", "judge"),
        optional_outputs=("policy",),
        result=TournamentResult,
    ),
    "evaluation": StageSpec(
        config=EvaluationConfig,
        function=_later("evaluation", "evaluate"),
        sections={"sampling": SamplingConfig, "judge": JudgeConfig},
        inputs=("policy", "data", "sft", "reward"),
        optional_inputs=("champion", "judge"),
        result=Scorecard,
    ),
}


def algorithms() -> list[str]:
    """The stages that optimise the policy."""
    return [name for name, spec in STAGES.items() if spec.optimises]


def run_stage(name: str, config: Section, work: Work) -> Report:
    """Call a stage. Its `precision` auto is the type that the device has.

    Raises: ValueError when an input, output or section is missing or unexpected.
    """
    spec = STAGES[name]
    _require(name, "inputs", set(work.inputs), spec.inputs, spec.optional_inputs)
    _require(name, "outputs", set(work.outputs), spec.outputs, spec.optional_outputs)
    _require(name, "sections", set(work.sections), tuple(spec.sections), ())
    return spec.function(resolved(config, work.device), work)


def _require(
    stage: str, what: str, given: set[str], needed: tuple[str, ...], allowed: tuple[str, ...]
) -> None:
    known = {*needed, *allowed}
    others = {name for name in given - known if not any(_matches(a, name) for a in allowed)}
    if (missing := set(needed) - given) or others:
        wrong = ", ".join([*(f"no {m}" for m in sorted(missing)), *sorted(others)])
        raise ValueError(f"{stage} has the {what} {', '.join(needed) or 'none'}; got: {wrong}")


def _matches(pattern: str, name: str) -> bool:
    return pattern.endswith("*") and name.startswith(pattern[:-1])

"""The contract of each stage, in one place: whoever runs, plans or shows a stage reads it here.

A new stage is a file beside this one and a row. A new way to optimise the policy makes the kind
`policy`, and so becomes a value of the setting `algorithm`, whose section bears its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel

from rlhf_core.backbone.base_model import ModelConfig
from rlhf_core.backbone.sampling import SamplingConfig
from rlhf_core.config import Section
from rlhf_core.data.prepared import TableKind
from rlhf_core.evaluation.scorecard import Scorecard
from rlhf_core.stages.dpo import DPOConfig, train_dpo
from rlhf_core.stages.evaluation import EvaluationConfig, evaluate
from rlhf_core.stages.grpo import GRPOConfig, train_grpo
from rlhf_core.stages.ppo import PPOConfig, train_ppo
from rlhf_core.stages.prepare import DataConfig, LengthLimits, prepare_data
from rlhf_core.stages.reward_model import RewardModelConfig, train_reward_model
from rlhf_core.stages.rloo import RLOOConfig, train_rloo
from rlhf_core.stages.sft import SFTConfig, train_sft
from rlhf_core.types import Report
from rlhf_core.work import StageFunction, Work

OTHER_REWARDS = "reward."  # how the roles of reward models beside the pipeline's begin


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """What a stage is called with, and what it leaves."""

    config: type[Section]
    function: StageFunction
    sections: Mapping[str, type[Section]] = field(default_factory=dict)  # settings it shares
    inputs: tuple[str, ...] = ()  # roles that it needs; a form asks for them in this order
    optional_inputs: tuple[str, ...] = ()  # roles that it takes if they are there
    outputs: tuple[str, ...] = ()  # kinds that it always writes; none: its report is all
    optional_outputs: tuple[str, ...] = ()  # kinds that some settings ask for
    result: type[BaseModel] | None = None  # of its report, for later stages
    learns: Mapping[str, Literal["policy", "scalar"]] = field(default_factory=dict)  # networks
    passes_over: TableKind | None = None  # the table whose rows are the samples of an epoch

    @property
    def trains(self) -> bool:
        """Whether it resumes from checkpoints, may run on several processes, and takes a slot."""
        return bool(self.learns)

    @property
    def optimises(self) -> bool:
        """Whether it is a way to optimise the policy: a value of `algorithm`."""
        return "policy" in self.outputs


_ON_POLICY = {"sampling": SamplingConfig}
_REWARDS = ("reward", f"{OTHER_REWARDS}*")

STAGES: dict[str, StageSpec] = {
    "prepare": StageSpec(
        config=DataConfig,
        function=prepare_data,
        sections={"model": ModelConfig, "limits": LengthLimits},
        outputs=("data",),
    ),
    "sft": StageSpec(
        config=SFTConfig,
        function=train_sft,
        sections={"model": ModelConfig},
        inputs=("data",),
        outputs=("sft",),
        learns={"policy": "policy"},
        passes_over="demonstrations",
    ),
    "reward_model": StageSpec(
        config=RewardModelConfig,
        function=train_reward_model,
        sections={"sampling": SamplingConfig},
        inputs=("sft", "data"),
        outputs=("reward",),
        learns={"reward model": "scalar"},
        passes_over="preferences",
    ),
    "ppo": StageSpec(
        config=PPOConfig,
        function=train_ppo,
        sections=_ON_POLICY,
        inputs=("reward", "sft", "data"),
        optional_inputs=_REWARDS,
        outputs=("policy", "critic"),
        optional_outputs=("milestones",),
        learns={"policy": "policy", "critic": "scalar"},
    ),
    "rloo": StageSpec(
        config=RLOOConfig,
        function=train_rloo,
        sections=_ON_POLICY,
        inputs=("sft", "data"),
        optional_inputs=_REWARDS,
        outputs=("policy",),
        optional_outputs=("milestones",),
        learns={"policy": "policy"},
    ),
    "grpo": StageSpec(
        config=GRPOConfig,
        function=train_grpo,
        sections=_ON_POLICY,
        inputs=("sft", "data"),
        optional_inputs=_REWARDS,
        outputs=("policy",),
        optional_outputs=("milestones",),
        learns={"policy": "policy"},
    ),
    "dpo": StageSpec(
        config=DPOConfig,
        function=train_dpo,
        inputs=("sft", "data"),
        outputs=("policy",),
        learns={"policy": "policy"},
        passes_over="preferences",
    ),
    "evaluation": StageSpec(
        config=EvaluationConfig,
        function=evaluate,
        sections={"sampling": SamplingConfig},
        inputs=("policy", "data", "sft", "reward"),
        optional_inputs=("champion",),
        result=Scorecard,
    ),
}


def algorithms() -> list[str]:
    """The stages that optimise the policy."""
    return [name for name, spec in STAGES.items() if spec.optimises]


def run_stage(name: str, config: Section, work: Work) -> Report:
    """Call a stage.

    Raises: ValueError when it is called with other inputs, outputs or settings than it has.
    """
    spec = STAGES[name]
    _require(name, "inputs", set(work.inputs), spec.inputs, spec.optional_inputs)
    _require(name, "outputs", set(work.outputs), spec.outputs, spec.optional_outputs)
    _require(name, "sections", set(work.sections), tuple(spec.sections), ())
    return spec.function(config, work)


def _require(
    stage: str, what: str, given: set[str], needed: tuple[str, ...], allowed: tuple[str, ...]
) -> None:
    known = {*needed, *allowed}
    others = {name for name in given - known if not any(_stands_for(a, name) for a in allowed)}
    if (missing := set(needed) - given) or others:
        wrong = ", ".join([*(f"no {m}" for m in sorted(missing)), *sorted(others)])
        raise ValueError(f"{stage} has the {what} {', '.join(needed) or 'none'}; given: {wrong}")


def _stands_for(pattern: str, name: str) -> bool:
    return pattern.endswith("*") and name.startswith(pattern[:-1])

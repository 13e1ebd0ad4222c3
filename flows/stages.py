"""One flow per stage, on models and data that are registered already.

A config names a model by its address in the registry, which is resolved to a version before the
stage starts. The data are those that this model was trained on, unless the config names the data of
another run; so `prepare` can bring new data to an existing model. Forms and flows follow the stage
table: `stage_flow` makes a flow of any row that needs only its inputs.
"""

from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import Field, create_model

from flows.config import Algorithm, ByAlgorithm, PipelineConfig, RunConfig
from flows.pipeline_flow import PipelineFlow, pipeline_flow
from rlhf_core.errors import ConfigError
from rlhf_core.evaluation.card.report_card import ReportCard
from rlhf_core.judges.load import JUDGE
from rlhf_core.settings.data import DataConfig, LengthLimits
from rlhf_core.settings.evaluation import RewardGateConfig
from rlhf_core.settings.model import ModelConfig
from rlhf_core.settings.training import SFTConfig
from rlhf_core.stages.table import STAGES, StageSpec, algorithms
from tasks.feedback.asking.waiting import suspended_for_people
from tasks.record.run import open_run
from tasks.registry.refs import DatasetRef, ModelRef, Ref
from tasks.registry.registered import find_data, find_milestones, find_model, find_parent
from tasks.steps.data import prepare_data
from tasks.steps.judge import check_judge
from tasks.steps.policy import TrainedPolicy, check_engine, find_rewards, train_policy
from tasks.steps.promotion import pin_champion
from tasks.steps.report_card import check_report_card
from tasks.steps.reward_model import check_reward_model
from tasks.steps.sft import train_sft
from tasks.steps.stage import StageOutputs, any_stage

_MODEL = r"models:/[A-Za-z0-9][A-Za-z0-9._-]*(/[1-9][0-9]*|@[A-Za-z0-9_-]+)"
_DATA = r"runs:/[0-9a-f]{32}/data"
ModelAddress = Annotated[str, Field(pattern=f"^{_MODEL}$")]
OptionalModel = Annotated[str, Field(pattern=f"^({_MODEL})?$")]
DataAddress = Annotated[str, Field(pattern=f"^{_DATA}$")]
OptionalData = Annotated[str, Field(pattern=f"^({_DATA})?$")]

ROLES = {"sft": "SFT policy", "reward": "reward model", "policy": "policy"}
FIELDS = {"reward": "reward_model"}  # field names that differ from the role

# ---- forms --------------------------------------------------------------------------------------


class PrepareFlowConfig(RunConfig):
    """Check, split and store data."""

    model: ModelConfig = Field(
        default_factory=ModelConfig, description="The base model, whose tokenizer counts tokens"
    )
    data: DataConfig = Field(
        default_factory=DataConfig, description="The demonstrations, preferences and prompts"
    )
    lengths: LengthLimits = Field(
        description="Lengths above which the report counts a text as too long"
    )


class SFTFlowConfig(RunConfig):
    """Supervised fine-tuning of a base model."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="The base model")
    data: DataConfig = Field(
        default_factory=DataConfig, description="The demonstrations, preferences and prompts"
    )
    sft: SFTConfig = Field(default_factory=SFTConfig, description="Supervised fine-tuning")


def stage_form(stage: str, about: str) -> type[RunConfig]:
    """The config of a stage as a flow: its inputs, shared sections and own settings."""
    spec = STAGES[stage]
    fields = {**_inputs(spec), **_sections(spec.sections), **_sections({stage: spec.config})}
    return create_model(f"{stage}_flow", __base__=RunConfig, __doc__=about, **fields)


def _policy_form() -> type[ByAlgorithm]:
    spec, configs = STAGES["ppo"], {name: STAGES[name].config for name in algorithms()}
    fields = {**_inputs(spec), **_sections(spec.sections), "algorithm": (Algorithm, "ppo")}
    return create_model(
        "policy_flow",
        __base__=ByAlgorithm,
        __doc__="Train a policy on a registered reward model, from the SFT policy under it.",
        **fields,
        **_sections(configs),
    )


def _inputs(spec: StageSpec) -> dict[str, Any]:
    """A field for each input; only the first model is required, the others follow from it."""
    fields: dict[str, Any] = {}
    first = before = ""
    for role in spec.inputs:
        if role == "data":
            about = "runs:/RUN_ID/data of a prepare stage"
            of = f"; empty = the data of the {ROLES[before]}" if before else ""
            kind = (OptionalData, Field("", description=about + of)) if before else None
            fields["data"] = kind or (DataAddress, Field(description=about))
            continue
        if first:
            about = f"The {ROLES[role]}; empty = the one that the {ROLES[first]} was trained from"
            fields[_field(role)] = (OptionalModel, Field("", description=about))
        else:
            about = f"The {ROLES[role]}: models:/NAME/VERSION or models:/NAME@ALIAS"
            fields[_field(role)] = (ModelAddress, Field(description=about))
        first, before = first or role, role
    return fields


def _sections(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """A field for each section, described as in the config of the pipeline."""
    known = PipelineConfig.model_fields
    return {
        name: (
            kind,
            Field(
                default_factory=kind,
                description=known[name].description if name in known else kind.__doc__,
            ),
        )
        for name, kind in kinds.items()
    }


def _field(role: str) -> str:
    return FIELDS.get(role, role)


RewardModelFlowConfig = stage_form(
    "reward_model", "Train a reward model from a registered SFT policy."
)
HeldOutFlowConfig = stage_form(
    "held_out", "Train a second reward model on votes that the first, on the other half, never saw."
)
ReportCardFlowConfig = stage_form("report_card", "Examine a registered reward model.")
PolicyFlowConfig = _policy_form()
TournamentFlowConfig = stage_form(
    "tournament", "Find the strongest policy of a training that kept milestones."
)
EvaluationFlowConfig = stage_form(
    "evaluation", "Compare a registered policy with SFT, best-of-n and the champion."
)

# ---- flows --------------------------------------------------------------------------------------


@pipeline_flow("prepare")
def prepare(config: PrepareFlowConfig) -> DatasetRef:
    """Check and split data, and store them for other stages."""
    with open_run(config.project, config, config.seed) as run:
        return prepare_data(config.data, config.model, config.lengths, run)


@pipeline_flow("sft")
def sft(config: SFTFlowConfig) -> ModelRef:
    """Fine-tune a base model on demonstrations."""
    longest = config.sft.max_length
    limits = LengthLimits(prompt=longest, response=longest, sft=longest, reward=longest)
    with open_run(config.project, config, config.seed) as run:
        data = prepare_data(config.data, config.model, limits, run)
        return train_sft(config.sft, config.model, data, run)


def stage_flow(
    stage: str, form: type[RunConfig], about: str
) -> PipelineFlow[[RunConfig], ModelRef | StageOutputs | Any]:
    """A flow for a row of the stage table.

    The flow returns the result in the stage's report, else its only model, else all its outputs.
    """
    spec = STAGES[stage]

    def run_stage(config: RunConfig) -> Any:
        if "judge" in spec.sections:
            check_judge(config.judge, config.project)  # type: ignore[attr-defined]
        if "sampling" in spec.sections:
            check_engine(getattr(config, stage), config.sampling)  # type: ignore[attr-defined]
        inputs = find_inputs(spec, config)
        sections = {name: getattr(config, name) for name in spec.sections}
        with open_run(config.project, config, config.seed) as run:
            if "champion" in spec.optional_inputs:
                champion = pin_champion(run)
                if champion is not None and champion != inputs["policy"]:
                    inputs["champion"] = champion
            if "milestone.*" in spec.optional_inputs:
                inputs |= find_milestones(cast(ModelRef, inputs["policy"]))
            if JUDGE in spec.optional_inputs and config.judge.is_registered:  # type: ignore[attr-defined]
                inputs[JUDGE] = find_model(config.judge.source)  # type: ignore[attr-defined]
            with suspended_for_people(run):
                made = any_stage(stage, getattr(config, stage), sections, inputs, run)
            if "reward" in made.models:
                check_reward_model(made.models["reward"])
            if isinstance(made.result, ReportCard):
                check_report_card(RewardGateConfig(), made.result, cast(ModelRef, inputs["reward"]))
            if made.result is not None:
                return made.result
            return next(iter(made.models.values())) if len(made.models) == 1 else made

    run_stage.__name__ = run_stage.__qualname__ = stage
    run_stage.__doc__ = about
    run_stage.__annotations__ = {"config": form, "return": Any}
    return pipeline_flow(stage.replace("_", "-"))(run_stage)


def find_inputs(spec: StageSpec, config: RunConfig) -> dict[str, Ref]:
    """The versions and data that a form names, or that the named ones were made from.

    Raises: ModelError or DataError if there are none.
    """
    found: dict[str, Ref] = {}
    first: ModelRef | None = None
    before: ModelRef | None = None
    for role in spec.inputs:
        address = getattr(config, _field(role))
        if role == "data":
            found[role] = find_data(address, before)
            continue
        before = find_model(address) if first is None else find_parent(address, first, role)
        found[role], first = before, first or before
    return found


def require_registered_held_out(section: Any) -> None:
    """Raise ConfigError when the policy's flow would have to train a held-out reward model."""
    monitor = getattr(section, "monitor", None)
    if monitor is not None and monitor.trains_held_out:
        raise ConfigError(
            "monitor.held_out is train, which only the whole pipeline can; name a registered "
            "reward model that has not seen the votes of the other"
        )


@pipeline_flow("policy")
def policy(config: PolicyFlowConfig) -> TrainedPolicy:  # type: ignore[valid-type]
    """Optimise a registered SFT policy on a registered reward model."""
    chosen: Any = config
    inputs: Any = find_inputs(STAGES["ppo"], chosen)
    others = find_rewards(chosen.policy)
    require_registered_held_out(chosen.policy)
    with open_run(chosen.project, chosen, chosen.seed) as run:
        return train_policy(
            chosen.algorithm,
            chosen.policy,
            chosen.sampling,
            inputs["sft"],
            inputs["reward"],
            others,
            inputs["data"],
            run,
        )


reward_model = stage_flow(
    "reward_model",
    RewardModelFlowConfig,
    "Learn a reward from preferences, starting from a registered SFT policy.",
)
held_out = stage_flow(
    "held_out",
    HeldOutFlowConfig,
    "Learn the monitor's reward from the second half of the votes, for a registered SFT policy.",
)
report_card = stage_flow(
    "report_card",
    ReportCardFlowConfig,
    "Examine a registered reward model on held-out votes, samples of SFT and known-bad answers.",
)
tournament = stage_flow(
    "tournament",
    TournamentFlowConfig,
    "Compare the milestones of a registered policy's training; register the strongest as a policy.",
)
evaluation = stage_flow(
    "evaluation",
    EvaluationFlowConfig,
    "Compare a registered policy with SFT, best-of-n and the champion; nothing is promoted.",
)
SINGLE_FLOWS = (
    *(prepare, sft, reward_model, report_card, held_out),
    *(policy, tournament, evaluation),
)

"""Runs any stage of the table in MLflow: fetches its inputs and publishes its outputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel

from rlhf_core.config import Section
from rlhf_core.errors import VerdictsPendingError
from rlhf_core.settings.judge import PEOPLE, JudgeConfig
from rlhf_core.settings.model import SamplingConfig
from rlhf_core.settings.onpolicy import OnPolicySection
from rlhf_core.stages.table import STAGES, StageSpec
from tasks.prefect.ui import as_waiting, stage_task
from tasks.record import tags
from tasks.record.record import Record
from tasks.record.stage import Stage, open_stage, open_training
from tasks.registry.refs import DatasetRef, ModelRef, PipelineRun, Ref
from tasks.steps.precision import with_precision

T = TypeVar("T")


@dataclass(frozen=True)
class StageOutputs:
    """The outputs of a stage, from this run or a reused one."""

    models: Mapping[str, ModelRef]  # by kind; milestones with a number, as milestone.10
    data: DatasetRef | None
    result: Any  # in its report; its type is in the stage table


def do_stage(
    name: str,
    config: Section,
    run: PipelineRun,
    *,
    inputs: Mapping[str, Ref],
    sections: Mapping[str, Section],
    returns: Callable[[StageOutputs], T],
    reuse: Literal["own", "any"] | None = None,
    given: Mapping[str, Path] = {},
    watch: Callable[[Stage], Stage] = lambda stage: stage,
) -> T:
    """Run a stage of the table, or reuse a finished run of it.

    Args:
        inputs: by role.
        sections: shared settings; only those that the stage uses are read.
        returns: selects the return value from the outputs.
        reuse: for a stage that trains nothing, whether a finished run of this pipeline run alone
            may be reused, or any; None = any if it has inputs.
        given: directories by role that are used in place of what is stored, or without it.
        watch: what is made of the open stage before its work.
    """
    spec = STAGES[name]
    record = Record.open(patient=True)
    common: dict[str, Any] = {
        "record": record,
        "config": with_precision(spec.config.part_of(config), record, run, trains=spec.trains),
        "extra_sections": {key: _used(sections[key], spec) for key in spec.sections},
        "run": run,
        "inputs": inputs,
    }
    if spec.trains:
        opened = open_training(name, **common)
    else:
        # Files and hubs may change, so a stage without inputs reuses no other pipeline run.
        common["waits"] = _asks_people(sections)
        common["reuse"] = reuse or ("any" if inputs else "own")
        common["context"] = "training" if spec.outputs else "evaluation"
        opened = open_stage(name, **common)
    try:
        with opened as stage:
            if not stage.cached:
                _do(watch(stage), spec, inputs, given)
            result = None if spec.result is None else stage.kept(spec.result)
            return stage.result(returns(StageOutputs(stage.models(), stage.dataset(), result)))
    except VerdictsPendingError as pending:
        return cast(T, as_waiting(pending))


def _used(section: Section, spec: StageSpec) -> Section:
    """The shared settings that a stage uses: another engine samples roll-outs alone, so that what
    needs none is reused whatever the engine."""
    rolls_out = issubclass(spec.config, OnPolicySection)
    return section.in_process if isinstance(section, SamplingConfig) and not rolls_out else section


def _asks_people(sections: Mapping[str, Section]) -> bool:
    judges = [section for section in sections.values() if isinstance(section, JudgeConfig)]
    return any(judge.source == PEOPLE for judge in judges)


def _do(
    stage: Stage, spec: StageSpec, inputs: Mapping[str, Ref], given: Mapping[str, Path]
) -> None:
    kinds = spec.outputs + spec.optional_outputs
    outputs = {kind: stage.work / kind for kind in kinds}
    fetched = {role: stage.fetch(ref) for role, ref in inputs.items() if role not in given}
    report = stage.call({**fetched, **given}, outputs)
    stage.record(report)
    if isinstance(report.result, BaseModel):
        stage.keep(report.result)
    if (data := outputs.pop(tags.DATA, None)) is not None:
        stage.publish_data(data)
    milestones = _numbered("milestone", outputs.pop("milestones", None))
    made = {kind: path for kind, path in outputs.items() if kind in spec.outputs or path.exists()}
    if models := made | milestones:
        originals = {kind: cast(ModelRef, inputs[role]) for kind, role in report.copies.items()}
        stage.publish(models, copies=originals)


def _numbered(kind: str, folder: Path | None) -> dict[str, Path]:
    """The directories in a folder, whose names are iterations, by kind and number."""
    found = sorted(folder.iterdir()) if folder is not None and folder.exists() else []
    return {f"{kind}.{int(directory.name)}": directory for directory in found}


@stage_task("stage", "{name}")
def any_stage(
    name: str,
    config: Section,
    sections: Mapping[str, Section],
    inputs: Mapping[str, Ref],
    run: PipelineRun,
) -> StageOutputs:
    """Run a stage that has no task of its own; a row of the stage table is enough."""
    return do_stage(name, config, run, inputs=inputs, sections=sections, returns=lambda made: made)

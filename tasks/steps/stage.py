"""Any stage of the table as a run: what it reads is fetched, what it makes is published."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from rlhf_core.config import Section
from rlhf_core.stages.table import STAGES, StageSpec
from tasks.prefect.ui import stage_task
from tasks.record import tags
from tasks.record.record import Record
from tasks.record.stage import Stage, open_stage, open_training
from tasks.registry.refs import DatasetRef, ModelRef, PipelineRun, Ref

T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """What a stage has made, now or before."""

    models: Mapping[str, ModelRef]  # by kind; milestones as milestone.10
    data: DatasetRef | None
    result: Any  # of its report, of the type that the table names


def do_stage(
    name: str,
    config: Section,
    run: PipelineRun,
    *,
    inputs: Mapping[str, Ref],
    sections: Mapping[str, Section],
    returns: Callable[[Made], T],
) -> T:
    """Do a stage of the table, or find it done.

    Args:
        inputs: by role.
        sections: the settings that it shares with others; only those that it has are used.
        returns: what the caller wants of what was made.
    """
    spec = STAGES[name]
    common: dict[str, Any] = {
        "record": Record.open(patient=True),
        "config": spec.config.part_of(config),
        "extra_sections": {key: sections[key] for key in spec.sections},
        "run": run,
        "inputs": inputs,
    }
    if spec.trains:
        opened = open_training(name, **common)
    else:
        # What a file or a hub has may change: without inputs, other runs say nothing about now.
        common["reuse"] = "any" if inputs else "own"
        common["context"] = "training" if spec.outputs else "evaluation"
        opened = open_stage(name, **common)
    with opened as stage:
        if not stage.cached:
            _do(stage, spec, inputs)
        result = None if spec.result is None else stage.kept(spec.result)
        return stage.result(returns(Made(stage.models(), stage.dataset(), result)))


def _do(stage: Stage, spec: StageSpec, inputs: Mapping[str, Ref]) -> None:
    kinds = spec.outputs + spec.optional_outputs
    outputs = {kind: stage.work / kind for kind in kinds}
    report = stage.call({role: stage.fetch(ref) for role, ref in inputs.items()}, outputs)
    stage.record(report)
    if isinstance(report.result, BaseModel):
        stage.keep(report.result)
    if (data := outputs.pop(tags.DATA, None)) is not None:
        stage.publish_data(data)
    milestones = _numbered("milestone", outputs.pop("milestones", None))
    if models := outputs | milestones:
        stage.publish(models)


def _numbered(kind: str, folder: Path | None) -> dict[str, Path]:
    """The directories in a folder, which bear the numbers of iterations, by kind and number."""
    found = sorted(folder.iterdir()) if folder is not None and folder.exists() else []
    return {f"{kind}.{int(directory.name)}": directory for directory in found}


@stage_task("stage", "{name}")
def any_stage(
    name: str,
    config: Section,
    sections: Mapping[str, Section],
    inputs: Mapping[str, Ref],
    run: PipelineRun,
) -> Made:
    """A stage that has no task of its own: a row of the table is enough."""
    return do_stage(name, config, run, inputs=inputs, sections=sections, returns=lambda made: made)

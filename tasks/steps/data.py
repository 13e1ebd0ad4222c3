"""The data stage as a Prefect task."""

from typing import cast

from rlhf_core.errors import UserError
from rlhf_core.settings.data import SNAPSHOT, DataConfig, LengthLimits
from rlhf_core.settings.model import ModelConfig
from tasks.feedback.asking.pinning import pin, unpin
from tasks.feedback.asking.report import publish_report
from tasks.feedback.store.database import StoreError
from tasks.prefect.ui import stage_task
from tasks.record.record import Record
from tasks.registry.refs import DatasetRef, PipelineRun, Ref
from tasks.steps.stage import do_stage


@stage_task("prepare-data", "prepare data")
def prepare_data(
    config: DataConfig, model: ModelConfig, limits: LengthLimits, run: PipelineRun
) -> DatasetRef:
    """Check and split the data, and store them with the run.

    Votes of the preference store are read at the snapshot that is pinned in the run. Files and hubs
    may change, so data from there are reused by the same run only; the same votes are the same
    data, whoever reads them.
    """
    record = Record.open(patient=True)
    config, snapshot = pin(config, run, record)
    inputs: dict[str, Ref] = {} if snapshot is None else {SNAPSHOT: snapshot}
    try:
        data = do_stage(
            "prepare",
            config,
            run,
            inputs=inputs,
            sections={"model": model, "limits": limits},
            returns=lambda made: cast(DatasetRef, made.data),
            reuse="any" if snapshot is not None and not config.reads_files else "own",
        )
    except StoreError:
        raise
    except UserError:
        unpin(run, record)  # other votes may do
        raise
    if snapshot is not None:
        publish_report(snapshot, record)
    return data


@stage_task("pin-preferences", "pin the preferences")
def pin_preferences(config: DataConfig, run: PipelineRun) -> DataConfig:
    """The settings with the snapshot that all pipelines of a run read."""
    return pin(config, run, Record.open(patient=True))[0]

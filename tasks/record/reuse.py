"""Finds work to reuse: finished stages by their key, stopped runs by their working folder."""

import logging
from pathlib import Path

from mlflow.entities import Run

from tasks.prefect.ui import PrefectRun
from tasks.record import tags
from tasks.record.identity import Definition
from tasks.record.record import Record
from tasks.record.work_folder import abandoned_runs, empty, remember_run, remembered_run

SUSPENDED = "SCHEDULED"  # MLflow's status of a run that waits
log = logging.getLogger(__name__)


# ---- finished ----


def find_finished(record: Record, what: Definition, key: str, *, own: bool) -> Run | None:
    """A finished run of this stage whose outputs still exist, preferably of this pipeline run; with
    `own`, only of this pipeline run."""
    found = record.runs.finished(what.run.experiment_id, key)
    mine = [done for done in found if is_stage_of(done, what)]
    candidates = mine if own else [*mine, *found]
    return next((done for done in candidates if _is_whole(record, done)), None)


def is_stage_of(done: Run, what: Definition) -> bool:
    """Whether a run belongs to the same pipeline run as this stage."""
    return bool(done.data.tags[tags.PARENT_RUN] == what.run.run_id)


def _is_whole(record: Record, done: Run) -> bool:
    """Whether a run has outputs, and all of its models and data are still there."""
    made, outputs = tags.models(done.data.tags).values(), tags.outputs(done.data.tags)
    if (data := outputs.get(tags.DATA)) and record.runs.find_active(tags.run_of(data)) is None:
        return False
    return bool(outputs) and all(record.store.exists(model) for model in made)


def source_of(done: Run) -> str:
    """The id of the run that did the work."""
    return str(done.data.tags.get(tags.CACHED_FROM, done.info.run_id))


def tags_of_stand_in(done: Run) -> dict[str, str]:
    """The tags of a run that refers to `done` instead of running the stage."""
    made = {tags.output_of(kind): uri for kind, uri in tags.outputs(done.data.tags).items()}
    note = f"Reused from the run {source_of(done)}, which has the same settings, inputs and code."
    made |= tags.alarms(done.data.tags)
    if tags.output_of(tags.DATA) in made:
        made[tags.DATA_DIGEST] = done.data.tags[tags.DATA_DIGEST]
    return {**made, tags.CACHED_FROM: source_of(done), tags.DESCRIPTION: note}


def copy_summary(record: Record, done: Run, run_id: str) -> None:
    """Copy the summary metrics to the run that refers to `done`, so that runs can be compared."""
    numbers = {k: v for k, v in done.data.metrics.items() if k.startswith(tags.SUMMARY)}
    record.add_numbers(run_id, numbers)


# ---- stopped ----


def find_unfinished(record: Record, work: Path) -> Run | None:
    """The run that can be resumed in this folder; if there is none, the folder is emptied."""
    run = _remembered(record, work)
    if run is None:
        empty(work)
    return run


def unfinished_pipeline(
    record: Record, experiment: str, folder: Path, kind: str, caller: str = ""
) -> Run | None:
    """The pipeline run to resume: that of this Prefect run, else the one that the folder remembers.

    Args:
        caller: the flow run that calls this pipeline, and no other one. Prefect makes a new run of
            what it calls when it is repeated after a crash.

    The former is returned even if it has finished: a worker may have started it twice, and the
    second process must change nothing.
    """
    prefect = PrefectRun.current()
    if prefect is not None:
        run = record.runs.of_flow_run(experiment, prefect.flow_run_id, kind)
        if run is None and caller:
            run = record.runs.called_by(experiment, caller)
        if run is not None:
            return run
    left = _remembered(record, folder)
    if left is None or left.info.status != SUSPENDED:
        return left
    # A run that Prefect suspended belongs to the flow run that will be resumed.
    return left if tags.BY_COMMAND in left.data.tags else None


def _remembered(record: Record, folder: Path) -> Run | None:
    """The run that a folder remembers, unless it has finished."""
    if (run_id := remembered_run(folder)) is None:
        return None
    run = record.runs.find_active(run_id)
    return run if run is not None and run.info.status != "FINISHED" else None


def new_run(record: Record, what: Definition, work: Path) -> str:
    """Create a run of a stage, and write its id to the folder."""
    name = f"{what.name}-seed-{what.seed}"
    run_id = str(record.client.create_run(what.run.experiment_id, run_name=name).info.run_id)
    remember_run(work, run_id)
    return run_id


def find_waiting(record: Record, what: Definition, key: str) -> Run | None:
    """The run of this stage that waits for people, on whatever machine it began."""
    return next(
        (
            run
            for run in record.runs.of_key(what.run.experiment_id, key)
            if is_stage_of(run, what) and run.info.status == SUSPENDED
        ),
        None,
    )


def reopen(record: Record, run: Run) -> None:
    """Set a stopped run to RUNNING, and remove its error."""
    run_id, run_tags = run.info.run_id, run.data.tags
    log.info("resuming the run %s, which was stopped", run_id)
    record.client.update_run(run_id, status="RUNNING")
    record.client.set_tag(run_id, tags.RESUMED, str(int(run_tags.get(tags.RESUMED, "0")) + 1))
    for passed in (tags.ERROR, tags.WAITS_FOR, tags.BY_COMMAND):
        if passed in run_tags:
            record.client.delete_tag(run_id, passed)


def unpublish(record: Record, run_id: str) -> None:
    """Delete the versions that a run registered."""
    record.store.delete_of_run(run_id)
    for kind in tags.models(record.runs.tags(run_id)):
        record.client.delete_tag(run_id, tags.output_of(kind))


def close_abandoned(record: Record) -> None:
    """Close runs whose process was killed; MLflow would show them as running for ever."""
    for run_id in abandoned_runs(record.settings.home / "work"):
        run = record.runs.find_active(run_id)
        if run is not None and run.info.status == "RUNNING":
            record.client.set_tag(run_id, tags.ERROR, "its process was killed")
            record.client.set_terminated(run_id, "KILLED")

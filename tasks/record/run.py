"""The MLflow run of a whole pipeline, and how a run is closed."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient
from pydantic import BaseModel

from rlhf_core.errors import VerdictsPendingError
from rlhf_core.redaction import masked
from tasks.prefect import ui
from tasks.record import tags
from tasks.record.describe import ensure_experiment, origin, write_settings
from tasks.record.identity import code_identity, short_digest
from tasks.record.record import Record
from tasks.record.reuse import SUSPENDED, close_abandoned, reopen, unfinished_pipeline
from tasks.record.work_folder import remember_run, work_folder
from tasks.registry.refs import PipelineRun
from tasks.settings import Settings

ERROR_LENGTH = 5000


@contextmanager
def open_run(
    project: str,
    config: BaseModel,
    seed: int,
    *,
    force: Collection[str] = (),
    parent: str = "",
    kind: str = tags.PIPELINE,
    settings: Settings | None = None,
) -> Iterator[PipelineRun]:
    """Open the MLflow run of a pipeline; it ends FINISHED, FAILED or KILLED as the block does.

    An unfinished run is resumed by the same Prefect run, or by a call with the same settings, seed
    and code under the same home. A concurrent caller blocks.

    Args:
        force: stages to run again even if a result can be reused.
        parent: the MLflow run that this one belongs to.
        kind: the kind of the run, written as a tag.
        settings: default to those of the environment.
    """
    record = Record.open(settings, patient=True)
    client, settings = record.client, record.settings
    experiment = ensure_experiment(client, project, settings)
    close_abandoned(record)
    with work_folder(_folder(project, config, seed, settings), kept=True) as folder:
        caller = "" if parent or kind != tags.PIPELINE else ui.calling_flow_run()
        left = unfinished_pipeline(record, experiment, folder, kind, caller)
        if left is None:
            name = ui.current_flow_run_name() or f"{project}-seed-{seed}"
            run_id = str(client.create_run(experiment, run_name=name).info.run_id)
            remember_run(folder, run_id)
        else:
            run_id = left.info.run_id
            reopen(record, left)
        run = PipelineRun(
            project=project,
            run_id=run_id,
            experiment_id=experiment,
            seed=seed,
            force=tuple(sorted(force)),
        )
        run_tags = {tags.STAGE: kind, **origin(seed, settings)}
        run_tags |= {tags.PARENT_RUN: parent} if parent else {}
        run_tags |= {tags.CALLER: caller} if caller else {}
        with close_run_on_exit(client, run_id):
            record.add_tags(run_id, run_tags)
            write_settings(record, run_id, config.model_dump(mode="json"), seed)
            yield run


def mark_for_resume(
    project: str, config: BaseModel, seed: int, run_id: str, settings: Settings
) -> None:
    """Make `open_run` resume this run when it is called with the same arguments."""
    folder = _folder(project, config, seed, settings)
    folder.mkdir(parents=True, exist_ok=True)
    remember_run(folder, run_id)


def _folder(project: str, config: BaseModel, seed: int, settings: Settings) -> Path:
    facts = {
        "project": project,
        "seed": seed,
        "settings": config.model_dump(mode="json"),
        "code": code_identity()[tags.CODE_DIGEST],
    }
    return settings.home / "work" / f"pipeline-{short_digest(facts)}"


@contextmanager
def close_run_on_exit(
    client: MlflowClient, run_id: str, undo: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Close a run with the status that the end of the block implies.

    Args:
        undo: is called before the run is closed as FAILED or KILLED.
    """
    try:
        yield
        client.set_terminated(run_id, "FINISHED")
    except ui.SUSPENSION:  # it is resumed once a person answers
        client.update_run(run_id, status=SUSPENDED)
        raise
    except VerdictsPendingError as waiting:
        client.set_tag(run_id, tags.WAITS_FOR, waiting.short)
        client.set_tag(run_id, tags.BY_COMMAND, tags.flag(True))
        client.update_run(run_id, status=SUSPENDED)
        raise
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        message = masked(f"{type(error).__name__}: {error}")[:ERROR_LENGTH]
        for step in (
            undo,
            lambda: client.set_tag(run_id, tags.ERROR, message),
            lambda: client.set_terminated(run_id, status),
        ):
            try:
                step()
            except Exception as trouble:
                error.add_note(f"while the run {run_id} was closed as {status}: {trouble}")
        raise

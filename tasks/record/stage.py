"""A stage as a run: opened before the work, described while it lasts, closed in every case.

    with open_run("demo", config, seed=0) as run:
        with open_training("sft", config=config.sft, run=run, inputs={"data": data}) as stage:
            if not stage.cached:
                output = stage.work / "sft"
                stage.record(stage.train({"data": stage.fetch(data), "output": output}))
                stage.publish({"sft": output})
            return stage.result(stage.model("sft"))

What a stage is, its key, is a digest of its settings, seed, code and the content of its inputs. A
stage that was finished before under the same key is not done again: it is `cached`, and what it
made is taken from the registry. A training that was stopped, or whose process was killed, leaves
its folder and its MLflow run as they were; whoever opens the same training again goes on in both,
and who comes while another process works on it waits. MLflow's active run is never used: it belongs
to a thread.
"""

import hashlib
import io
import json
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd
import yaml
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    LoggedModelOutput,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, TypeAdapter

from rlhf_core import launch
from rlhf_core.errors import ConfigError
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.recovery import NO_RECOVERY, Recovery
from rlhf_core.types import Report
from tasks.prefect import events, ui
from tasks.prefect.accelerator import accelerator
from tasks.prefect.ui import ArtifactDisplay, PrefectRun, artifact_key
from tasks.record.identity import code_identity, stage_code
from tasks.record.tracking import Display, MlflowLogger, TerminalDisplay, connect, logged_metrics
from tasks.record.work_folder import (
    CHECKPOINTS,
    INPUTS,
    abandoned_runs,
    empty,
    remember_run,
    remembered_run,
    sweep,
    work_folder,
)
from tasks.registry.model_store import (
    DIGEST_TAG,
    LOGGED_MODEL_TAG,
    DatasetRef,
    MlflowModelStore,
    ModelRef,
    PipelineRun,
    Ref,
    fetch_dataset,
    store_dataset,
)
from tasks.settings import Settings, read_settings

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
log = logging.getLogger(__name__)

KEY, CACHED_FROM, FLOW_RUN = "stage_key", "cached_from", "prefect.flow_run_id"  # tags
SUSPENDED = "SCHEDULED"  # what MLflow calls a run that waits
RESULT = "result.json"
PARAM_LENGTH = 6000  # what MLflow takes; the whole value is in config.yaml
ERROR_LENGTH = 5000


@dataclass(frozen=True)
class Stage:
    """What the code between opening and closing a stage works with."""

    name: str
    run: PipelineRun
    run_id: str
    work: Path
    recovery: Recovery  # of a training; it saves nothing in other stages
    logger: MlflowLogger
    cached: bool  # done before, by another run or by this one; nothing is left to do
    _sections: Mapping[str, BaseModel]
    _settings: Settings
    _client: MlflowClient
    _store: MlflowModelStore
    _version_tags: Mapping[str, str]
    _in_prefect: bool

    def model(self, kind: str) -> ModelRef:
        """The version that this stage has made, now or before."""
        return ModelRef.parse(self._tags()[f"output.{kind}"])

    def dataset(self) -> DatasetRef:
        """The data that this stage has prepared, now or before."""
        tags = self._tags()
        return DatasetRef(run_id=tags["output.data"].split("/")[1], digest=tags["data_digest"])

    def keep(self, value: BaseModel) -> None:
        """Store a small result with the run."""
        self._client.log_text(self.run_id, value.model_dump_json(indent=2), RESULT)
        self._tag({"output.result": f"runs:/{self.run_id}/{RESULT}"})

    def kept(self, kind: type[M]) -> M:
        """The small result that this stage has stored, now or before."""
        run_id = self._tags()["output.result"].split("/")[1]
        with tempfile.TemporaryDirectory() as folder:
            path = self._client.download_artifacts(run_id, RESULT, folder)
            return kind.model_validate_json(Path(path).read_text(encoding="utf-8"))

    def result(self, value: T) -> T:
        """What a task returns; where Prefect looks on, a cached stage is shown as that."""
        if not self.cached:
            return value
        source = self._tags().get(CACHED_FROM, self.run_id)
        return ui.as_cached(value, f"done before, by the MLflow run {source}")

    def _tags(self) -> dict[str, str]:
        return dict(self._client.get_run(self.run_id).data.tags)

    def fetch(self, ref: ModelRef | DatasetRef) -> Path:
        """The files that a reference means, in the working folder."""
        self.logger.phase(f"fetching {ref.uri}")
        if isinstance(ref, DatasetRef):
            to = self.work / INPUTS / f"data-{ref.digest}"
            return to if to.exists() else fetch_dataset(self._client, ref, to)
        to = self.work / INPUTS / f"{ref.name}-{ref.version}"
        return to if to.exists() else self._store.fetch(ref, to)

    def train(
        self, paths: Mapping[str, Path], reward_models: Mapping[str, Path] | None = None
    ) -> Report:
        """Run the training that this stage is named after, from its last checkpoint on.

        `RLHF_PROCESSES` share the work, and the numbers are the same up to rounding. One alone is
        this one.

        Args:
            paths: what the training reads and writes, by the parameters of its function.
            reward_models: directories, by their source.
        """
        job = launch.Job.model_validate(
            {
                "stage": self.name,
                "sections": {name: _of_core(section) for name, section in self._sections.items()},
                "paths": paths,
                "reward_models": reward_models or {},
                "seed": self.run.seed,
                "device": self._settings.training_device,
                "checkpoints": self.recovery.directory,
                "every_seconds": self.recovery.every_seconds,
                "strategy": self._settings.strategy,
                "processes": self._settings.processes,
            }
        )
        self.logger.phase("waiting for a place at the accelerator")
        with accelerator():
            if job.processes == 1:
                return launch.run(job, self.logger, Ranks(), job.device)
            self.logger.phase(f"starting {job.processes} processes")
            return launch.launch(job, self.logger)

    def record(self, report: Report) -> None:
        """Store a report with the run: `summary/` metrics, `tables/` and `figures/`."""
        self.logger.phase("storing the report")
        summary = report.summary()
        self.logger.metrics({f"summary/{name}": value for name, value in summary.items()}, step=0)
        for name, table in report.tables.items():
            self._log_table(table, f"tables/{name}.json")
        images = {name: _png(figure) for name, figure in report.figures.items()}
        for name, png in images.items():
            self._log_file(png, f"figures/{name}.png")
        if self._in_prefect:
            self._show(summary, report.tables, images)

    def publish(self, models: Mapping[str, Path]) -> dict[str, ModelRef]:
        """Register model directories as the next versions of `<project>-<kind>`.

        All are uploaded and checked before the first is registered.
        """
        names = {kind: f"{self.run.project}-{kind}" for kind in models}
        uploads = {}
        for kind, path in models.items():
            self.logger.phase(f"uploading and checking {names[kind]}")
            uploads[kind] = self._store.upload(path, names[kind], run_id=self.run_id)
        outputs = [LoggedModelOutput(upload.id, step=0) for upload in uploads.values()]
        self._client.log_outputs(self.run_id, outputs)
        tags = {**self._version_tags, "run_id": self.run_id}
        refs = {
            kind: self._store.register(upload, tags={**tags, "kind": kind})
            for kind, upload in uploads.items()
        }
        self._tag({f"output.{kind}": ref.uri for kind, ref in refs.items()})
        log.info("registered %s", ", ".join(ref.uri for ref in refs.values()))
        return refs

    def publish_data(self, directory: Path) -> DatasetRef:
        """Store prepared data with the run."""
        self.logger.phase("uploading and checking the data")
        ref = store_dataset(self._client, self.run_id, directory)
        self._tag({"output.data": ref.uri, "data_digest": ref.digest})
        return ref

    def _tag(self, tags: Mapping[str, str]) -> None:
        self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def _log_file(self, content: bytes, artifact: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, Path(artifact).name)
            path.write_bytes(content)
            self._client.log_artifact(self.run_id, str(path), str(Path(artifact).parent))

    def _log_table(self, table: pd.DataFrame, artifact: str) -> None:
        # As `log_table` writes it, which warns about the strings of pandas 3: the tag makes the
        # page of the run show it.
        content = table.to_json(orient="split", index=False, date_format="iso")
        self._log_file(str(content).encode(), artifact)
        tags = self._client.get_run(self.run_id).data.tags
        shown = json.loads(tags.get("mlflow.loggedArtifacts", "[]"))
        if (entry := {"path": artifact, "type": "table"}) not in shown:
            self._tag({"mlflow.loggedArtifacts": json.dumps([*shown, entry])})

    def _show(
        self,
        summary: Mapping[str, float],
        tables: Mapping[str, pd.DataFrame],
        images: Mapping[str, bytes],
    ) -> None:
        title = f"{self.run.project} {self.name}"
        numbers = [round(value, 4) for value in summary.values()]
        rows = pd.DataFrame({"metric": list(summary), "value": numbers})
        for name, table in {"summary": rows, **tables}.items():
            if table.empty:
                continue
            key = artifact_key(self.run.project, self.name, name)
            ui.show_table(key, table, f"{title}: {name}")
        if images:
            key = artifact_key(self.run.project, self.name, "figures")
            ui.show_figures(key, images, f"{title}: figures")


@contextmanager
def open_run(
    project: str,
    config: BaseModel,
    seed: int,
    *,
    force: Collection[str] = (),
    parent: str = "",
    kind: str = "pipeline",
    settings: Settings | None = None,
) -> Iterator[PipelineRun]:
    """The MLflow run of a whole pipeline. It ends FINISHED, FAILED or KILLED as the block does.

    One that did not finish goes on when the same is asked for again: by the same Prefect run, or
    with the same settings, seed and code under the same home. Who comes while it runs waits.

    Args:
        force: stages to do again even if they were done before.
        parent: an MLflow run that this one belongs to.
        kind: what it is, as a tag.
    """
    settings = settings or read_settings()
    client = connect(settings, patience=settings.outage_seconds)
    experiment = ensure_experiment(client, project, settings)
    name = ui.run_name() or f"{project}-seed-{seed}"
    close_abandoned(client, settings)
    with work_folder(_pipeline_folder(project, config, seed, settings), kept=True) as folder:
        left = _unfinished_pipeline(client, experiment, folder, kind)
        if left is None:
            run_id = str(client.create_run(experiment, run_name=name).info.run_id)
            remember_run(folder, run_id)
        else:
            run_id = left.info.run_id
            _reopen(client, left)
        run = PipelineRun(
            project=project,
            run_id=run_id,
            experiment_id=experiment,
            seed=seed,
            force=tuple(sorted(force)),
        )
        tags = {"seed": str(seed), "stage": kind, **_origin(settings)}
        tags |= {"mlflow.parentRunId": parent} if parent else {}
        with _closing_run(client, run_id):
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
            _log_settings(client, run_id, config.model_dump(mode="json"), seed)
            yield run


def mark_for_resume(
    project: str, config: BaseModel, seed: int, run_id: str, settings: Settings
) -> None:
    """Make `open_run` go on with this run when it is asked for the same."""
    folder = _pipeline_folder(project, config, seed, settings)
    folder.mkdir(parents=True, exist_ok=True)
    remember_run(folder, run_id)


@contextmanager
def open_stage(
    name: str,
    *,
    config: BaseModel,
    run: PipelineRun,
    inputs: Mapping[str, Ref],
    beside: Mapping[str, BaseModel] = {},
    context: Literal["training", "evaluation"] = "training",
    reuse: Literal["no", "own", "any"] = "no",
    settings: Settings | None = None,
) -> Iterator[Stage]:
    """A child run of `run`, with a fresh working folder that is gone afterwards.

    The run ends FINISHED; FAILED with the tag `error` when the block raises; KILLED when it is
    interrupted or cancelled. In the last two cases no version that it registered is left.

    Args:
        beside: other settings that its result depends on.
        reuse: whether it may be `cached`, as a stage of this pipeline's run or of any.
    """
    settings = settings or read_settings()
    folder = work_folder(settings.home / "work" / f"{name}-{uuid.uuid4().hex[:16]}", kept=False)
    sections = {name: config, **beside}
    with _open(name, sections, run, inputs, context, settings, folder, reuse) as stage:
        yield stage


@contextmanager
def open_training(
    name: str,
    *,
    config: BaseModel,
    beside: Mapping[str, BaseModel],
    run: PipelineRun,
    inputs: Mapping[str, Ref],
    settings: Settings | None = None,
) -> Iterator[Stage]:
    """The same for a stage that can go on where it was stopped, or where its process was killed.

    Its folder stays until the block succeeds. Opened again with the same settings (`config` and
    those `beside` it), seed, code and inputs of the same content, it has what is there, and the
    MLflow run of then goes on as a child of `run`: no value is logged twice and none is missing. A
    process that finds the folder in use waits until it is free, and then mostly finds that the
    stage is done.
    """
    settings = settings or read_settings()
    sections = {name: config, **beside}
    client = connect(settings, patience=settings.outage_seconds)
    key = _key(name, sections, run, inputs, MlflowModelStore(client))
    folder = work_folder(settings.home / "work" / f"{name}-{key}", kept=True)
    with _open(name, sections, run, inputs, "training", settings, folder, "any") as stage:
        directory, seconds = stage.work / CHECKPOINTS, settings.checkpoint_seconds
        yield replace(stage, recovery=Recovery(directory, every_seconds=seconds))


@contextmanager
def _open(
    name: str,
    sections: Mapping[str, BaseModel],
    run: PipelineRun,
    inputs: Mapping[str, Ref],
    context: str,
    settings: Settings,
    folder: AbstractContextManager[Path],
    reuse: str,
) -> Iterator[Stage]:
    client = connect(settings, patience=settings.outage_seconds)
    store = MlflowModelStore(client)
    in_prefect = PrefectRun.current() is not None
    key = _key(name, sections, run, inputs, store)
    origin = {"seed": str(run.seed), **_origin(settings), **_data_digest(inputs)}
    sources = {f"input.{role}": ref.uri for role, ref in inputs.items()}
    tags = {"mlflow.parentRunId": run.run_id, "stage": name, KEY: key, **origin, **sources}
    content = {key: section.model_dump(mode="json") for key, section in sections.items()}
    sweep(settings.home / "work", settings.keep_work_days)
    with ExitStack() as stack:
        if in_prefect:
            ui.forward_logs()
        work = stack.enter_context(folder)
        opened = partial(
            Stage,
            name=name,
            run=run,
            work=work,
            recovery=NO_RECOVERY,
            _sections=sections,
            _settings=settings,
            _client=client,
            _store=store,
            _version_tags={**origin, **_parents(inputs), "pipeline_run_id": run.run_id},
            _in_prefect=in_prefect,
        )
        describe = partial(_describe, client, store, content=content, seed=run.seed)
        done = _finished(client, store, key, run, own=reuse == "own" or name in run.force)
        if done is not None and reuse != "no":
            run_id = done.info.run_id
            if done.data.tags["mlflow.parentRunId"] != run.run_id:
                run_id = _new_run(client, name, run, work)
                describe(run_id, tags={**tags, **_stands_for(done)}, inputs=inputs, context=context)
                _copy_summary(client, done, run_id)
                client.set_terminated(run_id, "FINISHED")
            log.info("%s was done before, by the run %s", name, _source(done))
            logger = stack.enter_context(closing(MlflowLogger(client, run_id)))
            yield opened(run_id=run_id, logger=logger, cached=True)
            return
        left = _unfinished(client, work)
        run_id = _new_run(client, name, run, work) if left is None else left.info.run_id
        stack.enter_context(events.announced(client, run, name, run_id))
        stack.enter_context(_closing_run(client, run_id, lambda: _unpublish(client, store, run_id)))
        if left is not None:
            _reopen(client, left)
            _unpublish(client, store, run_id)
        displays = _displays(name, run, run_id, settings, in_prefect=in_prefect)
        logger = stack.enter_context(_logger(client, run_id, displays))
        describe(run_id, tags=tags, inputs=inputs, context=context)
        yield opened(run_id=run_id, logger=logger, cached=False)


def ensure_experiment(client: MlflowClient, project: str, settings: Settings) -> str:
    """The id of the experiment named after the project; several processes may ask at once.

    Raises: ConfigError when the experiment was deleted.
    """
    found = client.get_experiment_by_name(project)
    if found is None:
        root = settings.artifact_root
        location = None if root is None else (root / project).as_uri()
        try:
            return str(client.create_experiment(project, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(project)
    if found is None or found.lifecycle_stage != "active":
        raise ConfigError(
            f"the MLflow experiment '{project}' was deleted; restore it there, or choose another "
            "project name"
        )
    return str(found.experiment_id)


def run_url(run_id: str, experiment_id: str, settings: Settings) -> str:
    """The page of an MLflow run, in the view that shows training."""
    page = f"{settings.mlflow_public_url}/#/experiments/{experiment_id}/runs/{run_id}"
    return f"{page}?workflowType=machine_learning"


def _origin(settings: Settings) -> dict[str, str]:
    prefect = PrefectRun.current()
    links = prefect.tags(settings.prefect_public_url) if prefect else {}
    return {**code_identity(), **links}


def _key(
    name: str,
    sections: Mapping[str, BaseModel],
    run: PipelineRun,
    inputs: Mapping[str, Ref],
    store: MlflowModelStore,
) -> str:
    """What a stage is, in 16 hex digits: equal keys lead to equal bits."""
    # `reuse` says that nothing is trained, which is no setting of a training.
    settings = {
        key: section.model_dump(mode="json", exclude={"reuse"}) for key, section in sections.items()
    }
    facts = {
        "stage": name,
        "project": run.project,
        "seed": run.seed,
        "settings": settings,
        "inputs": {role: _content(ref, store) for role, ref in inputs.items()},
        "code": stage_code(name, settings),
    }
    return _short_digest(facts)


def _short_digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _content(ref: Ref, store: MlflowModelStore) -> str:
    """The digest of what a reference leads to: a version that was trained again has the same."""
    if isinstance(ref, DatasetRef):
        return ref.digest
    assert isinstance(ref, ModelRef)
    return store.tags(ref).get(DIGEST_TAG, ref.uri)


def _pipeline_folder(project: str, config: BaseModel, seed: int, settings: Settings) -> Path:
    facts = {
        "project": project,
        "seed": seed,
        "settings": config.model_dump(mode="json"),
        "code": code_identity()["code_digest"],
    }
    return settings.home / "work" / f"pipeline-{_short_digest(facts)}"


def _unfinished_pipeline(
    client: MlflowClient, experiment: str, folder: Path, kind: str
) -> Run | None:
    """The pipeline run that can go on: that of this Prefect run, or the one of the folder.

    The former also when it has finished: a worker may have started a run twice, and the second
    process should change nothing.
    """
    prefect = PrefectRun.current()
    if prefect is not None:
        condition = f"tags.`{FLOW_RUN}` = '{prefect.flow_run_id}' and tags.stage = '{kind}'"
        for run in client.search_runs([experiment], condition):
            return run
    left = _remembered(client, folder)
    # One that is suspended belongs to the Prefect run that will be resumed.
    return left if left is not None and left.info.status != SUSPENDED else None


def _unfinished(client: MlflowClient, work: Path) -> Run | None:
    """The run that can go on in a folder; the folder is empty when there is none."""
    run = _remembered(client, work)
    if run is None:
        empty(work)
    return run


def _remembered(client: MlflowClient, folder: Path) -> Run | None:
    """The run that a folder remembers, unless it has finished."""
    if (run_id := remembered_run(folder)) is None:
        return None
    run = _run_if_there(client, run_id)
    return run if run is not None and run.info.status != "FINISHED" else None


def _run_if_there(client: MlflowClient, run_id: str) -> Run | None:
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def close_abandoned(client: MlflowClient, settings: Settings) -> None:
    """End the runs whose process was killed, and could not: in MLflow they would run for ever."""
    for run_id in abandoned_runs(settings.home / "work"):
        run = _run_if_there(client, run_id)
        if run is not None and run.info.status == "RUNNING":
            client.set_tag(run_id, "error", "its process was killed")
            client.set_terminated(run_id, "KILLED")


def _new_run(client: MlflowClient, name: str, run: PipelineRun, work: Path) -> str:
    made = client.create_run(run.experiment_id, run_name=f"{name}-seed-{run.seed}")
    remember_run(work, made.info.run_id)
    return str(made.info.run_id)


def _reopen(client: MlflowClient, run: Run) -> None:
    """Make a run that was stopped one that runs, without an error."""
    run_id, tags = run.info.run_id, run.data.tags
    log.info("going on with the run %s, which was stopped", run_id)
    client.update_run(run_id, status="RUNNING")
    client.set_tag(run_id, "resumed", str(int(tags.get("resumed", "0")) + 1))
    if "error" in tags:
        client.delete_tag(run_id, "error")


def _finished(
    client: MlflowClient, store: MlflowModelStore, key: str, run: PipelineRun, *, own: bool
) -> Run | None:
    """A run that has done this stage, and whose outputs are still there: if possible one of this
    pipeline run, with `own` no other."""
    condition = f"tags.{KEY} = '{key}' and attributes.status = 'FINISHED'"
    found = client.search_runs([run.experiment_id], condition)
    mine = [done for done in found if done.data.tags["mlflow.parentRunId"] == run.run_id]
    candidates = mine if own else [*mine, *found]
    return next((done for done in candidates if _is_whole(store, done)), None)


def _is_whole(store: MlflowModelStore, done: Run) -> bool:
    """Whether a run has made something, and every model of that is still registered."""
    outputs = [uri for tag, uri in done.data.tags.items() if tag.startswith("output.")]
    models = [ModelRef.parse(uri) for uri in outputs if uri.startswith("models:/")]
    return bool(outputs) and all(store.exists(model) for model in models)


def _source(done: Run) -> str:
    return str(done.data.tags.get(CACHED_FROM, done.info.run_id))


def _stands_for(done: Run) -> dict[str, str]:
    """The tags of a run that stands for one that has done its work before."""
    outputs = {tag: uri for tag, uri in done.data.tags.items() if tag.startswith("output.")}
    note = f"Not done again: the same was done by the run {_source(done)}."
    return {**outputs, CACHED_FROM: _source(done), "mlflow.note.content": note}


def _copy_summary(client: MlflowClient, done: Run, run_id: str) -> None:
    """The closing numbers of a run also to the one that stands for it, so that they compare."""
    now = int(time.time() * 1000)
    numbers = {k: v for k, v in done.data.metrics.items() if k.startswith("summary/")}
    client.log_batch(run_id, metrics=[Metric(k, v, now, 0) for k, v in numbers.items()])


def _describe(
    client: MlflowClient,
    store: MlflowModelStore,
    run_id: str,
    *,
    tags: Mapping[str, str],
    content: Mapping[str, Any],
    seed: int,
    inputs: Mapping[str, Ref],
    context: str,
) -> None:
    """Write to a run what it is."""
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    _log_settings(client, run_id, content, seed)
    _log_inputs(client, store, run_id, inputs, context)


def _parents(inputs: Mapping[str, Ref]) -> dict[str, str]:
    models = {role: ref for role, ref in inputs.items() if isinstance(ref, ModelRef)}
    return {f"parent.{role}": ref.uri for role, ref in models.items()}


def _data_digest(inputs: Mapping[str, Ref]) -> dict[str, str]:
    digests = {ref.digest for ref in inputs.values() if isinstance(ref, DatasetRef)}
    return {"data_digest": ", ".join(sorted(digests))} if digests else {}


@contextmanager
def _closing_run(
    client: MlflowClient, run_id: str, undo: Callable[[], None] = lambda: None
) -> Iterator[None]:
    try:
        yield
        client.set_terminated(run_id, "FINISHED")
    except ui.SUSPENSION:  # goes on when somebody has answered
        client.update_run(run_id, status=SUSPENDED)
        raise
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        message = f"{type(error).__name__}: {error}"[:ERROR_LENGTH]
        for step in (
            undo,
            lambda: client.set_tag(run_id, "error", message),
            lambda: client.set_terminated(run_id, status),
        ):
            try:
                step()
            except Exception as trouble:
                error.add_note(f"while the run {run_id} was closed as {status}: {trouble}")
        raise


def _unpublish(client: MlflowClient, store: MlflowModelStore, run_id: str) -> None:
    store.delete_of_run(run_id)
    for name, value in client.get_run(run_id).data.tags.items():
        if name.startswith("output.") and value.startswith("models:/"):
            client.delete_tag(run_id, name)


@contextmanager
def _logger(client: MlflowClient, run_id: str, displays: list[Display]) -> Iterator[MlflowLogger]:
    logger = MlflowLogger(client, run_id, displays, logged=logged_metrics(client, run_id))
    try:
        yield logger
    except BaseException as error:
        try:
            logger.close()
        except Exception as trouble:
            error.add_note(str(trouble))
        raise
    logger.close()


def _of_core(section: BaseModel) -> Any:
    """The settings that the core knows; a subclass of the pipeline may have others beside them."""
    kind = next(base for base in type(section).__mro__ if base.__module__.startswith("rlhf_core."))
    settings: TypeAdapter[Any] = TypeAdapter(kind)
    return settings.dump_python(section)


def _displays(
    name: str, run: PipelineRun, run_id: str, settings: Settings, *, in_prefect: bool
) -> list[Display]:
    if not in_prefect:
        return [TerminalDisplay(name)]
    title = f"{run.project} {name}"
    url = run_url(run_id, run.experiment_id, settings)
    ui.show_link(artifact_key(run.project, name, "mlflow"), url, f"{title} in MLflow")
    key = artifact_key(run.project, name, "progress")
    return [TerminalDisplay(name), ArtifactDisplay(key, title)]


def _log_settings(client: MlflowClient, run_id: str, content: Mapping[str, Any], seed: int) -> None:
    """Settings as `config.yaml` and as parameters, which a run that goes on has already."""
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    client.log_text(run_id, text, "config.yaml")
    params = {**flatten(content), "seed": str(seed)}
    known = client.get_run(run_id).data.params
    if differing := sorted(name for name in known if params.get(name) != known[name]):
        raise ConfigError(
            f"the run {run_id}, which was to go on, has another {differing[0]} "
            f"({known[differing[0]]}); delete that run in MLflow to start from the beginning"
        )
    new = [Param(name, value) for name, value in params.items() if name not in known]
    client.log_batch(run_id, params=new)


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: `ppo.kl_coef`; a long value is cut, and says so."""
    flat: dict[str, str] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        flat[prefix + name] = text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 1] + "…"
    return flat


def _log_inputs(
    client: MlflowClient,
    store: MlflowModelStore,
    run_id: str,
    inputs: Mapping[str, Ref],
    context: str,
) -> None:
    known = {model.model_id for model in client.get_run(run_id).inputs.model_inputs}
    data = [ref for ref in inputs.values() if isinstance(ref, DatasetRef)]
    tags = [store.tags(ref) for ref in inputs.values() if isinstance(ref, ModelRef)]
    models = {found[LOGGED_MODEL_TAG] for found in tags if LOGGED_MODEL_TAG in found}
    client.log_inputs(
        run_id,
        datasets=[_dataset_input(ref, context) for ref in data],
        models=[LoggedModelInput(model) for model in sorted(models - known)],
    )


def _dataset_input(ref: DatasetRef, context: str) -> DatasetInput:
    source = json.dumps({"uri": ref.uri})
    dataset = Dataset("prepared-data", ref.digest, source_type="mlflow_run", source=source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    return buffer.getvalue()

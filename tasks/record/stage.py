"""A stage as an MLflow run: opened before the work, described during it, and always closed.

    record = Record.open(patient=True)
    inputs = {"data": data}
    with open_training("sft", record=record, config=config.sft, run=run, inputs=inputs) as stage:
        if not stage.cached:
            output = {"sft": stage.work / "sft"}
            stage.record(stage.call({"data": stage.fetch(data)}, output))
            stage.publish(output)
        return stage.result(stage.models()["sft"])

The key of a stage is a digest of its settings, seed, code and the content of its inputs. A stage
that finished before under the same key is `cached`: it does not run again, and its outputs are
taken from the registry. A training that was stopped or killed leaves its folder and its MLflow run
in place. Opening the same training again resumes both; a second process blocks until the first is
done. MLflow's active run is never used, because it is local to a thread.
"""

import logging
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, cast

from mlflow.entities import LoggedModelOutput, Run
from pydantic import BaseModel

from rlhf_core import launch
from rlhf_core.config import Section
from rlhf_core.errors import VerdictsPendingError
from rlhf_core.settings.judge import JudgeConfig
from rlhf_core.stages.table import STAGES, run_stage
from rlhf_core.training.recovery import NO_RECOVERY, Recovery
from rlhf_core.types import Report
from rlhf_core.work import Work
from tasks.engines.place import engine_place
from tasks.judges.judging import MlflowJudging
from tasks.prefect import events, ui
from tasks.prefect.accelerator import accelerator
from tasks.prefect.ui import ArtifactDisplay, PrefectRun, artifact_key
from tasks.record import tags
from tasks.record.describe import describe, run_tags, run_url, version_tags
from tasks.record.identity import Definition
from tasks.record.logger import MlflowLogger
from tasks.record.record import Record
from tasks.record.report import store_report
from tasks.record.reuse import (
    copy_summary,
    find_finished,
    find_unfinished,
    find_waiting,
    is_stage_of,
    new_run,
    reopen,
    source_of,
    tags_of_stand_in,
    unpublish,
)
from tasks.record.run import close_run_on_exit
from tasks.record.terminal import Display, TerminalDisplay
from tasks.record.work_folder import (
    ANSWERS,
    CHECKPOINTS,
    INPUTS,
    remember_run,
    sweep,
    work_folder,
)
from tasks.registry.datasets import fetch_dataset, store_dataset
from tasks.registry.files import staged
from tasks.registry.refs import DatasetRef, ModelRef, PipelineRun, Ref, SnapshotRef
from tasks.reward_places import reward_places
from tasks.settings import Settings

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
log = logging.getLogger(__name__)

RESULT = "result.json"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """An open stage: what its code works with until it is closed."""

    run_id: str
    work: Path
    logger: MlflowLogger
    cached: bool  # it finished before, in this run or another; there is nothing to do
    recovery: Recovery = NO_RECOVERY  # of a training; other stages save no checkpoints
    waits: bool = False  # for people, who judge its answers
    _what: Definition
    _record: Record

    @property
    def name(self) -> str:
        """The name of the stage."""
        return self._what.name

    @property
    def run(self) -> PipelineRun:
        """The pipeline run that the stage belongs to."""
        return self._what.run

    @property
    def _sections(self) -> Mapping[str, Section]:
        return cast(Mapping[str, Section], self._what.sections)  # as in the stage table

    @property
    def _settings(self) -> Settings:
        return self._record.settings

    def models(self) -> dict[str, ModelRef]:
        """The versions that this stage made, now or before, by kind."""
        return tags.models(self._tags())

    def dataset(self) -> DatasetRef | None:
        """The data that this stage prepared, now or before; None if it prepares none."""
        own_tags = self._tags()
        return tags.dataset(own_tags) if tags.DATA in tags.outputs(own_tags) else None

    def keep(self, value: BaseModel) -> None:
        """Store a small result with the run."""
        self._record.client.log_text(self.run_id, value.model_dump_json(indent=2), RESULT)
        self._tag_outputs({tags.RESULT: f"runs:/{self.run_id}/{RESULT}"})

    def kept(self, kind: type[M]) -> M:
        """The small result that this stage stored, now or before."""
        run_id = tags.run_of(tags.outputs(self._tags())[tags.RESULT])
        with tempfile.TemporaryDirectory() as folder:
            path = self._record.client.download_artifacts(run_id, RESULT, folder)
            return kind.model_validate_json(Path(path).read_text(encoding="utf-8"))

    def result(self, value: T) -> T:
        """The return value of a task; in Prefect, a cached stage is shown as Cached."""
        if not self.cached:
            return value
        source = self._tags().get(tags.CACHED_FROM, self.run_id)
        return ui.as_cached(value, f"reused from the MLflow run {source}")

    def fetch(self, ref: Ref) -> Path:
        """Fetch the files of a reference into the working folder."""
        self.logger.phase(f"fetching {ref.uri}")
        if isinstance(ref, DatasetRef):
            to = self.work / INPUTS / f"data-{ref.digest}"
            return to if to.exists() else fetch_dataset(self._record.client, ref, to)
        if isinstance(ref, SnapshotRef):
            from tasks.feedback.asking.votes import fetch_snapshot  # its database takes a second

            return fetch_snapshot(ref, self.work / INPUTS, self._settings)
        model = cast(ModelRef, ref)
        to = self.work / INPUTS / f"{model.name}-{model.version}"
        return to if to.exists() else self._record.store.fetch(model, to)

    def call(self, inputs: Mapping[str, Path], outputs: Mapping[str, Path]) -> Report:
        """Call the function of the stage; a training starts from its last checkpoint.

        A training waits for an accelerator slot and runs on `RLHF_PROCESSES` processes, whose
        number changes results only by rounding. With a cluster, its free places are waited for
        instead, and other stages that compute with a model run there too, in one process.
        """
        settings, trains = self._settings, STAGES[self.name].trains
        leaves = bool(settings.cluster) and self._may_leave()
        config, *_ = self._sections.values()
        work = Work(
            inputs=inputs,
            outputs=outputs,
            sections={name: self._sections[name] for name in STAGES[self.name].sections},
            seed=self.run.seed,
            device=settings.training_device if trains or leaves else settings.device,
            logger=self.logger,
            recovery=self.recovery,
            rewards_from=reward_places(settings),
            engine=engine_place(self._sections, settings, self.work),
            judging=MlflowJudging(
                self._record,
                self.run.experiment_id,
                self.logger,
                project=self.run.project,
                stage=f"{self.name}-{self._key}",
                source=f"{self.run.project} {self.name} {self.run_id}",
            ),
            answers=self._kept_answers() if self.waits else None,
        )
        if self.waits:
            try:
                return run_stage(self.name, config, work)
            except VerdictsPendingError:
                self.logger.phase("keeping the answers")
                answers = self.work / ANSWERS
                self._record.client.log_artifacts(self.run_id, str(answers), ANSWERS)
                raise
        if leaves:
            return self._elsewhere(config, work, processes=settings.processes if trains else 1)
        if not trains:
            return run_stage(self.name, config, work)
        self.logger.phase("waiting for an accelerator slot")
        with accelerator():
            if settings.processes == 1:
                return run_stage(self.name, config, work)
            self.logger.phase(f"starting {settings.processes} processes")
            job = launch.Job.of(
                self.name,
                config,
                work,
                processes=settings.processes,
                strategy=settings.strategy,
            )
            return launch.launch(job, self.logger)

    def _may_leave(self) -> bool:
        """Whether machines of a cluster can run the stage: it computes with a model, and asks
        nobody whom only this machine reaches."""
        judges = [part for part in self._sections.values() if isinstance(part, JudgeConfig)]
        return bool(STAGES[self.name].inputs) and not any(part.asks_outside for part in judges)

    def _elsewhere(self, config: Section, work: Work, *, processes: int) -> Report:
        """Run the stage on the cluster; its placement is the queue, so it takes no slot."""
        settings = self._settings
        job = launch.Job.of(
            self.name,
            config,
            work,
            processes=processes,
            strategy=settings.strategy,
            cluster=settings.cluster,
            cluster_retries=settings.cluster_retries,
            cluster_cpus=settings.cluster_cpus,
            folder=self.work,
        )
        return launch.launch(job, self.logger)

    @property
    def _key(self) -> str:
        return self._what.key(self._record.store)

    def _kept_answers(self) -> Path:
        """The folder of the answers that people judge, with those of an earlier call of this stage
        on any machine."""
        folder = self.work / ANSWERS
        if folder.exists():
            return folder
        client = self._record.client
        for run in self._record.runs.of_key(self.run.experiment_id, self._key):
            if client.list_artifacts(run.info.run_id, ANSWERS):
                self.logger.phase("fetching the answers")
                with staged(folder) as part, tempfile.TemporaryDirectory(dir=self.work) as scratch:
                    found = client.download_artifacts(run.info.run_id, ANSWERS, scratch)
                    shutil.move(found, part)
                break
        return folder

    def record(self, report: Report) -> None:
        """Store a report with the run: `summary/` metrics, `tables/` and `figures/`."""
        self.logger.phase("storing the report")
        about = {"project": self.run.project, "stage": self.name}
        store_report(self._record, self.run_id, report, self.logger, **about)

    def publish(
        self, models: Mapping[str, Path], copies: Mapping[str, ModelRef] = {}
    ) -> dict[str, ModelRef]:
        """Register model directories as the next versions of `<project>-<kind>`.

        A kind may have the number of an iteration, as in `milestone.10`. All models are uploaded
        and checked before the first is registered.

        Args:
            copies: the version that a model is a copy of, by kind; it has the parents and the
                iteration of that version, and names it.
        """
        store = self._record.store
        words = {kind: kind.partition(".")[0].replace("_", "-") for kind in models}
        names = {kind: f"{self.run.project}-{word}" for kind, word in words.items()}
        uploads = {}
        for kind, path in models.items():
            self.logger.phase(f"uploading and checking {names[kind]}")
            uploads[kind] = store.upload(path, names[kind], run_id=self.run_id)
        outputs = [LoggedModelOutput(upload.id, step=0) for upload in uploads.values()]
        self._record.client.log_outputs(self.run_id, outputs)
        shared = version_tags(self._what, self.run_id, self._settings)
        refs = {
            kind: store.register(
                upload, tags={**self._lineage(shared, copies.get(kind)), **tags.kind(kind)}
            )
            for kind, upload in uploads.items()
        }
        self._tag_outputs({kind: ref.uri for kind, ref in refs.items()})
        log.info("registered %s", ", ".join(ref.uri for ref in refs.values()))
        return refs

    def _lineage(self, own: Mapping[str, str], original: ModelRef | None) -> dict[str, str]:
        """The tags of a version; a copy was trained from what its original was trained from."""
        if original is None:
            return dict(own)
        return tags.as_copy(own, original, self._record.store.tags(original))

    def publish_data(self, directory: Path) -> DatasetRef:
        """Store prepared data with the run."""
        self.logger.phase("uploading and checking the data")
        ref = store_dataset(self._record.client, self.run_id, directory)
        self._tag_outputs({tags.DATA: ref.uri}, {tags.DATA_DIGEST: ref.digest})
        return ref

    def _tags(self) -> dict[str, str]:
        return self._record.runs.tags(self.run_id)

    def _tag_outputs(self, outputs: Mapping[str, str], more: Mapping[str, str] = {}) -> None:
        """Tag the run with its outputs: addresses by kind."""
        output_tags = {tags.output_of(kind): uri for kind, uri in outputs.items()}
        self._record.add_tags(self.run_id, {**output_tags, **more})


@contextmanager
def open_stage(
    name: str,
    *,
    record: Record,
    config: BaseModel,
    run: PipelineRun,
    inputs: Mapping[str, Ref],
    extra_sections: Mapping[str, BaseModel] = {},
    context: Literal["training", "evaluation"] = "training",
    reuse: Literal["no", "own", "any"] = "no",
    waits: bool = False,
) -> Iterator[Stage]:
    """Open a child run of `run`, with a temporary working folder.

    The run ends FINISHED; FAILED with the tag `error` if the block raises; KILLED if it is
    interrupted or cancelled. In the last two cases the versions that it registered are deleted.

    Args:
        extra_sections: other settings that the result depends on.
        reuse: whether the stage may be `cached`: from this pipeline run only ("own"), or from any.
        waits: whether it may end before people have judged its answers, and is then called again:
            its folder and its run stay, as those of a training do.
    """
    what = Definition(name, {name: config, **extra_sections}, run, inputs, context)
    key = what.key(record.store)
    path = record.settings.home / "work" / f"{name}-{key if waits else uuid.uuid4().hex[:16]}"
    folder = work_folder(path, kept=waits)
    with _open(record, what, key, folder, reuse, waits=waits) as stage:
        yield replace(stage, waits=waits)


@contextmanager
def open_training(
    name: str,
    *,
    record: Record,
    config: BaseModel,
    extra_sections: Mapping[str, BaseModel],
    run: PipelineRun,
    inputs: Mapping[str, Ref],
) -> Iterator[Stage]:
    """Open a stage that can be resumed after it was stopped or its process was killed.

    Its folder is kept until the block succeeds. Opening it again with the same settings (`config`
    and `extra_sections`), seed, code and content of the inputs resumes that folder, and the earlier
    MLflow run as a child of `run`: no value is logged twice and none is missing. A process that
    finds the folder in use blocks until it is free, and then usually finds the stage finished.
    """
    what = Definition(name, {name: config, **extra_sections}, run, inputs)
    key = what.key(record.store)
    path = record.settings.home / "work" / f"{name}-{key}"
    with _open(record, what, key, work_folder(path, kept=True), "any") as stage:
        seconds = record.settings.checkpoint_seconds
        yield replace(stage, recovery=Recovery(stage.work / CHECKPOINTS, every_seconds=seconds))


@contextmanager
def _open(
    record: Record,
    what: Definition,
    key: str,
    folder: AbstractContextManager[Path],
    reuse: str,
    *,
    waits: bool = False,
) -> Iterator[Stage]:
    """Open the stage: cached if a finished run can be reused, else to run it."""
    sweep(record.settings.home / "work", record.settings.keep_work_days)
    if PrefectRun.current():
        ui.forward_logs()
    with folder as work:
        stage_tags = run_tags(what, key, record.settings)
        done = None
        if reuse != "no":
            own = reuse == "own" or what.name in what.run.force
            done = find_finished(record, what, key, own=own)
        if done is None:
            opened = _in_progress(record, what, stage_tags, work, waits=waits)
        else:
            opened = _reused(record, what, stage_tags, work, done)
        with opened as stage:
            yield stage


@contextmanager
def _reused(
    record: Record, what: Definition, stage_tags: Mapping[str, str], work: Path, done: Run
) -> Iterator[Stage]:
    """The stage as `done` left it; for another pipeline, a new run refers to `done`."""
    run_id = done.info.run_id
    if not is_stage_of(done, what):
        run_id = new_run(record, what, work)
        describe(record, run_id, what, {**stage_tags, **tags_of_stand_in(done)})
        copy_summary(record, done, run_id)
        record.client.set_terminated(run_id, "FINISHED")
    log.info("%s is reused from the run %s", what.name, source_of(done))
    with closing(MlflowLogger(record.client, run_id)) as logger:
        yield Stage(
            run_id=run_id, work=work, logger=logger, cached=True, _what=what, _record=record
        )


@contextmanager
def _in_progress(
    record: Record, what: Definition, stage_tags: Mapping[str, str], work: Path, *, waits: bool
) -> Iterator[Stage]:
    """The stage in a new run, or in the run that was stopped here, or waits for people."""
    left = find_unfinished(record, work)
    if left is None and waits:
        left = find_waiting(record, what, stage_tags[tags.KEY])
        if left is not None:
            remember_run(work, left.info.run_id)
    run_id = new_run(record, what, work) if left is None else left.info.run_id
    with (
        events.announced(record.client, what.run, what.name, run_id),
        close_run_on_exit(record.client, run_id, undo=lambda: unpublish(record, run_id)),
    ):
        if left is not None:
            reopen(record, left)
            unpublish(record, run_id)
        with _logger(record, what, run_id, _displays(record.settings, what, run_id)) as logger:
            describe(record, run_id, what, stage_tags)
            yield Stage(
                run_id=run_id, work=work, logger=logger, cached=False, _what=what, _record=record
            )


@contextmanager
def _logger(
    record: Record, what: Definition, run_id: str, displays: list[Display]
) -> Iterator[MlflowLogger]:
    announce = partial(events.monitor_tripped, what.run.project, what.name, run_id)
    logged = record.runs.logged(run_id)
    logger = MlflowLogger(record.client, run_id, displays, logged=logged, announce=announce)
    try:
        yield logger
    except BaseException as error:
        try:
            logger.close()
        except Exception as trouble:
            error.add_note(str(trouble))
        raise
    logger.close()


def _displays(settings: Settings, what: Definition, run_id: str) -> list[Display]:
    terminal = TerminalDisplay(what.name)
    if PrefectRun.current() is None:
        return [terminal]
    project, title = what.run.project, f"{what.run.project} {what.name}"
    url = run_url(run_id, what.run.experiment_id, settings)
    ui.show_link(artifact_key(project, what.name, "mlflow"), url, f"{title} in MLflow")
    return [terminal, ArtifactDisplay(artifact_key(project, what.name, "progress"), title)]

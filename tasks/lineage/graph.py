"""The runs of stages and the versions that MLflow has, as one graph.

A run of a stage has its inputs and outputs in its tags, so that versions that were deleted have
their place here too. Runs in MLflow's trash, and those of deleted experiments, are in it. Of a
version whose run is gone for good, what its own tags say is known.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from tasks.record import tags
from tasks.record.record import Record
from tasks.registry.refs import ModelRef, is_version, run_of_data

EXAMINATIONS = ("evaluation", "report_card")  # stages that make no version
ARCHIVED = "Archived"  # MLflow's own stage of a version
COPY = "copy"  # the role of a milestone that a policy is a copy of


@dataclass(frozen=True)
class StageRun:
    """A stage that ran: what went in, what came out."""

    run_id: str
    stage: str
    project: str
    status: str
    at: datetime
    inputs: Mapping[str, str]  # addresses by role
    outputs: Mapping[str, str]  # addresses by kind
    params: Mapping[str, str]
    pipeline: str = ""  # the run that it is a part of
    key: str = ""
    data_digest: str = ""
    snapshot: str = ""
    trashed: bool = False
    erased: str = ""  # what was erased of its data, in a sentence

    @property
    def data(self) -> str:
        """The prepared data that it read; empty if it read none."""
        return self.inputs.get(tags.DATA, "")

    @property
    def models(self) -> dict[str, str]:
        """The versions that it read, by role."""
        return {role: uri for role, uri in self.inputs.items() if is_version(uri)}

    @property
    def versions(self) -> dict[str, str]:
        """The versions that it made, by kind."""
        return {kind: uri for kind, uri in self.outputs.items() if is_version(uri)}


@dataclass(frozen=True)
class Version:
    """A version, whether the registry still has it or not."""

    uri: str
    kind: str
    at: datetime | None
    registered: bool
    archived: bool = False
    aliases: tuple[str, ...] = ()
    parents: Mapping[str, str] = field(default_factory=dict)  # addresses by role
    copy_of: str = ""
    run: StageRun | None = None  # that made it; None if it is gone for good
    run_id: str = ""
    data_digest: str = ""

    @property
    def ref(self) -> ModelRef:
        """Its reference."""
        return ModelRef.parse(self.uri)

    @property
    def state(self) -> str:
        """Whether it is there: registered, archived or deleted."""
        if not self.registered:
            return "deleted"
        return "archived" if self.archived else "registered"


class Graph:
    """All runs of stages and all versions, read once."""

    def __init__(self, record: Record) -> None:
        self.record = record
        found = {run.run_id: run for run in self._runs()}
        self.runs = found
        # A run that stands for another one has its outputs; the first one made them.
        self._makers: dict[str, StageRun] = {}
        for run in sorted(found.values(), key=lambda run: run.at, reverse=True):
            for uri in run.outputs.values():
                self._makers[uri] = run
        self.versions = self._versions()

    def maker(self, uri: str) -> StageRun | None:
        """The run that made a version or prepared data."""
        return self._makers.get(uri)

    def prepared(self) -> dict[str, StageRun]:
        """The runs that prepared data, by the address of the data."""
        found = {}
        for run in self.runs.values():
            uri = run.outputs.get(tags.DATA, "")
            if uri and run_of_data(uri) == run.run_id:
                found[uri] = run
        return found

    def parents(self, version: Version) -> dict[str, str]:
        """The versions that a version was made from, by role; of a copy its original alone."""
        original = self.versions.get(version.copy_of)
        if original is not None and (original.run or original.parents):
            return {COPY: original.uri}
        copied = {COPY: version.copy_of} if original is not None else {}
        return {**version.parents, **copied}

    def children(self) -> dict[str, list[tuple[str, Version]]]:
        """Of each version those that were made from it, with the role that it had."""
        found: dict[str, list[tuple[str, Version]]] = {}
        for version in self.versions.values():
            for role, uri in self.parents(version).items():
                found.setdefault(uri, []).append((role, version))
        return found

    # ---- reading ----

    def _runs(self) -> Iterator[StageRun]:
        for project, run in self.record.runs.every_stage():
            made = _stage_run(run, project)
            # Only stages have a key, which an erasure takes from them.
            if (made.key or made.erased) and (made.inputs or made.outputs):
                yield made

    def _versions(self) -> dict[str, Version]:
        aliases = self.record.store.every_alias()
        found = {}
        for entity in self.record.store.every_version():
            uri = f"models:/{entity.name}/{entity.version}"
            if is_version(uri):
                found[uri] = self._version(uri, entity, aliases.get(uri, ()))
        for run in self.runs.values():
            for kind, uri in run.versions.items():
                if uri not in found:
                    maker = self._makers[uri]
                    found[uri] = Version(
                        uri, kind.partition(".")[0], maker.at, False, run=maker,
                        run_id=maker.run_id, parents=_parents(maker),
                        data_digest=maker.data_digest,
                    )  # fmt: skip
        for uri in {uri for known in list(found.values()) for uri in _named(known)} - found.keys():
            # Named by others only: it and its run are gone for good.
            found[uri] = Version(uri, "", None, registered=False)
        return found

    def _version(self, uri: str, entity: ModelVersion, aliases: tuple[str, ...]) -> Version:
        own = dict(entity.tags)
        run_id = own.get(tags.RUN, entity.run_id or "")
        run = self._makers.get(uri) or self.runs.get(run_id)
        parents = {role: value for role, value in tags.parents(own).items() if is_version(value)}
        return Version(
            uri,
            own.get(tags.KIND, ""),
            _moment(entity.creation_timestamp),
            registered=True,
            archived=entity.current_stage == ARCHIVED,
            aliases=aliases,
            parents=parents or (_parents(run) if run else {}),
            copy_of=own.get(tags.COPY_OF, ""),
            run=run,
            run_id=run_id,
            data_digest=own.get(tags.DATA_DIGEST, ""),
        )


def _stage_run(run: Run, project: str) -> StageRun:
    own = dict(run.data.tags)
    return StageRun(
        run_id=run.info.run_id,
        stage=own.get(tags.STAGE, ""),
        project=project,
        status=run.info.status,
        at=_moment(run.info.start_time),
        inputs=tags.inputs(own),
        outputs={k: uri for k, uri in tags.outputs(own).items() if k != tags.RESULT},
        params=dict(run.data.params),
        pipeline=own.get(tags.PARENT_RUN, ""),
        key=own.get(tags.KEY, ""),
        data_digest=own.get(tags.DATA_DIGEST, ""),
        snapshot=own.get(tags.SNAPSHOT, ""),
        trashed=run.info.lifecycle_stage != "active",
        erased=own.get(tags.ERASED, ""),
    )


def _parents(run: StageRun) -> dict[str, str]:
    return run.models if run.stage not in EXAMINATIONS else {}


def _named(version: Version) -> Iterator[str]:
    yield from version.parents.values()
    if is_version(version.copy_of):
        yield version.copy_of


def _moment(milliseconds: int | None) -> datetime:
    return datetime.fromtimestamp((milliseconds or 0) / 1000, tz=UTC)

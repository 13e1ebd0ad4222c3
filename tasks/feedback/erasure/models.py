"""The models that learnt from a person: found, retired, and deleted if that is wanted.

A version is affected if it learnt from data with a vote of the person, or was made from one that
is. It loses its aliases, is marked, and cannot become the champion. Its files stay until somebody
deletes them, so that it can be compared with what comes in its place: weights have no name in them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from rlhf_core.errors import UserError
from tasks.record import tags
from tasks.record.record import Record
from tasks.record.reuse import close_abandoned
from tasks.registry.refs import DATA_FOLDER, ModelRef, SnapshotRef

# It learns from demonstrations, and its data hold the votes too. Where the demonstrations are the
# chosen answers, the lineage says so.
SFT = "sft"
PREPARED = (DATA_FOLDER, "tables", "figures")  # what a run that prepared data has of them


class Affected(NamedTuple):
    """A version that learnt from the person, as it was found."""

    version: str  # models:/demo-reward/3
    kind: str
    digest: str  # of its files
    pipeline: str  # the run of the pipeline that made it
    aliases: tuple[str, ...] = ()

    @property
    def ref(self) -> ModelRef:
        """The version."""
        return ModelRef.parse(self.version)


def of_snapshots(record: Record, project: str, digests: Iterable[str]) -> list[Run]:
    """The runs that read these snapshots of a feedback project."""
    try:
        uris = [SnapshotRef(project=project, digest=digest).uri for digest in digests]
    except ValueError:  # a name of a project that no run can have read
        return []
    found = {run.info.run_id: run for uri in uris for run in record.runs.of_snapshot(uri)}
    return list(found.values())


def affected(record: Record, runs: Iterable[Run], seen: Iterable[str] = ()) -> list[Affected]:
    """The versions that learnt from what these runs prepared, and those made from them.

    Args:
        runs: that read votes of the person.
        seen: versions that are known to be affected.
    """
    digests = {run.data.tags[tags.DATA_DIGEST] for run in runs if tags.DATA_DIGEST in run.data.tags}
    known: dict[str, Mapping[str, str]] = {}
    for name in record.store.names():
        for version in record.store.versions(name):
            ref = ModelRef(name=name, version=version)
            known[ref.uri] = record.store.tags(ref)
    found = {uri for uri in seen if uri in known}
    for uri, own in known.items():
        data = set(own.get(tags.DATA_DIGEST, "").split(", "))
        if data & digests and own.get(tags.KIND) != SFT:
            found.add(uri)
    while more := {u for u, own in known.items() if _made_from(own) & found} - found:
        found |= more
    order = [uri for uri in known if uri in found]
    return [
        Affected(
            uri,
            known[uri].get(tags.KIND, ""),
            known[uri].get(tags.DIGEST, ""),
            known[uri].get(tags.PIPELINE_RUN, ""),
            tuple(record.store.aliases(ModelRef.parse(uri))),
        )
        for uri in order
    ]


def _made_from(own: Mapping[str, str]) -> set[str]:
    """The versions that a version was trained from, or is a copy of."""
    copied = {own[tags.COPY_OF]} if tags.COPY_OF in own else set()
    return {str(uri) for uri in tags.parents(own).values()} | copied


def check_idle(record: Record, runs: Iterable[Run]) -> None:
    """Refuse to go on while a run reads votes of the person: it would register a model.

    Raises: UserError that names the runs.
    """
    close_abandoned(record)
    pipelines = {run.data.tags.get(tags.PARENT_RUN, run.info.run_id) for run in runs}
    busy = sorted(
        str(run.info.run_name)
        for run in filter(None, map(record.runs.find_active, sorted(pipelines)))
        if run.info.status == "RUNNING"
    )
    if busy:
        raise UserError(
            f"the run {', '.join(busy)} is training on votes of this person: cancel it or let it "
            "end, then erase again to go on where this stopped"
        )


def retire(record: Record, versions: Iterable[Affected], said: str) -> None:
    """Mark versions and take their aliases away; a second time changes nothing."""
    for version in versions:
        ref = version.ref
        if not record.store.exists(ref):
            continue
        own = record.store.tags(ref)
        aliases = record.store.aliases(ref)
        before = set(filter(None, own.get(tags.RETIRED_ALIASES, "").split(", ")))
        retired = ", ".join(sorted({*before, *aliases}))
        new = {tags.ERASED: said} | ({tags.RETIRED_ALIASES: retired} if retired else {})
        record.store.add_tags(ref, new)
        for alias in aliases:
            record.store.remove_alias(ref.name, alias)


def purge(record: Record, versions: Iterable[Affected]) -> list[str]:
    """Delete the files of versions for good; which had any."""
    gone = []
    for version in versions:
        if record.store.exists(version.ref):
            record.store.remove_files(version.ref)
            gone.append(version.version)
    return gone


def remove_data(record: Record, runs: Iterable[Run], said: str) -> dict[str, list[str]]:
    """Delete the prepared votes and the reports of runs that read votes of the person.

    No stage is taken from these runs any more.

    Returns: what was deleted, by run.
    """
    done: dict[str, list[str]] = {}
    for run in runs:
        run_id, own = run.info.run_id, run.data.tags
        stage = own.get(tags.STAGE)
        removed: list[str] = []
        if stage == tags.FEEDBACK_REPORT:
            removed = _delete(record, run, lambda name: True)
        elif stage != tags.PIPELINE and tags.output_of(tags.DATA) in own:
            # Demonstrations and prompts may have been made of the votes.
            removed = _delete(record, run, lambda name: name in PREPARED)
        if removed:
            done[run_id] = removed
        record.client.set_tag(run_id, tags.ERASED, said)
        if tags.KEY in own:
            record.client.delete_tag(run_id, tags.KEY)
    return done


def _delete(record: Record, run: Run, unwanted: Callable[[str], bool]) -> list[str]:
    """Delete the artifacts of a run whose names are unwanted; which they were."""
    try:
        found = record.client.list_artifacts(run.info.run_id)
        repository = get_artifact_repository(
            run.info.artifact_uri, tracking_uri=record.client.tracking_uri
        )
        removed = [item.path for item in found if unwanted(item.path)]
        for path in removed:
            repository.delete_artifacts(path)
    except (MlflowException, OSError, NotImplementedError) as error:
        raise UserError(
            f"the artifacts of the run {run.info.run_id} cannot be deleted ({error}): see that "
            "their store can be reached and written, then erase again to go on"
        ) from error
    return removed

"""What is trained again after an erasure: the same settings on the votes of the others.

A pipeline is run again if a version of it was in use, or if it is the last one of its project with
a reward model. Its settings are those that its MLflow run has, but for the snapshot, which is the
one that came in the place of the old one, and versions that were trained again themselves.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, TypeAlias

import yaml
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from tasks.feedback.erasure.requests import Request
from tasks.record import tags
from tasks.record.describe import CONFIG
from tasks.record.record import Record
from tasks.registry.champion import CHAMPION
from tasks.registry.refs import ModelRef, SnapshotRef

Which: TypeAlias = Literal["used", "all", "none"]


class Again(NamedTuple):
    """A pipeline that is to be run again."""

    run: str  # of MLflow, that is run again
    name: str
    settings: Mapping[str, Any]
    made: Mapping[str, str]  # the versions that it made, by kind


class Plan(NamedTuple):
    """What is run again, and a sentence for each run that is not."""

    again: tuple[Again, ...]
    notes: tuple[str, ...]


def plan(record: Record, request: Request, which: Which) -> Plan:
    """The pipelines to run again, those first that others depend on."""
    models = request.steps["models"]["models"]
    by_pipeline: dict[str, list[Mapping[str, Any]]] = {}
    for model in models:
        by_pipeline.setdefault(model["pipeline"], []).append(model)
    chosen = _chosen(by_pipeline, which)
    again: list[Again] = []
    notes: list[str] = []
    if left := len(by_pipeline) - len(chosen):
        notes.append(
            f"{left} earlier runs were not trained again, as no version of them was in use"
        )
    for run_id in chosen:
        run = record.runs.find(run_id) if run_id else None
        if run is None:
            notes.append("a version whose run is gone was not trained again")
            continue
        name = str(run.info.run_name)
        settings = _settings(record, run)
        if settings is None or run.data.tags.get(tags.STAGE) != tags.PIPELINE:
            notes.append(f"{name} was not trained again: its settings are not in MLflow")
            continue
        if "model" not in settings or "reward_model" not in settings:
            notes.append(f"{name} was not trained again: it is a stage by itself; run it by hand")
            continue
        problem = _put_snapshot(settings, run, request)
        if problem:
            notes.append(f"{name} was not trained again: {problem}")
            continue
        again.append(
            Again(run_id, name, settings, {m["kind"]: m["version"] for m in by_pipeline[run_id]})
        )
    return Plan(tuple(again), tuple(notes))


def _chosen(pipelines: Mapping[str, list[Mapping[str, Any]]], which: Which) -> list[str]:
    if which == "none":
        return []
    if which == "all":
        return list(pipelines)
    used = {run for run, made in pipelines.items() if any(model["aliases"] for model in made)}
    last: dict[str, str] = {}
    for run, made in pipelines.items():
        for model in made:
            if model["kind"] == "reward":
                last[model["version"].rpartition("/")[0]] = run
    return [run for run in pipelines if run in used | set(last.values())]


def _settings(record: Record, run: Run) -> dict[str, Any] | None:
    try:
        with TemporaryDirectory() as folder:
            path = record.client.download_artifacts(run.info.run_id, CONFIG, folder)
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (MlflowException, OSError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def _put_snapshot(settings: dict[str, Any], run: Run, request: Request) -> str:
    """Have the settings read what came in the place of the run's snapshot; why that cannot be."""
    preferences = settings.get("data", {}).get("preferences", {})
    pinned = run.data.tags.get(tags.SNAPSHOT)
    if not preferences.get("store") or pinned is None:
        return "its votes are not those of the store; take the person out of its files, and run it"
    snapshot = SnapshotRef.parse(pinned)
    if snapshot.project != request.project.name:
        return f"its votes are those of the project {snapshot.project}"
    digest = request.project.snapshots.successor(snapshot.digest)
    if not digest:
        return "no vote is left in its snapshot"
    preferences["snapshot"] = digest
    return ""


def with_new_versions(settings: Any, new: Mapping[str, str]) -> Any:
    """Settings in which versions that were trained again stand for the old ones."""
    if isinstance(settings, dict):
        return {key: with_new_versions(value, new) for key, value in settings.items()}
    if isinstance(settings, list):
        return [with_new_versions(value, new) for value in settings]
    return new.get(settings, settings) if isinstance(settings, str) else settings


def uses(settings: Any, versions: Iterable[str]) -> str:
    """A version that settings name, of some; "" if there is none."""
    if isinstance(settings, dict):
        return next(filter(None, (uses(value, versions) for value in settings.values())), "")
    if isinstance(settings, list):
        return next(filter(None, (uses(value, versions) for value in settings)), "")
    return settings if isinstance(settings, str) and settings in set(versions) else ""


def give_aliases(record: Record, before: Mapping[str, Any], after: ModelRef) -> list[str]:
    """Have the aliases that a version had point to the one that was trained again.

    The champion is not among them: only a promotion makes one.
    """
    given = [alias for alias in before["aliases"] if alias != CHAMPION]
    for alias in given:
        record.store.set_alias(after, alias)
    return given

"""The steps of an erasure as Prefect tasks. Neither a parameter nor a log has the pseudonym."""

import logging
from collections.abc import Mapping
from typing import Any

from prefect import task

from rlhf_core.errors import UserError
from tasks.feedback.asking.votes import opened
from tasks.feedback.erasure import certificate, requests, retraining, steps
from tasks.record.record import Record
from tasks.record.work_folder import work_folder
from tasks.registry.refs import ModelRef
from tasks.settings import read_settings

log = logging.getLogger(__name__)


@task(name="find-erasures", task_run_name="find what is open")
def open_erasures(project: str, number: int) -> list[int]:
    """The erasures to go on with: one by its number, or all of a project that are not finished.

    Raises: DataError when there is no such erasure.
    """
    with opened(read_settings()) as store:
        if number:
            return [requests.read(store, number).id]
        found = [requests.read(store, number) for number in requests.still_open(store)]
        return [request.id for request in found if request.project.name == project]


@task(name="erase", task_run_name="erase {number}")
def erase(number: int, purge: bool = False) -> str:
    """Do the steps that are not done yet, one after the other; the address of the certificate."""
    settings = read_settings()
    folder = settings.home / "work" / f"erasure-{number}"
    with opened(settings) as store, work_folder(folder, kept=True):
        for step in steps.STEPS:
            steps.do_step(store, number, step, settings)
        if purge:
            steps.do_step(store, number, steps.PURGE, settings)
    return _certify(number)


@task(name="plan-retraining", task_run_name="what is trained again")
def plan_retraining(number: int, which: retraining.Which) -> retraining.Plan:
    """Which pipelines are run again for an erasure."""
    settings = read_settings()
    with opened(settings) as store:
        request = requests.read(store, number)
        done = request.steps.get("retraining", {}).get("runs", [])
        found = retraining.plan(Record.open(settings), request, which)
        rest = tuple(again for again in found.again if again.run not in done)
        return retraining.Plan(rest, found.notes)


@task(name="note-retraining", task_run_name="note what was trained")
def note_retraining(
    number: int,
    notes: list[str],
    again: retraining.Again | None = None,
    made: Mapping[str, ModelRef] | None = None,
    promoted: bool = False,
) -> dict[str, str]:
    """Keep what was trained again, and write the certificate anew.

    Returns: the versions that stand for old ones, by these.
    """
    settings = read_settings()
    record = Record.open(settings)
    with opened(settings) as store:
        request = requests.read(store, number)
        known = request.steps.get("retraining", {})
        models: dict[str, Any] = dict(known.get("models", {}))
        said = [
            *known.get("notes", []),
            *(note for note in notes if note not in known.get("notes", [])),
        ]
        runs = list(known.get("runs", []))
        if again is not None and made is not None:
            runs.append(again.run)
            before = {model["version"]: model for model in request.steps["models"]["models"]}
            for kind, old in again.made.items():
                if (new := made.get(kind)) is None:
                    continue
                models[old] = {"version": new.uri, "digest": _digest(record, new)}
                if promoted:
                    retraining.give_aliases(record, before[old], new)
        requests.note(store, request, "retraining", {"models": models, "notes": said, "runs": runs})
    _certify(number)
    return {old: new["version"] for old, new in models.items()}


def _digest(record: Record, ref: ModelRef) -> str:
    from tasks.record import tags

    return record.store.tags(ref).get(tags.DIGEST, "")


def _certify(number: int) -> str:
    """Write the certificate under the home and to MLflow; where it is."""
    settings = read_settings()
    with opened(settings) as store:
        request = requests.read(store, number)
        path = certificate.write(request, settings)
        try:
            run = certificate.publish(store, request, Record.open(settings))
            requests.note(store, request, "published", {"run": run})
        except UserError as error:
            log.warning("the certificate is not in MLflow: %s", error)
        return str(path)

"""The steps of an erasure, in their order. Each may be killed and done again.

A step that is done is noted in the store, with what came of it. The store comes first, so that
nothing new is made of the votes; then models, files and databases, for which MLflow has to answer;
at last the pseudonym itself is forgotten.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from mlflow.entities import Run
from sqlalchemy import func, select

from tasks.feedback.erasure import models, requests, votes
from tasks.feedback.erasure.names import Name
from tasks.feedback.erasure.places import Found, Places
from tasks.feedback.erasure.requests import Request
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import Annotator, ErasedSnapshot, Prompt, Response, Snapshot
from tasks.feedback.store.tables import Project as ProjectRow
from tasks.lineage.lineage import seen_by
from tasks.record.record import Record
from tasks.settings import Settings, StoreSettings

ROWS = 2000
BUSY_SECONDS = 30.0  # how long the log of SQLite is waited for
log = logging.getLogger(__name__)


def plan(store: Store, request: Request, settings: Settings) -> Mapping[str, Any]:
    """What there is of the person in the store, and how the pseudonym can be searched for."""
    name = name_of(store, request, settings)
    rows = votes.rows_of(request, name)._asdict()
    return {"telling": name.telling, "shared": is_shared(store, request), "rows": rows}


def sign_out(store: Store, request: Request, settings: Settings) -> Mapping[str, Any]:
    """End all sessions; votes of the person are refused from now on."""
    votes.sign_out(request)
    return {}


def erase_votes(store: Store, request: Request, settings: Settings) -> Mapping[str, Any]:
    """Rebuild the snapshots that have votes of the person, then delete or empty all rows."""
    name = name_in(store, request)
    while True:
        for snapshot in votes.snapshots_of(request):
            request.project.snapshots.rebuild(snapshot, int(request.annotator or 0), request.id)
        done = votes.erase_rows(request, name)
        if done is not None:
            break
    rows = done._asdict() if any(done) else request.steps["plan"]["rows"]
    _overwrite(store)
    return {"rows": rows, "snapshots": snapshots(request)}


def retire_models(store: Store, request: Request, settings: Settings) -> Mapping[str, Any]:
    """Find the versions that learnt from the person, and take their aliases away.

    Raises: UserError while a run trains on such votes, or MLflow does not answer.
    """
    record = Record.open(settings)
    runs = _runs(record, request)
    models.check_idle(record, runs)
    seen = seen_of(record, request, runs)
    found = models.affected(record, runs, seen)
    before = {version["version"]: version for version in _noted_models(request)}
    noted = [{**version._asdict(), **before.get(version.version, {})} for version in found]
    # The aliases are noted before they go: a second try would not find them any more.
    requests.note(store, request, "models_found", {"models": noted})
    models.retire(record, found, said(request))
    return {"models": noted}


def remove_data(store: Store, request: Request, settings: Settings) -> Mapping[str, Any]:
    """Delete the prepared votes and the reports of runs that read votes of the person."""
    record = Record.open(settings)
    return {"runs": models.remove_data(record, _runs(record, request), said(request))}


def purge_models(store: Store, request: Request, settings: Settings) -> Mapping[str, Any]:
    """Delete the files of the versions that learnt from the person."""
    record = Record.open(settings)
    found = [models.Affected(**{**m, "aliases": ()}) for m in _noted_models(request)]
    return {"versions": models.purge(record, found)}


def clean_places(store: Store, request: Request, settings: Settings) -> Mapping[str, Any]:
    """Take the pseudonym out of files, logs, caches and databases."""
    name = name_in(store, request)
    found = places(request, settings, _digests(request)).clean(name)
    return _facts(found, name)


def search_again(store: Store, request: Request, settings: Settings) -> Mapping[str, Any]:
    """Search everything once more: what is found now is what stays."""
    name = name_in(store, request)
    own = settings.feedback_uri.removeprefix("sqlite:///")
    store_files = {own, f"{own}-wal", f"{own}-shm"}  # in which the request itself still is
    found = [
        path
        for path in places(request, settings, _digests(request)).search(name)
        if str(settings.home / path) not in store_files
    ]
    return {"found": [name.replaced(path, requests.NOBODY) for path in found]}


def finish(store: Store, request: Request, settings: Settings) -> Mapping[str, Any]:
    """Forget the pseudonym; from here on nobody can say who it was."""
    requests.finish(store, request)
    return {"overwritten": _overwrite(store)}


STEPS: Mapping[str, Callable[[Store, Request, Settings], Mapping[str, Any]]] = {
    "plan": plan,
    "sign_out": sign_out,
    "votes": erase_votes,
    "models": retire_models,
    "data": remove_data,
    "files": clean_places,
    "search": search_again,
    "finish": finish,
}
PURGE = "purge"


def do_step(store: Store, number: int, step: str, settings: Settings) -> None:
    """Do a step of a request, unless it is done."""
    request = requests.read(store, number)
    if step in request.steps:
        return
    what = purge_models if step == PURGE else STEPS[step]
    facts = what(store, request, settings)
    requests.note(store, request, step, facts)
    log.info("%s: %s is done", request.name, step.replace("_", " "))


# ---- what the steps know ----


def said(request: Request) -> str:
    """What a version or a run of MLflow says about itself."""
    return f"it had votes of a person who was erased ({request.name})"


def name_in(store: Store, request: Request) -> Name:
    """The pseudonym of an open request, as its plan has it."""
    text, telling = str(request.pseudonym), bool(request.steps["plan"]["telling"])
    return Name(text, telling=telling, others=_others(store, text))


def _others(store: Store, text: str) -> list[str]:
    """The pseudonyms of others that have this one in them."""
    with store.database.reading() as session:
        query = select(Annotator.pseudonym).where(
            Annotator.pseudonym.contains(text, autoescape=True)
        )
        return list(session.scalars(query.distinct()))


def name_of(store: Store, request: Request, settings: Settings) -> Name:
    """The pseudonym, and whether it can be told from other words."""
    text = str(request.pseudonym)
    others = _others(store, text)
    with suppress(Exception):  # a server that is away has no say in this
        record = Record.open(settings)
        projects = {found.name for found in record.client.search_experiments()}
        known = [*store.names(), *projects, *record.store.names()]
        return Name.of(text, _texts(store, request), known, others)
    return Name.of(text, _texts(store, request), store.names(), others)


def _texts(store: Store, request: Request) -> Iterator[str]:
    with store.database.reading() as session:
        prompts = select(Prompt.content).where(Prompt.project_id == request.project.id)
        for content in session.scalars(prompts.execution_options(yield_per=ROWS)):
            yield content if isinstance(content, str) else str(content)
        answers = select(Response.text).join(Prompt, Prompt.id == Response.prompt_id)
        answers = answers.where(Prompt.project_id == request.project.id)
        yield from session.scalars(answers.execution_options(yield_per=ROWS))


def is_shared(store: Store, request: Request) -> bool:
    """Whether somebody in another project is called so."""
    with store.database.reading() as session:
        query = select(func.count()).select_from(Annotator)
        query = query.where(
            Annotator.pseudonym == request.pseudonym,
            Annotator.project_id.in_(
                select(ProjectRow.id).where(ProjectRow.id != request.project.id)
            ),
        )
        return bool(session.scalar(query))


def snapshots(request: Request) -> list[dict[str, str]]:
    """The snapshots that had votes of the person, with what came in their place."""
    with request.project.database.reading() as session:
        rows = session.scalars(
            select(ErasedSnapshot)
            .where(ErasedSnapshot.erasure_id == request.id)
            .order_by(ErasedSnapshot.snapshot_id)
        )
        found = []
        for row in rows:
            new = row.successor_id and session.get_one(Snapshot, row.successor_id)
            found.append(
                {
                    "before": session.get_one(Snapshot, row.snapshot_id).digest,
                    "after": new.digest if new else "",
                }
            )
        return found


def _runs(record: Record, request: Request) -> list[Run]:
    """The runs of MLflow that read votes of the person out of the store."""
    return models.of_snapshots(record, request.project.name, _digests(request))


def _digests(request: Request) -> list[str]:
    return [snapshot["before"] for snapshot in request.steps["votes"]["snapshots"]]


def seen_of(record: Record, request: Request, runs: Iterable[Run]) -> list[str]:
    """The versions that learnt from the person, as the lineage has it.

    Args:
        runs: that read the votes in the store. If somebody else has the same pseudonym, votes from
            files need not be of this person.
    """
    found = seen_by(record, annotator=str(request.pseudonym), project=request.project.name)
    trained = [seen for seen in found if seen.relation == "trained"]
    if request.steps["plan"]["shared"]:
        own = {run.info.run_id for run in runs}
        trained = [seen for seen in trained if own & set(seen.path[0].uri.split("/"))]
    return [seen.ref.uri for seen in trained]


def _noted_models(request: Request) -> list[dict[str, Any]]:
    for step in ("models", "models_found"):
        if step in request.steps:
            return list(request.steps[step]["models"])
    return []


def places(request: Request, settings: Settings, snapshots: list[str]) -> Places:
    """Where the pseudonym is looked for: of the own project only, if another has it too.

    Args:
        snapshots: that had votes of the person, by their digests.
    """
    if not request.steps["plan"]["shared"]:
        return Places(settings, StoreSettings())
    record = Record.open(settings)
    project = request.project.name
    runs = models.of_snapshots(record, project, snapshots)
    experiments = {run.info.experiment_id for run in runs}
    names = {record.client.get_experiment(found).name for found in experiments}
    work = [
        folder.relative_to(settings.home).as_posix()
        for folder in (settings.home / "work").glob("*/")
        if any(digest[:16] in file.name for file in folder.rglob("*") for digest in snapshots)
    ]
    own = [f"mlflow/artifacts/{name}/" for name in sorted({*names, request.project.name})]
    return Places(settings, StoreSettings(), own=[*own, *work])


def _facts(found: Found, name: Name) -> dict[str, Any]:
    def shown(path: str) -> str:
        return name.replaced(path, requests.NOBODY)

    return {
        "searched": found.searched,
        "files": {shown(path): outcome for path, outcome in found.files.items()},
        "databases": found.databases,
        "left": {shown(path): why for path, why in found.left.items()},
        "same_word": found.words,
    }


def _overwrite(store: Store) -> bool:
    """Have the database of the votes overwrite what was deleted."""
    deadline = time.monotonic() + BUSY_SECONDS
    while not (done := store.database.erase(*votes.TABLES)):
        if time.monotonic() > deadline:
            log.warning(
                "somebody has read the preference store for long, so its log was not emptied: "
                "`rlhf erase` of anybody, or closing all programs that use it, does it"
            )
            break
        time.sleep(0.2)
    return done

"""A run that waits for people: suspended without a process, and resumed when they have answered.

A flow run of a deployment is suspended, as for an approval: its process ends and frees its memory
and its worker slot. The batch in the preference store remembers the flow run. Whoever runs `watch`,
as the page for annotators does, looks every few seconds for batches that are complete, and resumes
their flow runs through Prefect's API. A worker then runs the flow again from the top: finished
stages are found, and the stage that waited reads its answers and its verdicts.

What is waited for is kept in the two databases and nowhere else, so everything may be restarted at
any time. A flow run is resumed only while Prefect has it suspended: twice does no harm.
"""

import logging
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import suspend_flow_run

from rlhf_core.errors import VerdictsPendingError
from tasks.feedback.asking import batches
from tasks.feedback.asking.starting import Looked, start_ready
from tasks.feedback.asking.votes import opened, patiently
from tasks.feedback.store import clock
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import JUDGE
from tasks.prefect.approval import can_be_resumed
from tasks.prefect.ui import PrefectRun
from tasks.record import tags
from tasks.record.record import Record
from tasks.registry.refs import PipelineRun
from tasks.settings import Settings, read_settings

EVERY_SECONDS = 5.0
SPARE = timedelta(days=30)  # Prefect keeps it suspended so much longer than it waits
log = logging.getLogger(__name__)


# ---- in the flow ----


@contextmanager
def suspended_for_people(run: PipelineRun | None = None) -> Iterator[None]:
    """Suspend the flow run if a stage in the block waits for people.

    Call this in the flow itself. A flow run without a deployment cannot be suspended: the error is
    raised, and the same command goes on later.

    Args:
        run: the pipeline's run, which shows what is waited for.
    """
    try:
        yield
    except VerdictsPendingError as pending:
        if not can_be_resumed():
            raise
        _suspend(pending, run)


def _suspend(pending: VerdictsPendingError, run: PipelineRun | None) -> None:
    settings = read_settings()
    current = PrefectRun.current()
    assert current is not None, "a flow run that can be resumed is one"

    def note() -> timedelta:
        with opened(settings) as store:
            project = store.project(pending.project)
            batches.wait_in(project, pending.batch, current.flow_run_id)
            number = project.content.batch(pending.batch, JUDGE)
            return batches.stand(project, number).until - clock.now()

    left = patiently(note, settings)
    if run is not None:
        Record.open(patient=True).add_tags(run.run_id, {tags.WAITS_FOR: pending.short})
    log.info("%s; the run is suspended, and goes on by itself", pending.short)
    seconds = int((max(left, timedelta()) + SPARE).total_seconds())
    suspend_flow_run(timeout=seconds, key=f"people-{uuid.uuid4().hex}")


# ---- in whatever watches ----


def standings(store: Store) -> list[batches.Standing]:
    """The batches that suspended flow runs wait for."""
    return [
        batches.stand(store.by_id(project), batch)
        for project, batch in batches.waiting(store.database)
    ]


def resume_ready(store: Store, settings: Settings) -> list[str]:
    """Resume the flow runs whose batches are complete, or whose time is over.

    Returns: the ids of the flow runs that were resumed. One that Prefect does not know, or that has
        ended, is waited for no longer; one that is not suspended yet is looked at again.

    Raises: whatever Prefect's client raises when its server does not answer; StoreError.
    """
    done: list[str] = []
    for project_id, batch in batches.waiting(store.database):
        standing = batches.stand(store.by_id(project_id), batch)
        if not standing.complete:
            continue
        with get_client(sync_client=True) as client:
            outcome = _resume(client, standing.flow_run)
        if outcome == "later":
            continue
        batches.resumed(store.database, batch, standing.flow_run)
        if outcome == "resumed":
            done.append(standing.flow_run)
            log.info(
                "the flow run %s goes on: %s of %s pairs of the batch %s are answered",
                *(standing.flow_run, standing.answered, standing.pairs, standing.name),
            )
        else:
            log.warning("the flow run %s no longer waits: %s", standing.flow_run, outcome)
    return done


def _resume(client: SyncPrefectClient, flow_run: str) -> str:
    """`resumed`, `later`, or why it cannot be."""
    try:
        state = client.read_flow_run(UUID(flow_run)).state
    except ObjectNotFound:
        return "Prefect does not know it"
    except ValueError:
        return "its id is none"
    if state is None or not state.is_paused():
        return f"it is {state.name}" if state is not None and state.is_final() else "later"
    answer = client.resume_flow_run(UUID(flow_run))
    return "resumed" if answer.status.value == "ACCEPT" else "later"


def watch(
    store: Store, settings: Settings, stop: threading.Event, every: float = EVERY_SECONDS
) -> None:
    """Resume flow runs as their batches are completed, and start what follows others, until `stop`
    is set.

    Nothing ends it: what goes wrong is logged, once for each reason, and tried again.
    """
    said, looked = "", Looked()
    while not stop.is_set():
        try:
            start_ready(store, looked)
            resume_ready(store, settings)
            said = ""
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if reason != said:
                log.warning("batches of people are looked at again later (%s)", reason)
            said = reason
        stop.wait(every)

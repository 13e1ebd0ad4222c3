"""Resumes a stopped run of a deployment by returning it to the deployment's workers.

A retry within seconds of a crash is lost: Prefect's worker reports the crash a second time and
overwrites the new state. So we wait until the state has settled before we change it, and watch it
afterwards. A run that was killed together with its worker stays Running in Prefect until its
heartbeats are missed.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry

from rlhf_core.errors import UserError

SETTLED_SECONDS: Final = 20.0
HEARTBEATS_SECONDS: Final = 300.0
WATCH_SECONDS: Final = 30.0
START_SECONDS: Final = 90.0  # a process that a worker has started is running by then
POLL_SECONDS: Final = 2.0


def is_deployed(flow_run_id: str) -> bool:
    """Whether a worker executes this flow run, not the process that started it."""
    if not flow_run_id:
        return False
    with get_client(sync_client=True) as client:
        try:
            return client.read_flow_run(UUID(flow_run_id)).deployment_id is not None
        except ObjectNotFound:
            return False


def resume_deployed(flow_run_id: str, say: Callable[[str], None] = lambda text: None) -> str:
    """Return a flow run to the workers of its deployment once its state has settled.

    Args:
        say: receives a message about what we are waiting for.

    Returns: the name of the run.

    Raises: UserError if it has completed, is waiting already, or is still running.
    """
    with get_client(sync_client=True) as client:
        run = _settle(client, UUID(flow_run_id), say)
        while _state(run).is_final() and not _state(run).is_completed():
            client.set_flow_run_state(run.id, AwaitingRetry(), force=True)
            say(f"{run.name} has been returned to the workers")
            run = _watch(client, run.id)
        return run.name


def _settle(client: SyncPrefectClient, run_id: UUID, say: Callable[[str], None]) -> FlowRun:
    """Wait until the run has been in a final state for long enough."""
    last_message, deadline = "", time.monotonic() + HEARTBEATS_SECONDS
    while True:
        run = client.read_flow_run(run_id)
        state = _state(run)
        if state.is_completed():
            raise UserError(f"{run.name} has completed")
        if state.is_paused():
            raise UserError(f"{run.name} is waiting for an answer: resume it in the Prefect UI")
        if state.is_scheduled() or state.is_pending():
            raise UserError(f"{run.name} is already waiting for a worker ({state.name})")
        if state.is_final() and _age(state) >= SETTLED_SECONDS:
            return run
        message = (
            f"{run.name} is {state.name}; waiting {SETTLED_SECONDS:.0f} s for that state to settle"
            if state.is_final()
            else f"{run.name} is {state.name}; waiting for it to end, or for its heartbeats to stop"
        )
        if not state.is_final() and time.monotonic() >= deadline:
            raise UserError(
                f"{run.name} is still {state.name}; if its process is gone, change its state to "
                "Crashed in the Prefect UI, then try again"
            )
        if message != last_message:
            say(message)
            last_message = message
        time.sleep(POLL_SECONDS)


def _watch(client: SyncPrefectClient, run_id: UUID) -> FlowRun:
    """Wait until the run is running, or until a late crash report would have arrived.

    Even after such a report a process may be starting, if a worker took the run before it.
    """
    begun = time.monotonic()
    while True:
        run = client.read_flow_run(run_id)
        state = _state(run)
        patience = START_SECONDS if state.is_final() else WATCH_SECONDS
        if state.is_running() or state.is_completed() or time.monotonic() - begun >= patience:
            return run
        time.sleep(POLL_SECONDS)


def _state(run: FlowRun) -> State:
    if run.state is None:
        raise UserError(f"{run.name} has no state yet: try again in a moment")
    return run.state


def _age(state: State) -> float:
    return (datetime.now(UTC) - state.timestamp).total_seconds()

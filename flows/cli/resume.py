"""Goes on with a pipeline run that was stopped: here, or where its deployment's worker runs.

A retry that comes within seconds of a crash is lost, since Prefect's worker reports the crash once
more and overwrites it. So a state has to be old before it is changed, and is watched afterwards. A
run whose worker was killed with it is Running in Prefect until its heartbeats are missed.
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
START_SECONDS: Final = 90.0  # a process that a worker has started runs by then
POLL_SECONDS: Final = 2.0


def is_deployed(flow_run_id: str) -> bool:
    """Whether a worker runs this flow run, and not the process that started it."""
    if not flow_run_id:
        return False
    with get_client(sync_client=True) as client:
        try:
            return client.read_flow_run(UUID(flow_run_id)).deployment_id is not None
        except ObjectNotFound:
            return False


def resume_deployed(flow_run_id: str, say: Callable[[str], None] = lambda text: None) -> str:
    """Give a flow run back to the workers of its deployment, once its state has settled.

    Args:
        say: hears what is waited for.

    Returns: its name.

    Raises: UserError when it has completed, waits already, or is still running.
    """
    with get_client(sync_client=True) as client:
        run = _settle(client, UUID(flow_run_id), say)
        while _state(run).is_final() and not _state(run).is_completed():
            client.set_flow_run_state(run.id, AwaitingRetry(), force=True)
            say(f"{run.name} has been given back to the workers")
            run = _watch(client, run.id)
        return run.name


def _settle(client: SyncPrefectClient, run_id: UUID, say: Callable[[str], None]) -> FlowRun:
    """The run, when it has been in a final state for long enough."""
    said, deadline = "", time.monotonic() + HEARTBEATS_SECONDS
    while True:
        run = client.read_flow_run(run_id)
        state = _state(run)
        if state.is_completed():
            raise UserError(f"{run.name} has completed")
        if state.is_paused():
            raise UserError(f"{run.name} waits for an answer: resume it in the Prefect UI")
        if state.is_scheduled() or state.is_pending():
            raise UserError(f"{run.name} waits for a worker already ({state.name})")
        if state.is_final() and _age(state) >= SETTLED_SECONDS:
            return run
        waiting_for = (
            f"{run.name} is {state.name}; waiting {SETTLED_SECONDS:.0f} s until that has settled"
            if state.is_final()
            else f"{run.name} is {state.name}; waiting for it to end, or for its heartbeats to stop"
        )
        if not state.is_final() and time.monotonic() >= deadline:
            raise UserError(
                f"{run.name} is still {state.name}; if its process is gone, change its state to "
                "Crashed in the Prefect UI, then try again"
            )
        if waiting_for != said:
            say(waiting_for)
            said = waiting_for
        time.sleep(POLL_SECONDS)


def _watch(client: SyncPrefectClient, run_id: UUID) -> FlowRun:
    """The run as soon as it runs, or some time later: a late report may have ended it again.

    A worker may have taken it up before that report, so a process may be on its way all the same.
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

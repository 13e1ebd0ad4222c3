"""What follows when a batch whose votes are trained on is complete: a run of its deployment, once.

Whoever runs `watch` looks for such batches. The flow run gets a key of the batch, with which
Prefect makes one run however often it is asked: by several watchers, after a crash, or after a
restart. What is in the way (no such deployment, one that is paused, a run of it that is still under
way, a server that does not answer) is written to the batch, where the admin's page shows it, and
tried again.

A batch that starts nothing is announced by the event `rlhf.preferences.ready` of its project, on
which an automation may act. One that starts a deployment is announced too, under a resource of its
own, so that the same automation does not start a second run.
"""

import logging
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from sqlalchemy import func, select

from rlhf_core.errors import brief
from rlhf_core.redaction import masked
from tasks.feedback.asking import batches
from tasks.feedback.store import clock
from tasks.feedback.store.content import digest
from tasks.feedback.store.store import FeedbackProject, Store
from tasks.feedback.store.tables import Batch, Judgment
from tasks.prefect import events

LOOK_AGAIN_SECONDS = 60.0  # at a batch in which nothing has happened
UNDER_WAY = (StateType.RUNNING, StateType.PENDING, StateType.PAUSED, StateType.CANCELLING)
log = logging.getLogger(__name__)


@dataclass
class Looked:
    """What a watcher remembers of batches that are not complete: when it looked, and at which
    votes."""

    at: dict[int, tuple[int, float]] = field(default_factory=dict)

    def is_due(self, batch: int, last_vote: int) -> bool:
        """Whether a batch may be complete since."""
        vote, when = self.at.get(batch, (-1, 0.0))
        return vote != last_vote or time.monotonic() - when >= LOOK_AGAIN_SECONDS

    def keep(self, batch: int, last_vote: int) -> None:
        """Remember that it is not complete."""
        self.at[batch] = last_vote, time.monotonic()


def key_of(project: str, name: str, created: datetime) -> str:
    """The key of the run that a batch starts.

    The time tells it from a batch of that name in a store that was made anew.
    """
    return f"batch-{digest(project, name, created.isoformat())[:32]}"


def start_ready(store: Store, looked: Looked | None = None) -> list[str]:
    """Start what follows complete batches.

    Returns: a line for each that was started or announced.

    Raises: StoreError. What goes wrong with one batch is written to it, and does not raise.
    """
    looked = looked or Looked()
    lines: list[str] = []
    for project_id, batch in batches.followed(store.database):
        project = store.by_id(project_id)
        last = _last_vote(project)
        if not looked.is_due(batch, last):
            continue
        standing = batches.stand(project, batch)
        if not standing.complete:
            looked.keep(batch, last)
            continue
        try:
            line, problem = _follow(project, batch, standing)
        except Exception as error:
            said = brief(masked(str(error))) or "no reason given"
            refused = isinstance(error, PrefectHTTPStatusError)
            what = "refused to start it" if refused else "did not answer"
            line, problem = "", f"Prefect {what} ({type(error).__name__}: {said})"
        if batches.say(project, batch, problem) and problem:
            log.warning(
                "the batch %s of %s is complete, and starts nothing yet: %s",
                *(standing.name, project.name, problem),
            )
        if line:
            log.info("%s", line)
            lines.append(line)
    return lines


def _follow(project: FeedbackProject, batch: int, standing: batches.Standing) -> tuple[str, str]:
    """A line about what was done, or a sentence about what is in the way."""
    then = standing.then
    if then and not standing.pairs:
        return "", "it has no pairs, so nothing was learnt from it: ask about other prompts"
    with project.database.reading() as session:
        row = session.get_one(Batch, batch)
        key = key_of(project.name, row.name, row.created_at)
    told: dict[str, Any] = {"batch": standing.name, "pairs": standing.pairs}
    with get_client(sync_client=True) as client:
        if not then:
            events.batch_complete(client, project.name, standing.answered, key, told)
            batches.followed_by(project, batch)
            return f"the batch {standing.name} of {project.name} is complete", ""
        run, problem = _start(client, then, key, standing)
        if run is None:
            return "", problem
        project.content.withdraw(batch)  # the rest is no longer asked about, as of judges
        batches.followed_by(project, batch, str(run.id))
        told |= {"deployment": then, "flow_run": str(run.id)}
        try:
            events.batch_complete(client, project.name, standing.answered, key, told)
        except Exception as error:  # it only tells
            log.warning("the event %s could not be sent (%s)", events.PREFERENCES_READY, error)
    answered = f"{standing.answered:,} of {standing.pairs:,} pairs"
    return f"{then} is started: {answered} of the batch {standing.name} are answered", ""


def _start(
    client: SyncPrefectClient, then: str, key: str, standing: batches.Standing
) -> tuple[FlowRun | None, str]:
    """The run of the batch, made unless it is there, or what is in the way."""
    mine = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key]))
    if found := client.read_flow_runs(flow_run_filter=mine, limit=1):
        return found[0], ""
    try:
        deployment = client.read_deployment_by_name(then)
    except ObjectNotFound:
        return None, (
            f"Prefect has no deployment {then}: register it with `rlhf deploy`, or stop the loop "
            f"with `rlhf feedback loop {standing.project} --stop`"
        )
    if deployment.paused:
        return None, f"the deployment {then} is paused: switch it on in Prefect, and it goes on"
    if (other := _under_way(client, deployment)) is not None:
        return None, f"the run {other.name} of {then} comes first ({_state(other)})"
    run = client.create_flow_run_from_deployment(
        deployment.id, idempotency_key=key, tags=[f"batch:{standing.name}"]
    )
    return run, ""


def _under_way(client: SyncPrefectClient, deployment: DeploymentResponse) -> FlowRun | None:
    """A run of a deployment that has not ended; one that is planned for later does not count."""
    ours = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
    types = [*UNDER_WAY, StateType.SCHEDULED]
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=types))
    found = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=state), deployment_filter=ours, limit=200
    )
    return next((run for run in found if not _is_planned(run)), None)


def _is_planned(run: FlowRun) -> bool:
    if run.state is None or not run.state.is_scheduled() or run.run_count:
        return False
    at = run.state.state_details.scheduled_time
    return run.auto_scheduled or (at is not None and at > clock.now())


def _state(run: FlowRun) -> str:
    return str(run.state.name) if run.state is not None else "without a state"


def _last_vote(project: FeedbackProject) -> int:
    """What the queue has seen last: a skip and a withdrawal are judgments too."""
    with project.database.reading() as session:
        query = select(func.max(Judgment.id)).where(Judgment.project_id == project.id)
        return session.scalar(query) or 0

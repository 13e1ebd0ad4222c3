"""Events of a pipeline in Prefect, which automations react to and the UI lists.

| event | resource | payload |
|---|---|---|
| `rlhf.stage.finished` | `rlhf.stage.PROJECT.STAGE` | `stage`, `run_id`, `versions` |
| `rlhf.monitor.tripped` | `rlhf.stage.PROJECT.STAGE` | `stage`, `run_id`, `monitor`, `said` |
| `rlhf.gate.refused` | `rlhf.model.PROJECT-policy` | `candidate`, `reasons` |
| `rlhf.champion.changed` | `rlhf.model.PROJECT-policy` | `old`, `new`, `how`, `by` |
| `rlhf.preferences.ready` | `rlhf.project.PROJECT` or `rlhf.batch.PROJECT` | `count` |

Each payload also has `project`. `run_id` is the MLflow run of the stage; `versions`, by kind, and
`candidate`, `old` (empty if there was none) and `new` have the form `models:/NAME/VERSION`;
`monitor` is `kl_budget`, `numerics`, or a measure of the monitor (docs/monitor.md), with which the
payload also has `at_iteration`, `value`, `limit` and `action`; `reasons` is a list of sentences;
`how` is `promotion` or `rollback`.

`rlhf.preferences.ready` is sent by whoever calls `preferences_ready`, and when a batch of people's
votes is complete: under the project, so that an automation may act, or under `rlhf.batch.PROJECT`
if the batch has started its deployment itself. The latter two have `batch`, `pairs`, and with a
deployment `deployment` and `flow_run`.

Prefect adds the flow run, its deployment and tags as related resources. Events are sent in the
background. If one cannot be sent a warning is logged; outside Prefect nothing happens.

Every process that runs a flow of this project sends Prefect's heartbeat event every 30 seconds,
regardless of its environment (`beat_often`). The server detects a dead process by missing
heartbeats (flows/deploy/automations.py); at Prefect's default of 180 seconds a healthy run would be
taken for dead.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from uuid import NAMESPACE_URL, uuid5

from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient
from prefect.events import Event, Resource, emit_event
from prefect.settings import get_current_settings

from rlhf_core.errors import NumericsError
from rlhf_core.metrics import Alarm
from tasks.prefect.ui import PrefectRun
from tasks.record import tags
from tasks.registry.refs import ModelRef, PipelineRun
from tasks.settings import read_settings

STAGE_FINISHED = "rlhf.stage.finished"
MONITOR_TRIPPED = "rlhf.monitor.tripped"
GATE_REFUSED = "rlhf.gate.refused"
CHAMPION_CHANGED = "rlhf.champion.changed"
PREFERENCES_READY = "rlhf.preferences.ready"

HEARTBEAT_SECONDS = 30  # the minimum that Prefect allows
log = logging.getLogger(__name__)


def beat_often() -> None:
    """Send the heartbeats of flow runs that start from now on every 30 seconds."""
    flows = get_current_settings().flows
    if flows.heartbeat_frequency is not None:  # as in tests
        flows.heartbeat_frequency = HEARTBEAT_SECONDS


@contextmanager
def announced(client: MlflowClient, run: PipelineRun, stage: str, run_id: str) -> Iterator[None]:
    """Send events when a stage finishes or one of its monitors trips."""
    what: dict[str, Any] = {"project": run.project, "stage": stage, "run_id": run_id}
    resource = f"rlhf.stage.{run.project}.{stage}"
    try:
        yield
    except NumericsError as error:
        _emit(MONITOR_TRIPPED, resource, {**what, "monitor": "numerics", "said": str(error)})
        raise
    if not _prefect_is_in_use():
        return
    with _warn_on_failure(STAGE_FINISHED):
        data = client.get_run(run_id).data
        if data.metrics.get(f"{tags.SUMMARY}over_kl_budget"):
            kl = data.metrics[f"{tags.SUMMARY}kl"]
            reason = f"the KL to SFT reached {kl:.2f} nats per sequence"
            _emit(MONITOR_TRIPPED, resource, {**what, "monitor": "kl_budget", "said": reason})
        versions = {kind: ref.uri for kind, ref in tags.models(data.tags).items()}
        _emit(STAGE_FINISHED, resource, {**what, "versions": versions})


def monitor_tripped(project: str, stage: str, run_id: str, alarm: Alarm) -> None:
    """Send an event: a measure of the monitor went beyond its limit."""
    payload: dict[str, Any] = {"project": project, "stage": stage, "run_id": run_id}
    payload |= {"monitor": alarm.measure}
    payload |= {"said": alarm.line, "at_iteration": alarm.step, "value": alarm.value}
    payload |= {"limit": alarm.limit, "action": alarm.action}
    _emit(MONITOR_TRIPPED, f"rlhf.stage.{project}.{stage}", payload)


def gate_refused(project: str, candidate: ModelRef, reasons: Sequence[str]) -> None:
    """Send an event: a policy was not promoted."""
    payload = {"project": project, "candidate": candidate.uri, "reasons": list(reasons)}
    _emit(GATE_REFUSED, f"rlhf.model.{candidate.name}", payload)


def champion_changed(
    project: str,
    old: ModelRef | None,
    new: ModelRef,
    *,
    how: Literal["promotion", "rollback"],
    by: str,
) -> None:
    """Send an event: the champion is another version now."""
    before = old.uri if old else ""
    payload = {"project": project, "old": before, "new": new.uri, "how": how, "by": by}
    _emit(CHAMPION_CHANGED, f"rlhf.model.{new.name}", payload)


def preferences_ready(project: str, count: int) -> None:
    """Send an event: there are enough new preferences to train on."""
    _emit(PREFERENCES_READY, f"rlhf.project.{project}", {"project": project, "count": count})


def batch_complete(
    client: SyncPrefectClient, project: str, count: int, key: str, more: Mapping[str, Any]
) -> None:
    """Send an event: a batch of votes is complete. Sent twice for one key it is one event.

    Unlike the others it is sent at once, and whoever sends it learns whether it has arrived.

    Raises: whatever Prefect's client raises when its server does not answer.
    """
    resource = f"rlhf.{'batch' if 'deployment' in more else 'project'}.{project}"
    labels = {"prefect.resource.id": resource, "prefect.resource.name": project}
    event = Event(
        id=uuid5(NAMESPACE_URL, key),
        event=PREFERENCES_READY,
        resource=Resource({**labels, "rlhf.project": project}),
        payload={"project": project, "count": count, **more},
    )
    client.request("POST", "/events", json=[event.model_dump(mode="json")])


def _emit(event: str, resource: str, payload: dict[str, Any]) -> None:
    if not _prefect_is_in_use():
        return
    with _warn_on_failure(event):
        name = resource.rpartition(".")[2]
        labels = {"prefect.resource.id": resource, "prefect.resource.name": name}
        emit_event(event, {**labels, "rlhf.project": payload["project"]}, payload=payload)


def _prefect_is_in_use() -> bool:
    return PrefectRun.current() is not None or bool(read_settings().prefect_api_url)


@contextmanager
def _warn_on_failure(event: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        log.warning("the event %s could not be sent", event, exc_info=True)

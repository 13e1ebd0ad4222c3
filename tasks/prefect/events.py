"""What happens in a pipeline as Prefect events: automations act on them, the UI lists them.

| event | resource | payload |
|---|---|---|
| `rlhf.stage.finished` | `rlhf.stage.PROJECT.STAGE` | `stage`, `run_id`, `versions` |
| `rlhf.monitor.tripped` | `rlhf.stage.PROJECT.STAGE` | `stage`, `run_id`, `monitor`, `said` |
| `rlhf.gate.refused` | `rlhf.model.PROJECT-policy` | `candidate`, `reasons` |
| `rlhf.champion.changed` | `rlhf.model.PROJECT-policy` | `old`, `new`, `how`, `by` |
| `rlhf.preferences.ready` | `rlhf.project.PROJECT` | `count` |

Each payload has `project` too. `run_id` is the MLflow run of the stage; `versions`, by kind, and
`candidate`, `old` (empty: there was none) and `new` are written `models:/NAME/VERSION`; `monitor`
is `kl_budget` or `numerics`; `reasons` is a list of sentences; `how` is `promotion` or `rollback`.

Prefect adds the flow run, its deployment and tags as related resources. Events are sent in the
background. One that cannot be sent is a warning, and outside Prefect nothing happens.

Prefect's own event of a run that lives, its heartbeat, comes every 30 seconds from each process
that runs a flow of this project, whatever its environment says (`beat_often`): by its absence the
server tells that a process is gone (flows/deploy/automations.py), and at Prefect's 180 seconds a
healthy run would be absent.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from mlflow import MlflowClient
from prefect.events import emit_event
from prefect.settings import get_current_settings

from rlhf_core.errors import NumericsError
from tasks.prefect.ui import PrefectRun
from tasks.record import tags
from tasks.registry.refs import ModelRef, PipelineRun
from tasks.settings import read_settings

STAGE_FINISHED = "rlhf.stage.finished"
MONITOR_TRIPPED = "rlhf.monitor.tripped"
GATE_REFUSED = "rlhf.gate.refused"
CHAMPION_CHANGED = "rlhf.champion.changed"
PREFERENCES_READY = "rlhf.preferences.ready"

HEARTBEAT_SECONDS = 30  # the least that Prefect takes
log = logging.getLogger(__name__)


def beat_often() -> None:
    """Have Prefect send the heartbeats of runs that begin from here on every 30 seconds."""
    flows = get_current_settings().flows
    if flows.heartbeat_frequency is not None:  # as in tests
        flows.heartbeat_frequency = HEARTBEAT_SECONDS


@contextmanager
def announced(client: MlflowClient, run: PipelineRun, stage: str, run_id: str) -> Iterator[None]:
    """Around a stage: tell that it has finished, and which of its monitors has tripped."""
    what: dict[str, Any] = {"project": run.project, "stage": stage, "run_id": run_id}
    resource = f"rlhf.stage.{run.project}.{stage}"
    try:
        yield
    except NumericsError as error:
        _emit(MONITOR_TRIPPED, resource, {**what, "monitor": "numerics", "said": str(error)})
        raise
    if not _anybody_listens():
        return
    with _only_a_warning(STAGE_FINISHED):
        data = client.get_run(run_id).data
        if data.metrics.get(f"{tags.SUMMARY}over_kl_budget"):
            kl = data.metrics[f"{tags.SUMMARY}kl"]
            said = f"the KL to SFT came to {kl:.2f} nats per sequence"
            _emit(MONITOR_TRIPPED, resource, {**what, "monitor": "kl_budget", "said": said})
        versions = {kind: ref.uri for kind, ref in tags.models(data.tags).items()}
        _emit(STAGE_FINISHED, resource, {**what, "versions": versions})


def gate_refused(project: str, candidate: ModelRef, reasons: Sequence[str]) -> None:
    """A policy was not promoted."""
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
    """Another version is in use from now on."""
    before = old.uri if old else ""
    payload = {"project": project, "old": before, "new": new.uri, "how": how, "by": by}
    _emit(CHAMPION_CHANGED, f"rlhf.model.{new.name}", payload)


def preferences_ready(project: str, count: int) -> None:
    """There are enough new preferences to train on."""
    _emit(PREFERENCES_READY, f"rlhf.project.{project}", {"project": project, "count": count})


def _emit(event: str, resource: str, payload: dict[str, Any]) -> None:
    if not _anybody_listens():
        return
    with _only_a_warning(event):
        name = resource.rpartition(".")[2]
        labels = {"prefect.resource.id": resource, "prefect.resource.name": name}
        emit_event(event, {**labels, "rlhf.project": payload["project"]}, payload=payload)


def _anybody_listens() -> bool:
    return PrefectRun.current() is not None or bool(read_settings().prefect_api_url)


@contextmanager
def _only_a_warning(event: str) -> Iterator[None]:
    try:
        yield
    except Exception:
        log.warning("the event %s could not be sent", event, exc_info=True)

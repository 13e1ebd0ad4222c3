"""Automations of the Prefect server: mark dead runs as crashed, retrain, notify people.

`rlhf deploy` registers them by name. Registering them again updates what changed, and an automation
that somebody disabled stays disabled.

* **Dead runs.** When a worker and its flow are killed together, nothing reports the crash and the
  run would stay Running for ever. Its heartbeats stop, so the server marks it Crashed. We never
  retry it automatically: Prefect loses a retry within seconds of a crash, and a worker with a limit
  dies of it. `rlhf resume` resumes the run.
* **Retraining.** The event `rlhf.preferences.ready` of a project starts its deployment of
  `retrain`.
* **Notifications.** Events that people should know of are posted to a webhook, if one is set.

On SQLite Prefect acts on one event several times ("database is locked"). Marking a run Crashed
twice does no harm; the other automations are created only on PostgreSQL.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Final, cast
from uuid import UUID

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState, RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.types import SecretDict

from flows import stages
from flows.feedback import feedback
from flows.retrain import retrain
from flows.rlhf import rlhf
from flows.sweep import sweep, sweep_point
from tasks.prefect import events
from tasks.settings import Settings

FLOWS: Final = [
    flow.name
    for flow in (
        *(rlhf, retrain, sweep, sweep_point, feedback),
        *stages.SINGLE_FLOWS,
    )
]
OURS: Final = {"prefect.resource.role": "flow", "prefect.resource.name": FLOWS}
# States without heartbeats. A Suspended or Paused run waits for an answer.
ENDS: Final = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended")
HEARTBEAT: Final = "prefect.flow-run.heartbeat"
SILENCE: Final = timedelta(seconds=3 * events.HEARTBEAT_SECONDS)
DRIVER: Final = "PREFECT_SERVER_DATABASE_DRIVER"
WEBHOOK: Final = "rlhf-notify"


def register(settings: Settings) -> list[str]:
    """Create or update every automation on the Prefect server of the environment.

    Returns: one line per automation: its name, or why it was not created.
    """
    with get_client(sync_client=True) as client:
        wanted, left_out = [without_process()], []
        if not on_postgresql(client):
            left_out = [
                "retrain and notify: not created, because Prefect on SQLite acts several times on "
                f"one event (for a server on PostgreSQL set {DRIVER}=postgresql+asyncpg)"
            ]
        else:
            wanted += retraining(client)
            if settings.notify_webhook.get_secret_value():
                wanted += notifications(settings)
            else:
                left_out = ["notify: not created, because RLHF_NOTIFY_WEBHOOK is not set"]
        for automation in wanted:
            put(client, automation)
        return [automation.name for automation in wanted] + left_out


def on_postgresql(client: SyncPrefectClient) -> bool:
    """Whether the server reports a PostgreSQL driver; it does not report the URL."""
    told = client.request("GET", "/admin/settings").json()
    return str(told["server"]["database"]["driver"]).startswith("postgresql")


def put(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    """Create the automation, or update the one with its name."""
    known = client.read_automations_by_name(wanted.name)
    if not known:
        client.create_automation(wanted)
        return
    # Via a dict: the client sends only fields that were set, and an action's type is a default.
    content = wanted.model_dump(exclude={"owner_resource"}) | {"enabled": known[0].enabled}
    client.update_automation(known[0].id, AutomationCore.model_validate(content))


def without_process() -> AutomationCore:
    """Mark a run of ours as Crashed if its heartbeats stop and it reported no end."""
    return AutomationCore(
        name="rlhf: a run whose process is gone has crashed",
        description="`rlhf resume` resumes it.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=OURS,
            for_each={"prefect.resource.id"},
            after={HEARTBEAT},
            expect={HEARTBEAT, *(f"prefect.flow-run.{state}" for state in ENDS)},
            within=SILENCE,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"No heartbeat for {SILENCE.total_seconds():.0f} seconds: its process is "
                "gone. `rlhf resume` resumes it.",
            )
        ],
    )


def retraining(client: SyncPrefectClient) -> Iterator[AutomationCore]:
    """Run each deployment of `retrain` when the preferences of its project are ready.

    The deployment counts them itself, so a spurious event starts no training.
    """
    only = FlowFilter(name=FlowFilterName(any_=[retrain.name]))
    for deployment in client.read_deployments(flow_filter=only):
        project = deployment.parameters["config"]["pipeline"]["project"]
        yield AutomationCore(
            name=f"rlhf: retrain/{deployment.name} when preferences are ready",
            trigger=EventTrigger(
                match={"prefect.resource.id": f"rlhf.project.{project}"},
                expect={events.PREFERENCES_READY},
            ),
            actions=[RunDeployment(deployment_id=deployment.id)],
        )


def notifications(settings: Settings) -> Iterator[AutomationCore]:
    """Post new champions, refusals, tripped monitors, and runs that failed or wait for a person."""
    webhook = Webhook(
        url=settings.notify_webhook,
        headers=SecretDict({"Content-Type": "application/json"}),
    )
    block = cast(UUID, webhook.save(WEBHOOK, overwrite=True))
    page = f"{settings.prefect_public_url}/runs/flow-run/"
    yield AutomationCore(
        name="rlhf: tell of champions, refusals and monitors",
        trigger=EventTrigger(
            match={"prefect.resource.id": "rlhf.*"},
            expect={events.CHAMPION_CHANGED, events.GATE_REFUSED, events.MONITOR_TRIPPED},
        ),
        actions=[_post(block, "event.event ~ ' ' ~ (event.payload | tojson)")],
    )
    yield AutomationCore(
        name="rlhf: tell of runs that failed or wait for a person",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=OURS,
            expect={f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "Suspended")},
        ),
        actions=[
            _post(
                block,
                "flow_run.name ~ ' is ' ~ flow_run.state.name ~ (': ' ~ flow_run.state.message "
                f"if flow_run.state.message else '') ~ ' {page}' ~ flow_run.id",
            )
        ],
    )


def _post(block: UUID, text: str) -> CallWebhook:
    """A message in the format of Slack and Mattermost; `text` is a Jinja expression."""
    return CallWebhook(block_document_id=block, payload=f'{{"text": {{{{ ({text}) | tojson }}}}}}')

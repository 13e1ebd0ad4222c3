"""What the Prefect server does by itself: end runs whose process is gone, retrain, tell people.

Declared here, and registered by `rlhf deploy`, each under its name: doing so again changes what is
different and keeps an automation switched off that people have switched off.

* **Runs whose process is gone.** When a worker and its flow are killed together, nobody reports
  it, and the run would be Running for ever. Its heartbeats stop, and the server marks it Crashed.
  It is never started again by itself: a retry within seconds of a crash is lost, and a worker with
  a limit dies of it. `rlhf resume` goes on with it.
* **Retrain.** `rlhf.preferences.ready` of a project starts its deployment of `retrain`.
* **Tell people.** What they have to know or to do is posted to a webhook, if there is one.

On SQLite Prefect acts on one event several times ("database is locked"). Marking a run Crashed
twice does no harm; the other automations are made on PostgreSQL alone.
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
from flows.retrain import retrain
from flows.rlhf import rlhf
from flows.sweep import sweep, sweep_point
from tasks.prefect import events
from tasks.settings import Settings

FLOWS: Final = [
    flow.name
    for flow in (
        *(rlhf, retrain, sweep, sweep_point),
        *(stages.prepare, stages.sft, stages.reward_model, stages.policy, stages.evaluation),
    )
]
OURS: Final = {"prefect.resource.role": "flow", "prefect.resource.name": FLOWS}
# What a run may do instead of a heartbeat. Suspended and Paused: it waits for an answer.
ENDS: Final = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended")
HEARTBEAT: Final = "prefect.flow-run.heartbeat"
SILENCE: Final = timedelta(seconds=3 * events.HEARTBEAT_SECONDS)
DRIVER: Final = "PREFECT_SERVER_DATABASE_DRIVER"
WEBHOOK: Final = "rlhf-notify"


def register(settings: Settings) -> list[str]:
    """Create or change every automation on the Prefect server of the environment.

    Returns: a line for each: its name, or why it was not made.
    """
    with get_client(sync_client=True) as client:
        wanted, left_out = [without_process()], []
        if not on_postgresql(client):
            left_out = [
                "retrain and notify: not made, as Prefect on SQLite acts several times on one event"
                f" (a server on PostgreSQL says so by {DRIVER}=postgresql+asyncpg)"
            ]
        else:
            wanted += retraining(client)
            if settings.notify_webhook.get_secret_value():
                wanted += notifications(settings)
            else:
                left_out = ["notify: not made, as RLHF_NOTIFY_WEBHOOK is not set"]
        for automation in wanted:
            put(client, automation)
        return [automation.name for automation in wanted] + left_out


def on_postgresql(client: SyncPrefectClient) -> bool:
    """Whether the server says that its database is PostgreSQL; it keeps the URL to itself."""
    told = client.request("GET", "/admin/settings").json()
    return str(told["server"]["database"]["driver"]).startswith("postgresql")


def put(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    """Create the automation, or make the one of its name like it."""
    known = client.read_automations_by_name(wanted.name)
    if not known:
        client.create_automation(wanted)
        return
    # Through a dict, as the client sends only what was set, and the kind of an action is a default.
    content = wanted.model_dump(exclude={"owner_resource"}) | {"enabled": known[0].enabled}
    client.update_automation(known[0].id, AutomationCore.model_validate(content))


def without_process() -> AutomationCore:
    """A run of ours whose heartbeats stop, and which reported no end, is marked Crashed."""
    return AutomationCore(
        name="rlhf: a run whose process is gone has crashed",
        description="`rlhf resume` goes on with it.",
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
                "gone. `rlhf resume` goes on with it.",
            )
        ],
    )


def retraining(client: SyncPrefectClient) -> Iterator[AutomationCore]:
    """For each deployment of `retrain`: it runs when the preferences of its project are ready.

    It counts them itself, so that an event too many starts nothing.
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
    """What happened to a champion or a training, and runs that failed or wait for an answer."""
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
    """A message as Slack, Mattermost and their like take it; `text` is an expression of Jinja."""
    return CallWebhook(block_document_id=block, payload=f'{{"text": {{{{ ({text}) | tojson }}}}}}')

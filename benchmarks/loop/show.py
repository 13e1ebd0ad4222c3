"""The show: `rlhf up` in a home of its own, people on its page, and rounds that follow each other.

1. People come in by invitations that an admin writes on the page, and vote on pairs of reviews.
2. The deployment `retrain/loop` is started once. It trains, the gate decides, and it asks people
   about pairs of the champion's answers. Whatever watches batches starts it again when they have
   voted. Nothing below starts another run, and nothing but the page writes votes.
3. The people of the last round vote at random, and the gate refuses what comes of it.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.loop import rounds as results
from benchmarks.loop.browser import Browser
from benchmarks.loop.people import Crowd, Manner
from benchmarks.loop.rounds import Round
from benchmarks.loop.sizes import Sizes
from benchmarks.loop.world import World
from flows.local import find
from rlhf_core.errors import UserError
from tasks.settings import Settings, read_settings

if TYPE_CHECKING:
    from flows.local.find import Services
    from rlhf_core.simulation import Annotator

LOOK_SECONDS = 2.0
STALLED_SECONDS = 300.0  # without a vote and without a run: something is in the way
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class StoppedError(Exception):
    """The show was asked to stop."""


class _Run(NamedTuple):
    id: str
    state: str  # its type, as RUNNING
    name: str  # of the state
    message: str


@dataclass(frozen=True)
class Plan:
    """What is shown, and for how long one waits."""

    sizes: Sizes
    seed: int
    manner: Manner = field(default_factory=Manner)
    refusal: bool = True  # whether a round of spammers follows


class Show:
    """Runs in a thread beside the services, from `begin` until `over` is set."""

    def __init__(self, world: World, plan: Plan, home: Path, console: Console) -> None:
        self.world, self.plan, self.home = world, plan, home
        self.rounds: list[Round] = []
        self.over = threading.Event()  # however it has ended
        self.error: BaseException | None = None
        self.links: list[str] = []
        self._stop = threading.Event()
        self._console = console
        self._thread = threading.Thread(target=self._guarded, name="show", daemon=True)
        self._crowd: Crowd | None = None
        self._known: set[str] = set()

    @property
    def project(self) -> str:
        """Of MLflow and of the preference store."""
        return self.world.pipeline.project

    @property
    def deployment(self) -> str:
        """The deployment that every batch starts."""
        return f"retrain/{self.project}"

    def begin(self, services: "Services", settings: Settings) -> None:
        """Start, once the services are ready."""
        from tasks.servers import sign_in

        self._console.print(
            f"Prefect, MLflow, the page for annotators and a worker run in {self.home}"
        )
        for name, address in (("Prefect", services.prefect), ("MLflow", services.mlflow)):
            self._say(f"  {name:8}{sign_in.link(address, settings.account)}")
        self._thread.start()

    def stop(self) -> None:
        """End it, and wait until its people are gone."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(40)

    # ---- the thread ----

    def _guarded(self) -> None:
        try:
            self._run()
        except StoppedError:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.over.set()

    def _run(self) -> None:
        settings = find.join(read_settings(), prefect=True)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
        )
        with (
            ExitStack() as stack,
            Progress(*columns, console=self._console, transient=True) as progress,
        ):
            invite = self._first_pairs(stack, settings)
            people = stack.enter_context(self._people(self.world.people, invite))
            self._crowd = people
            task = progress.add_task("People vote on pairs of reviews", total=self.plan.sizes.first)
            self._until(lambda: self._answered(progress, task, settings))
            progress.remove_task(task)
            self._say(f"{people.votes:,} votes over HTTP by {len(people.people)} people")
            self._close_the_loop()
            last = self.plan.sizes.rounds + int(self.plan.refusal)
            for number in range(last + 1):
                task = progress.add_task(_title(number, "waits for people"), total=None)
                run = self._next_run(progress, task, number, settings)
                if number == self.plan.sizes.rounds and self.plan.refusal:
                    # Every vote that this run trains on is there, and the next batch is not.
                    people.stop()
                    self._crowd = stack.enter_context(self._people(self.world.spammers, invite))
                self._follow(progress, task, number, run, settings)
                progress.remove_task(task)

    def _first_pairs(self, stack: ExitStack, settings: Settings) -> Callable[[str], str]:
        """Put the first pairs into the queue. Returns: what makes an invitation, as an admin."""
        self._command("feedback", "import", self.project, self.world.pairs, "--ask", 1)
        link = self._command("feedback", "invite", self.project, "--role", "admin").strip()
        admin = Browser(self._stop)
        stack.callback(admin.close)
        admin.come_in(link)
        return admin.invite

    def _people(self, annotators: "Sequence[Annotator]", invite: Callable[[str], str]) -> Crowd:
        return Crowd(annotators, invite, seed=self.plan.seed, manner=self.plan.manner)

    def _answered(self, progress: Progress, task: Any, settings: Settings) -> bool:
        left = self._left(settings)
        progress.update(task, completed=max(0, self.plan.sizes.first - left))
        return not left

    def _left(self, settings: Settings) -> int:
        """Votes that are still wanted."""
        from tasks.feedback.store.store import Store

        store = Store.open(settings)
        try:
            return next(found.missing for found in store.summaries() if found.name == self.project)
        finally:
            store.close()

    def _close_the_loop(self) -> None:
        """Give the deployment what the form in Prefect has: what is asked after each training."""
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import DeploymentUpdate

        from flows.retrain import RetrainConfig

        sizes = self.plan.sizes
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(self.deployment)
            first = {
                **deployment.parameters["config"],
                "min_new_preferences": min(sizes.first, sizes.each) // 2,
                "rounds": sizes.rounds + int(self.plan.refusal),
                "ask": {
                    "project": self.project,
                    "prompts": sizes.each,
                    "then": self.deployment,
                    "seed": self.plan.seed,
                },
            }
            RetrainConfig.model_validate(first)
            # The demonstrations stay as they are, so SFT is trained once.
            later = {**first["pipeline"], "sft": {"reuse": f"models:/{self.project}-sft/1"}}
            client.update_deployment(
                deployment.id, DeploymentUpdate(parameters={"config": {**first, "pipeline": later}})
            )
            client.create_flow_run_from_deployment(deployment.id, parameters={"config": first})

    def _next_run(self, progress: Progress, task: Any, number: int, settings: Settings) -> _Run:
        """The run that follows the last one; people vote until it begins."""
        since, votes = time.monotonic(), -1
        while True:
            for run in self._runs():
                if run.id not in self._known:
                    self._known.add(run.id)
                    return run
            assert self._crowd is not None
            if self._crowd.votes != votes:
                since, votes = time.monotonic(), self._crowd.votes
            if time.monotonic() - since > STALLED_SECONDS:
                raise UserError(
                    f"{_title(number, '')} does not begin: nobody has voted for "
                    f"{STALLED_SECONDS:.0f} s, {self._left(settings):,} votes are missing, and no "
                    f"run of {self.deployment} was started; see {self.home / 'logs'}"
                )
            left = self._left(settings)
            progress.update(task, description=_title(number, f"people vote, {left:,} pairs left"))
            self._wait()

    def _follow(
        self, progress: Progress, task: Any, number: int, run: _Run, settings: Settings
    ) -> None:
        """Watch a run until it ends, and keep what came of it."""
        start = time.monotonic()
        while run.state not in FINAL:
            stage = self._stage(settings)
            progress.update(task, description=_title(number, stage or run.name.lower()))
            self._wait()
            run = next(found for found in self._runs() if found.id == run.id)
        seconds = time.monotonic() - start
        spam = number > self.plan.sizes.rounds
        who = f"{len(self.world.spammers if spam else self.world.people)} " + (
            "spammers" if spam else "people"
        )
        found = results.look(
            run.id,
            settings,
            project=self.project,
            number=number,
            who=who,
            state=run.name,
            seconds=seconds,
        )
        self.rounds.append(found)
        results.write(self.rounds, self.home / "rounds.json", seed=self.plan.seed)
        self._say(sentence(found))
        if run.state != "COMPLETED":
            raise UserError(f"{_title(number, '')} ended as {run.name}: {run.message}")

    def _runs(self) -> list[_Run]:
        """Runs of the deployment, oldest first."""
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import (
            DeploymentFilter,
            DeploymentFilterName,
            FlowFilter,
            FlowFilterName,
        )
        from prefect.client.schemas.sorting import FlowRunSort

        flow, _, name = self.deployment.partition("/")
        with get_client(sync_client=True) as client:
            found = client.read_flow_runs(
                flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])),
                deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[name])),
                sort=FlowRunSort.START_TIME_ASC,
            )
        return [
            _Run(
                str(run.id),
                str(run.state.type.value) if run.state else "",
                str(run.state.name) if run.state else "",
                (run.state.message or "") if run.state else "",
            )
            for run in found
        ]

    def _stage(self, settings: Settings) -> str:
        """The names of the stages that run now."""
        from mlflow import MlflowClient

        client = MlflowClient()
        experiment = client.get_experiment_by_name(self.project)
        if experiment is None:
            return ""
        running = client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'")
        names = {run.data.tags.get("stage", "") for run in running} - {"", "pipeline"}
        return ", ".join(sorted(names))

    def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._wait()

    def _wait(self) -> None:
        """Let some time pass.

        Raises: StoppedError; what went wrong for somebody who labels.
        """
        if self._crowd is not None:
            self._crowd.check()
        if self._stop.wait(LOOK_SECONDS):
            raise StoppedError

    def _command(self, *words: object) -> str:
        """What `rlhf` prints."""
        command = [str(word) for word in words]
        self._say(f"$ rlhf {' '.join(command)}")
        done = subprocess.run(
            [sys.executable, "-P", "-m", "rlhf_command", *command],
            env={**os.environ, "RLHF_HOME": str(self.home)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(
                f"rlhf {command[0]} ended with {done.returncode}: {done.stderr.strip()}"
            )
        return done.stdout

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _title(number: int, what: str) -> str:
    title = "the first policy" if not number else f"round {number}"
    return f"{title}: {what}" if what else title


def sentence(found: Round) -> str:
    """A round in a line."""
    worth = "" if found.policy is None else f", true reward {found.policy[0]:.2f}"
    why = f" ({found.failed[0]})" if found.failed else ""
    return (
        f"{found.title}: {found.votes:,} votes{worth}, {found.outcome}{why}, {found.seconds:.0f} s"
    )

"""The next batch of a loop, asked for by the run that has trained on the votes of the last one.

What it is follows from the votes that were trained on: a run that is repeated after a crash asks
for the same batch, and without a new vote there is no new batch. At most one batch at a time waits
to start a deployment, and the rounds since a person asked are counted, so that a loop cannot run
away.
"""

import logging
from datetime import datetime
from typing import Any, NamedTuple

from prefect.context import FlowRunContext
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select

from rlhf_core.errors import DataError
from rlhf_core.metrics import StageLogger
from tasks.feedback.asking.ask import Asked, ask, link_to, showing
from tasks.feedback.asking.config import AskConfig
from tasks.feedback.asking.starting import key_of
from tasks.feedback.asking.votes import opened, patiently
from tasks.feedback.store.content import digest
from tasks.feedback.store.tables import ASK, Batch
from tasks.prefect.ui import artifact_key, show_page, stage_task
from tasks.record import tags
from tasks.record.record import Record
from tasks.registry.champion import champion_of, policy_of
from tasks.registry.refs import ModelRef
from tasks.settings import Settings, read_settings

log = logging.getLogger(__name__)


class Caller(NamedTuple):
    """The flow run that asks, and the key with which a batch has started it; empty = it has not."""

    flow_run: str
    key: str

    @classmethod
    def current(cls) -> "Caller":
        """That of this flow."""
        context = FlowRunContext.get()
        run = context.flow_run if context else None
        return cls("", "") if run is None else cls(str(run.id), run.idempotency_key or "")


class Continued(BaseModel):
    """What came of a round, and what follows."""

    model_config = ConfigDict(frozen=True)

    number: int  # of the round that has ended
    asked: Asked | None = None
    why: str = ""  # nothing is asked

    @property
    def sentence(self) -> str:
        """What follows, in words."""
        if self.asked is None:
            return f"nobody is asked: {self.why}"
        return self.asked.sentence


class _Known(NamedTuple):
    """A batch of the store."""

    name: str
    created: datetime
    flow_run: str
    settled: bool
    details: dict[str, Any]

    @property
    def number(self) -> int:
        return int(self.details.get("round", 1))


def next_batch(
    config: AskConfig,
    settings: Settings,
    logger: StageLogger | None = None,
    *,
    of: str,
    caller: Caller,
    rounds: int,
    votes: str,
    candidate: ModelRef | None = None,
) -> Continued:
    """Ask people about the champion, or say why nobody is asked.

    Args:
        config: without a policy.
        of: the project whose champion answers.
        rounds: so many may follow one another.
        votes: a digest of what was trained on.
        candidate: who is asked about while there is no champion.

    Raises: as `ask`.
    """
    known = patiently(lambda: _known(config.project, settings), settings)
    mine = next((b for b in known if caller.flow_run and b.details["by"] == caller.flow_run), None)
    if mine is not None:  # this run was stopped, and goes on
        before = AskConfig.model_validate(mine.details["settings"])
        before = before.model_copy(update={"policy": mine.details["policy"]})
        asked = ask(before, settings, logger, by=caller.flow_run, number=mine.number)
        return Continued(number=mine.number - 1, asked=asked)
    number = _number(config, known, caller)
    waiting = [b for b in known if config.then and _starts(b, config.then) and not b.settled]
    if waiting:
        why = f"the batch {waiting[-1].name} is not complete yet, and starts {config.then} then"
        return Continued(number=number, why=why)
    if config.then and number >= rounds:
        why = (
            f"round {number} was the last of {rounds} (`rounds`); "
            f"`rlhf ask {config.project} --then {config.then}` begins anew"
        )
        return Continued(number=number, why=why)
    record = Record.open(settings, patient=True)
    policy = champion_of(record, policy_of(of)) or candidate
    if policy is None:
        return Continued(number=number, why=f"{of} has no champion yet")
    config = config.model_copy(
        update={"policy": policy.uri, "seed": int(digest(config.seed, votes)[:15], 16)}
    )
    asked = ask(config, settings, logger, by=caller.flow_run, number=number + 1)
    if any(b.name == asked.batch and b.settled for b in known):
        why = f"the batch {asked.batch} is complete, and no vote has come since"
        return Continued(number=number, why=why)
    return Continued(number=number, asked=asked)


@stage_task("ask-again", "ask people again")
def ask_again(
    config: AskConfig,
    *,
    of: str,
    caller: Caller,
    rounds: int,
    votes: str,
    outcome: str,
    candidate: ModelRef | None = None,
    run_id: str = "",
) -> Continued:
    """Ask for the next batch, with the progress in Prefect, and say there what came of the round.

    Args:
        outcome: what came of the round, in words.
        run_id: of the pipeline, whose tags say it too.

    The other ones are those of `next_batch`.
    """
    settings = read_settings()
    with showing(config.project) as logger:
        continued = next_batch(
            config,
            settings,
            logger,
            of=of,
            caller=caller,
            rounds=rounds,
            votes=votes,
            candidate=candidate,
        )
    if continued.asked is not None:
        link_to(continued.asked)
    else:
        log.info("%s", continued.sentence)
    if run_id:
        told = {tags.ROUND: str(continued.number), tags.NEXT: continued.sentence}
        Record.open(settings, patient=True).add_tags(run_id, told)
    text = f"# Round {continued.number} of {config.project}\n\n{outcome}\n\n"
    text += f"**Next:** {continued.sentence}\n"
    show_page(artifact_key(config.project, "round"), text, f"{config.project}: round")
    return continued


def _known(project: str, settings: Settings) -> list[_Known]:
    """The batches of the project that something follows, oldest first."""
    try:
        with opened(settings) as store:
            found = store.project(project)
            with found.database.reading() as session:
                query = select(Batch).filter_by(project_id=found.id, kind=ASK).order_by(Batch.id)
                return [
                    _Known(
                        row.name, row.created_at, row.flow_run, row.resumed_at is not None,
                        dict(row.details),
                    )
                    for row in session.scalars(query)
                    if "then" in row.details
                ]  # fmt: skip
    except DataError:  # there is no store or no such project yet: asking makes both
        return []


def _number(config: AskConfig, known: list[_Known], caller: Caller) -> int:
    """The number of the round that this run is: that of the batch that has started it, else that of
    the last batch that was to start this deployment."""
    for batch in known:
        if caller.key and key_of(config.project, batch.name, batch.created) == caller.key:
            return batch.number
    last = [batch.number for batch in known if config.then and _starts(batch, config.then)]
    return last[-1] if last else 0


def _starts(batch: _Known, deployment: str) -> bool:
    return bool(batch.details["then"] == deployment)

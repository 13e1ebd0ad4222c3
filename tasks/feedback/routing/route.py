"""Have a judge answer the new pairs of a batch, and ask people about the others.

    new pairs ─ judge, both orders ─▶ sure ──▶ the judge alone, but for the audit
                                   └▶ unsure, or no answer ──▶ people, with the audit

Pairs are judged a few at a time, and each few are settled before the next are begun.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rlhf_core.errors import UserError
from rlhf_core.labelling.router import RouterConfig, route
from rlhf_core.labelling.verdicts import JudgeHabits
from rlhf_core.metrics import StageLogger
from tasks.feedback.asking import batches
from tasks.feedback.routing.config import AskJudgeConfig
from tasks.feedback.routing.judging import AskedJudge, Heard, Pinned, make_judge, pin
from tasks.feedback.routing.settle import (
    Counts,
    Unjudged,
    ask_people_about_the_rest,
    claim,
    counts,
    questions,
    settle,
    unjudged,
)
from tasks.feedback.store.store import FeedbackProject
from tasks.record.record import Record
from tasks.steps.judge import check_judge

AT_ONCE = 64  # pairs settled together
SILENT = 10  # pairs or more without any answer: the judge is down
log = logging.getLogger(__name__)


class JudgeDownError(UserError):
    """The judge has answered a part of the pairs, and answers no more."""


def look_at(config: AskJudgeConfig, project: FeedbackProject, record: Record) -> None:
    """Find out whether a judge can work, before answers are sampled for it.

    Raises: ModelError, ConfigError, DataError when it cannot.
    """
    if config.source:
        check_judge.fn(config.as_judge(pin(config, project, record).source), project.name)


def judge_batch(
    project: FeedbackProject,
    batch: int,
    config: AskJudgeConfig,
    router: RouterConfig,
    *,
    wanted: int,
    priority: int,
    record: Record,
    logger: StageLogger,
) -> tuple[Pinned, Counts]:
    """Judge what is not judged yet, and put into the queue what people have to answer.

    Args:
        wanted: votes of people on a pair; priority: their place in the queue.

    Returns: who judged, and what became of the pairs.

    Raises: JudgeDownError when the judge fails and pairs have to wait for it; ModelError,
        ConfigError when there is no such judge.
    """
    pinned = _pinned(project, batch, config, record)
    left = unjudged(project, batch)
    if left:
        claim(project, pinned.name)
        logger.phase(f"loading {pinned.name}")
        try:
            for some, heard in _heard(project, config, pinned, left, record, logger):
                ways = route(
                    [pair.digest for pair in some], [h.opinion for h in heard], router, project.name
                )
                settle(
                    project, pinned.name, list(zip(some, heard, ways, strict=True)),
                    source=pinned.source, wanted=wanted, priority=priority,
                )  # fmt: skip
        except _JudgeError as error:
            _give_up(project, batch, config, pinned.name, error.reason)
    ask_people_about_the_rest(project, batch, wanted=wanted, priority=priority)
    return pinned, counts(project, batch)


class _JudgeError(Exception):
    """What a judge could not do, and not what the store could not."""

    def __init__(self, reason: UserError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _heard(
    project: FeedbackProject,
    config: AskJudgeConfig,
    pinned: Pinned,
    left: list[int],
    record: Record,
    logger: StageLogger,
) -> Iterator[tuple[list[Unjudged], list[Heard]]]:
    """A few pairs at a time, and what the judge says of them.

    Raises: _JudgeError when it cannot work, or does not any more.
    """
    try:
        judge = make_judge(config, pinned, project.name, record, logger)
    except UserError as error:
        raise _JudgeError(error) from error
    for start in range(0, len(left), AT_ONCE):
        logger.progress(start, len(left), "judged pairs")
        some = questions(project, left[start : start + AT_ONCE])
        try:
            heard = _ask(judge, pinned.name, some)
        except UserError as error:
            raise _JudgeError(error) from error
        yield some, heard
    logger.progress(len(left), len(left), "judged pairs")


def _ask(judge: AskedJudge, name: str, pairs: list[Unjudged]) -> list[Heard]:
    """What the judge says; silence on many pairs means that it is down."""
    heard = judge([pair.question for pair in pairs])
    if len(heard) >= SILENT and all(each.opinion is None for each in heard):
        first = heard[0].a_first.reason or heard[0].b_first.reason
        raise UserError(f"the judge {name} gave no usable answer on {len(heard)} pairs ({first})")
    return heard


def _give_up(
    project: FeedbackProject, batch: int, config: AskJudgeConfig, name: str, error: UserError
) -> None:
    """Say what becomes of the pairs that are not judged.

    Raises: JudgeDownError when they wait.
    """
    left = len(unjudged(project, batch))
    if config.if_down == "people":
        log.warning("%s; people answer the %s pairs that %s has not", error, f"{left:,}", name)
        return
    raise JudgeDownError(
        f"{error}; {left:,} pairs wait for {name} and are in no queue yet: repeat the same call "
        "once it answers, which asks for nothing twice, or set judge.if_down to people"
    ) from error


def _pinned(project: FeedbackProject, batch: int, config: AskJudgeConfig, record: Record) -> Pinned:
    """The judge of the batch, which is chosen once."""
    kept: Mapping[str, Any] | None = batches.details(project.database, batch).get("judge")
    if kept is None:
        found = pin(config, project, record)
        batches.keep(project, batch, {"judge": asdict(found)})
        return found
    habits = kept["habits"]
    return Pinned(kept["source"], kept["name"], None if habits is None else JudgeHabits(**habits))

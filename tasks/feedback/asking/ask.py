"""Sample answers of registered policies to prompts, and queue pairs of them for people.

Prompts are taken and answered a few at a time, and each few are in the store before the next are
begun. What was asked is remembered with the batch, whose name follows from the settings: the same
call again goes on where it was stopped, and asks for nothing twice.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from getpass import getuser
from itertools import combinations, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from rlhf_core.backbone.context import context_of
from rlhf_core.data.encoding import Prompt
from rlhf_core.data.formats import parse
from rlhf_core.data.forms.rows import Reading
from rlhf_core.data.prepared import Split, prompt_key, read_table
from rlhf_core.data.sources import read_rows
from rlhf_core.errors import DataError
from rlhf_core.metrics import SilentLogger, StageLogger
from rlhf_core.seeding import generator
from rlhf_core.settings.judge import PeopleConfig
from rlhf_core.settings.model import SamplingConfig
from tasks.feedback.asking import batches
from tasks.feedback.asking.config import AskConfig
from tasks.feedback.asking.votes import opened
from tasks.feedback.ordering.outcome import begin
from tasks.feedback.routing.route import judge_batch, look_at
from tasks.feedback.store.content import digest
from tasks.feedback.store.records import Answer, NewPair
from tasks.feedback.store.tables import ASK, JUDGE
from tasks.prefect.ui import ArtifactDisplay, artifact_key, show_link, stage_task
from tasks.record import tags
from tasks.record.record import Record
from tasks.record.terminal import on_terminal
from tasks.registry.champion import CHAMPION
from tasks.registry.datasets import fetch_dataset
from tasks.registry.refs import DatasetRef, ModelRef
from tasks.registry.registered import find_data
from tasks.serving.generation import Writer, load_writer
from tasks.settings import Settings, read_settings

LEFT_OUT = ("identical", "empty", "too_long")
AT_ONCE = 16  # prompts answered before their pairs are queued
log = logging.getLogger(__name__)


class Asked(BaseModel):
    """What came of it."""

    model_config = ConfigDict(frozen=True)

    project: str
    batch: str
    prompts: int  # answered, of those that were wanted
    wanted: int
    pairs: int  # of the batch, in the queue or answered already
    identical: int  # pairs of equal answers, which nobody is asked about
    empty: int  # pairs with an empty answer, from which nothing could be trained
    too_long: int  # prompts that leave no room for an answer
    held_out: int  # prompts of the file that are held out for evaluation
    where: str  # people label there
    judge: str = ""  # the machine that answers pairs as well; "" = none
    alone: int = 0  # pairs that it answers without people
    audited: int = 0  # pairs of which it is sure, and which people answer all the same
    unsure: int = 0  # pairs that it has left to people
    then: str = ""  # the deployment that it starts once it is complete

    @property
    def sentence(self) -> str:
        """What came of it, in words."""
        asked = self.pairs - self.alone
        parts = [f"{asked:,} pairs on {self.prompts:,} prompts wait in the batch {self.batch}"]
        if self.judge:
            parts.append(
                f"{self.alone:,} more are answered by {self.judge} alone; of those that wait, it "
                f"was unsure of {self.unsure:,}, and {self.audited:,} are its audit"
            )
            if rest := asked - self.unsure - self.audited:
                parts.append(
                    f"{rest:,} have no answer of it: it gave none, they were asked about before, "
                    "or their prompts are held out"
                )
        if self.identical:
            parts.append(f"{self.identical:,} pairs of equal answers are not asked about")
        if self.empty:
            parts.append(f"{self.empty:,} pairs with an empty answer are not asked about")
        if self.prompts + self.too_long < self.wanted:
            parts.append(f"there are only {self.prompts + self.too_long:,} prompts")
        if self.too_long:
            parts.append(f"{self.too_long:,} prompts leave no room for an answer")
        if self.held_out:
            parts.append(f"{self.held_out:,} prompts of the file are held out, and left out here")
        said = f"{'; '.join(parts)}. People label at {self.where} (project {self.project})."
        return f"{said} Once it is complete, it starts {self.then}." if self.then else said


class _Source(NamedTuple):
    prompts: list[Prompt]
    name: str  # of where they come from
    content: str  # a digest
    held_out: int


class _Speaker(NamedTuple):
    """A policy, and how it is sampled."""

    ref: ModelRef
    writer: Writer
    max_new_tokens: int
    temperature: float


def ask(
    config: AskConfig,
    settings: Settings,
    logger: StageLogger | None = None,
    *,
    by: str = "",
    number: int = 1,
) -> Asked:
    """Queue pairs for people.

    Args:
        by: the flow run that asks; empty = a person.
        number: of the round of the loop that the batch begins.

    Raises: ModelError, DataError, ConfigError for what a user can fix; StoreError.
    """
    logger = logger or SilentLogger()
    record = Record.open(settings, patient=True)
    policy = record.store.resolve(config.policy or f"models:/{config.project}-policy@{CHAMPION}")
    refs = [policy, *([record.store.resolve(config.against)] if config.against else [])]
    judge = config.judge if config.judge.source else None
    logger.phase("finding the prompts")
    source = _prompts(config, policy, record)
    lengths = [_sampling(config, ref, record) for ref in refs]
    facts = [
        *([ref.uri for ref in refs], lengths, source.content, config.seed, config.prompts),
        *(config.answers, config.pairs, config.evaluation),
    ]
    if judge is not None:
        facts += ["judge", judge.name, judge.source, judge.endpoint.model, judge.endpoint.template]
    name = f"{ASK}-{policy.name}-{policy.version}-{digest(facts)[:8]}"
    with opened(settings, make=True) as store:
        project = store.project(config.project, make=True)
        kind = JUDGE if config.evaluation else ASK
        votes = config.votes_per_pair or project.rules.votes_per_pair
        about: dict[str, object] = {
            "settings": config.model_dump(mode="json"),
            "policy": policy.uri,
            "people": _complete(config, votes),
        }
        if judge is not None and not batches.is_asked(project, name):
            logger.phase("looking at the judge")
            look_at(judge, project, record)
        if kind == ASK:
            begin(project, getuser())
            about |= {"then": config.then, "by": by, "round": number}
        batch = project.content.batch(name, kind, about)
        before = batches.details(project.database, batch)
        done = int(before.get("done", 0))
        counts = Counter({what: int(before.get(what, 0)) for what in LEFT_OUT})
        if done < len(source.prompts):
            logger.phase("loading the models")
            speakers = [
                _Speaker(ref, load_writer(ref.uri, settings), *length)
                for ref, length in zip(refs, lengths, strict=True)
            ]
            for start in range(done, len(source.prompts), AT_ONCE):
                logger.progress(start, len(source.prompts), "prompts")
                some = source.prompts[start : start + AT_ONCE]
                new, left_out = _pairs(config, speakers, some, start, source, logger)
                # What a judge is asked first is in no queue until it has answered.
                pairs = new if judge is not None else [replace(p, wanted=votes) for p in new]
                project.content.add(pairs, batch=batch)
                counts.update(left_out)
                batches.keep(project, batch, {"done": start + len(some), **counts})
            del speakers  # a judge may need the room
        logger.progress(len(source.prompts), len(source.prompts), "prompts")
        found = len(batches.pairs_of(project.database, batch))
        judged: dict[str, Any] = {}
        if judge is not None:
            who, became = judge_batch(
                project, batch, judge, config.router, wanted=votes, priority=config.priority,
                record=record, logger=logger,
            )  # fmt: skip
            judged = {"judge": who.name, "alone": became.alone}
            judged |= {"audited": became.audited, "unsure": became.unsure}
        if "asked" not in before:
            batches.keep(project, batch, {"asked": True})
    asked = Asked(
        project=config.project,
        batch=name,
        prompts=len(source.prompts) - counts["too_long"],
        wanted=config.prompts,
        pairs=found,
        held_out=source.held_out,
        where=settings.label_public_url,
        then=config.then,
        **{what: counts[what] for what in LEFT_OUT},
        **judged,
    )
    log.info("%s", asked.sentence)
    return asked


@stage_task("ask-people", "ask people")
def ask_people(config: AskConfig) -> Asked:
    """Queue pairs for people, with the progress in Prefect."""
    with showing(config.project) as logger:
        asked = ask(config, read_settings(), logger)
    link_to(asked)
    return asked


@contextmanager
def showing(project: str) -> Iterator[StageLogger]:
    """Show the progress on the terminal and in Prefect."""
    key = artifact_key(project, "ask")
    progress = ArtifactDisplay(f"{key}-progress", f"{project} ask")
    with on_terminal("ask", progress) as logger:
        yield logger


def link_to(asked: Asked) -> None:
    """Show in Prefect where people label."""
    key = f"{artifact_key(asked.project, 'ask')}-page"
    show_link(key, asked.where, f"People label {asked.pairs:,} pairs here")


def _complete(config: AskConfig, votes: int) -> dict[str, object]:
    """When the batch is complete, as a judge who is people is told it."""
    people = PeopleConfig(
        votes_per_pair=votes,
        enough=config.enough,
        enough_pairs=config.enough_pairs,
        days=config.days,
        priority=config.priority,
    )
    return people.model_dump(mode="json")


# ---- prompts ----


def _prompts(config: AskConfig, policy: ModelRef, record: Record) -> _Source:
    """The prompts, each once, in the order in which the seed draws them."""
    known: DatasetRef | None = None
    try:
        known = find_data.fn(config.data, policy)
    except DataError:
        if not config.file:
            raise
    held_out, side = set(), list[Prompt]()
    with TemporaryDirectory() as scratch:
        if known is not None:
            folder = fetch_dataset(record.client, known, Path(scratch) / "data")
            wanted: Split = "eval" if config.evaluation else "train"
            side = list(read_table(folder, "prompts", wanted)["prompt"])
            held_out = {prompt_key(p) for p in read_table(folder, "prompts", "eval")["prompt"]}
    if config.file:
        found = _of_file(config.file)
        kept = [prompt for prompt in found if prompt_key(prompt) not in held_out]
        drawn, name = kept, Path(config.file).name
    else:
        assert known is not None
        found, drawn, name = side, side, known.uri
    once = list({prompt_key(prompt): prompt for prompt in drawn}.values())
    if not once:
        raise DataError(
            f"there are no prompts to ask about in {config.file or name}: name others with --from, "
            "or other data with --data"
        )
    order = sorted(
        once, key=lambda prompt: digest(config.seed, type(prompt).__name__, prompt_key(prompt))
    )
    content = hashlib.sha256("\0".join(prompt_key(prompt) for prompt in order).encode())
    return _Source(
        order[: config.prompts], config.source or name, content.hexdigest(), len(found) - len(drawn)
    )


def _of_file(path: str) -> list[Prompt]:
    rows = read_rows(path, split="train", subset="", limit=0)
    table = parse(rows, "prompts", {}, Reading())
    if table.faults:
        raise DataError(f"{table.faults[0]}; fix the row")
    return list(table.frame["prompt"])


# ---- answers ----


def _sampling(config: AskConfig, ref: ModelRef, record: Record) -> tuple[int, float]:
    """Longest answer and temperature: as set, or as in the training of the version."""
    run_id = record.store.tags(ref).get(tags.RUN)
    run = record.runs.find(run_id) if run_id else None
    params = dict(run.data.params) if run is not None else {}
    usual = SamplingConfig()
    length = config.max_new_tokens or int(params.get("sampling.max_new_tokens", 0))
    heat = config.temperature or float(params.get("sampling.temperature", 0))
    return length or usual.max_new_tokens, heat or usual.temperature


def _pairs(
    config: AskConfig,
    speakers: Sequence[_Speaker],
    prompts: Sequence[Prompt],
    start: int,
    source: _Source,
    logger: StageLogger,
) -> tuple[list[NewPair], Counter[str]]:
    """The pairs on some prompts, and how many there are of each kind that is left out."""
    fits = [
        prompt
        for n, prompt in enumerate(prompts)
        if all(_fits(speaker, speaker.writer.lengths([prompts[n]])[0]) for speaker in speakers)
    ]
    said = [_answers(config, speaker, fits, start, source, logger) for speaker in speakers]
    pairs: list[NewPair] = []
    left_out = Counter({"too_long": len(prompts) - len(fits)})
    for n, prompt in enumerate(fits):
        for a, b in _meet(config.pairs, [answers[n] for answers in said]):
            if a.text == b.text:
                left_out["identical"] += 1
                continue
            if not (a.text.strip() and b.text.strip()) and not config.evaluation:
                left_out["empty"] += 1
                continue
            pairs.append(
                NewPair(
                    prompt,
                    a,
                    b,
                    source=source.name,
                    licence=config.licence,
                    priority=config.priority,
                )
            )
    return pairs, left_out


def _fits(speaker: _Speaker, length: int) -> bool:
    context = context_of(speaker.writer.policy.model)
    return length > 0 and (context is None or length + speaker.max_new_tokens <= context)


def _answers(
    config: AskConfig,
    speaker: _Speaker,
    prompts: Sequence[Prompt],
    start: int,
    source: _Source,
    logger: StageLogger,
) -> list[list[Answer]]:
    sampling = {
        "temperature": speaker.temperature,
        "top_p": 1.0,
        "max_new_tokens": speaker.max_new_tokens,
        "seed": config.seed,
    }
    texts = speaker.writer.write(
        prompts,
        max_new_tokens=speaker.max_new_tokens,
        temperature=speaker.temperature,
        samples=config.answers,
        # Of their own for each few prompts, so that a call that goes on draws the same.
        generator=generator(config.seed, f"ask/{speaker.ref.uri}/{start}"),
        logger=_Quiet(logger),
    )
    return [
        [
            Answer(
                text,
                model=speaker.ref.uri,
                sampling=sampling,
                source=config.source or "rlhf ask",
                licence=config.licence,
            )
            for text in answers
        ]
        for answers in texts
    ]


def _meet(which: str, said: Sequence[Sequence[Answer]]) -> list[tuple[Answer, Answer]]:
    """The pairs of answers to one prompt."""
    if len(said) == 2:
        first, second = said
        return (
            list(product(first, second))
            if which == "all"
            else list(zip(first, second, strict=True))
        )
    (own,) = said
    if which == "all" or len(own) == 2:
        return list(combinations(own, 2))
    return [(own[n], own[(n + 1) % len(own)]) for n in range(len(own))]


class _Quiet(SilentLogger):
    """Hands phases on, but no progress, which counts prompts here."""

    def __init__(self, logger: StageLogger) -> None:
        self._logger = logger

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Show what is being done."""
        self._logger.phase(name, done, total)

"""Answers about lineage: which versions saw something, and what a version saw."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, NamedTuple, TypeAlias

from tasks.registry.refs import ModelRef

Relation: TypeAlias = Literal["trained", "answers", "evaluated"]


class Step(NamedTuple):
    """A thing on the way to a version, and what it was used as there."""

    role: str  # votes, demonstrations, prompts, verdicts; or sft, reward, policy, copy, answers, …
    uri: str  # runs:/RUN/data, feedback:/PROJECT or models:/NAME/VERSION


@dataclass(frozen=True)
class Known:
    """A version, whether the registry still has it or not."""

    ref: ModelRef
    kind: str
    state: Literal["registered", "archived", "deleted"]
    at: datetime | None  # when it was made; None if nothing is left that says so
    aliases: tuple[str, ...]
    run_id: str  # the stage that made it; empty if it is unknown
    run: str = ""  # where that run is: active, trash, gone


@dataclass(frozen=True)
class Seen(Known):
    """A version that saw what was looked for.

    `trained` means that it learned from it, or was made from a version that did. `answers` means
    that it learned from answers that such a version wrote, and people compared. `evaluated` means
    that it was measured with it, and no more: held-out rows of its own training (by which a stage
    may have chosen its best weights), a report card, an evaluation or a tournament, also one in
    which the annotator was the judge.
    """

    relation: Relation = "trained"
    path: tuple[Step, ...] = ()  # from the data on; the version itself is not in it
    rows: int = 0  # that match, where the path begins
    also: tuple[str, ...] = ()  # what else a way begins with: demonstrations, prompts, …

    @property
    def direct(self) -> bool:
        """Whether it read the rows itself."""
        return len(self.path) == 1


class Reading(NamedTuple):
    """A table that a version read itself."""

    version: str
    relation: Relation
    stage: str
    data: str  # its address
    table: str
    split: str
    half: str  # "" = all votes, else first_half or second_half


@dataclass(frozen=True)
class Material:
    """What was read, over all tables: rows by table of each annotator, source and so on."""

    tables: Mapping[str, int] = field(default_factory=dict)
    annotators: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    sources: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    licences: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # that wrote answers


@dataclass(frozen=True)
class Ancestor:
    """A version that another was made from, and the way from the one to the other."""

    version: Known
    path: tuple[Step, ...]  # from the ancestor on


@dataclass(frozen=True)
class Saw(Known):
    """What a version saw, itself and through the versions that it was made from."""

    trained: Material = field(default_factory=Material)
    evaluated: Material = field(default_factory=Material)
    readings: tuple[Reading, ...] = ()
    ancestors: tuple[Ancestor, ...] = ()
    data: tuple[str, ...] = ()  # addresses, in the order of readings
    snapshots: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    rewards: tuple[str, ...] = ()  # functions and models that rewarded it
    judges: tuple[str, ...] = ()  # who compared its answers, or those that it was chosen by
    unknown: tuple[str, ...] = ()  # sentences on what could not be read


@dataclass(frozen=True)
class Answer:
    """Which versions saw something, and what could not be looked into."""

    seen: tuple[Seen, ...]
    unknown: tuple[str, ...]  # sentences
    data_sets: int  # that were looked into
    matching: int  # of them, that have such rows
    rows: int  # that match, in training and evaluation, over different data
    names: tuple[str, ...] = ()  # of this kind that the data have, if none matched

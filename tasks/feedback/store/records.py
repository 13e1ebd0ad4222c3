"""What goes into the store and comes out of it, without a database in sight."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from rlhf_core.data.prompts import Prompt

Side: TypeAlias = Literal["a", "b"]
Choice: TypeAlias = Literal["a", "b", "tie", "both_bad"]
AssignmentKind: TypeAlias = Literal["fresh", "gold", "repeat"]
Role: TypeAlias = Literal["annotator", "admin"]
CHOICES: tuple[Choice, ...] = ("a", "b", "tie", "both_bad")
JudgmentKind: TypeAlias = Literal["fresh", "gold", "repeat", "import", "machine"]


class ProjectRules(BaseModel):
    """How a project asks its annotators."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    question: str = Field(
        "Which answer is better?", min_length=1, max_length=500, description="Above each pair"
    )
    guidelines: str = Field("", max_length=100_000, description="Help for annotators, in Markdown")
    consent: str = Field(
        "What you choose and write here is kept under a pseudonym and used to train and evaluate "
        "language models. Your name is kept apart and can be deleted at any time.",
        max_length=100_000,
        description="What an annotator agrees to before the first pair, in Markdown",
    )
    consent_version: str = Field("1", min_length=1, max_length=64)
    licence: str = Field(
        "CC BY 4.0", max_length=300, description="Licence under which the votes are given"
    )
    votes_per_pair: int = Field(1, ge=1, le=1000, description="Annotators asked about each pair")
    gold_every: int = Field(
        20, ge=0, le=10_000, description="One control question in so many pairs; 0 = none"
    )
    repeat_every: int = Field(
        25, ge=0, le=10_000, description="One repeat, sides swapped, in so many pairs; 0 = none"
    )
    lease_minutes: float = Field(
        30.0, gt=0, le=10_000, description="How long a pair is held for an annotator (minutes)"
    )
    ordered: bool = Field(
        True,
        description="Whether flows put the queue in the order of what a label tells, beside a "
        "control arm, with a tenth of the prompts held out from training",
    )
    paused: bool = False


@dataclass(frozen=True)
class Answer:
    """A response, and where it comes from."""

    text: str
    model: str = ""  # who wrote it, as models:/demo-policy/3; "" = unknown
    sampling: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    licence: str = ""


@dataclass(frozen=True)
class NewPair:
    """Two answers to a prompt, on their way in."""

    prompt: Prompt
    a: Answer
    b: Answer
    source: str = ""  # of the prompt
    licence: str = ""  # of the prompt
    kept: Mapping[str, str] = field(default_factory=dict)  # columns to keep beside each vote
    gold: Literal["a", "b", "tie"] | None = None  # the right answer, if it is known
    wanted: int = 0  # votes to ask for; 0 = it is not put into the queue
    priority: int = 0  # a user's wish: lower is sooner; 0 = none, the order of the queue decides


@dataclass(frozen=True)
class Ballot:
    """A vote that was cast elsewhere, on its way in."""

    vote: Choice | Literal["skip"]
    annotator: str = ""  # "" = anonymous
    first: Side | Literal[""] = ""  # what the annotator saw first
    margin: float = 0.0
    seconds: float | None = None
    time: str = ""  # as the source has it
    note: str = ""
    reason: str = ""  # of a skip
    source: str = ""
    kind: JudgmentKind = "import"  # as another store had it: a repeat stays one
    # distinguishes two anonymous votes of the same row, which are otherwise the same vote
    ballot: int = 0


@dataclass(frozen=True)
class AddedPair:
    """A pair as it is in the store now."""

    id: int
    new: bool
    swapped: bool  # the store has it with its answers exchanged
    digest: str = ""  # of what it says, the same in every store


@dataclass(frozen=True)
class Task:
    """A pair on an annotator's desk. Nothing of it tells who wrote what, or what kind it is."""

    token: str  # of the assignment
    prompt: Prompt
    left: str
    right: str
    until: datetime  # the lease


@dataclass(frozen=True)
class Vote:
    """What an annotator says about a task, by side."""

    choice: Literal["left", "right", "tie", "both_bad", "skip"]
    key: str  # made by whoever sends it: sent twice, it is one vote
    seconds: float | None = None
    note: str = ""
    reason: str = ""  # of a skip
    source: str = "page"  # where it was cast
    time: str = ""  # when it was cast, in ISO 8601; "" = now


@dataclass(frozen=True)
class Progress:
    """How far somebody is."""

    done: int  # by this annotator
    left: int  # pairs on the desk or free for this annotator; 5,000 at most
    recent: int = 0  # of those done, since the moment that was asked for
    more: bool = False  # whether more than these are left


@dataclass(frozen=True)
class SnapshotInfo:
    """A snapshot; the digest is of what its votes say, not of when it was taken."""

    project: str
    digest: str
    votes: int
    pairs: int
    annotators: int
    created_at: datetime
    new: bool = False
    training: int = 0  # the votes in a training file: without repeats
    known: int = 0  # pairs with a known answer, which a training file has beside the votes


class AddedVotes(NamedTuple):
    """What became of votes that were put in."""

    new: int
    known: int  # there already, so they were left as they are
    again: int  # of the new ones: by somebody who had voted on that pair already

"""The tables of the preference store.

    projects      what is asked about, with the rules of the queue
    prompts       texts or chat messages, once by content
    responses     answers to a prompt: who wrote them, how they were sampled, under which licence
    pairs         two responses to compare
    batches       pairs that were asked for together, and the flow run that waits for them
    gold_answers  pairs whose right answer is known
    annotators    pseudonyms; everything else refers to these
    identities    who is behind a pseudonym: a table of its own, whose rows can be deleted
    invitations, sessions, consents    how somebody came in, and what they agreed to
    assignments   a pair shown to an annotator: the side that was drawn, and a lease
    judgments     votes, append-only: a new one replaces an old one, and both stay
    snapshots, snapshot_members        the judgments of a training, for good
    erasures      people who are deleted with all they did, step by step
    erased_snapshots                   snapshots that had votes of theirs, and what came instead
    audit_log     who changed what

All times are in UTC. Tokens of links and sessions are kept as digests only. Rows of judgments,
snapshots, their members and the audit log are neither changed nor deleted: triggers refuse it. They
let an open erasure empty the votes of its person, and take the pseudonym out of the log.
"""

import json
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator


class UTCDateTime(TypeDecorator[datetime]):
    """A time in UTC. SQLite keeps no zone, so it is taken away on the way in and put back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The time as the database takes it."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value} has no time zone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The time as it was given, in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class ExactText(TypeDecorator[str]):
    """Any text. Postgres takes no NUL, so a text that has one is written as JSON behind an ESC."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """The text as the database takes it."""
        if value is not None and ("\0" in value or value.startswith("\x1b")):
            return "\x1b" + json.dumps(value)
        return value

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        """The text as it was given."""
        if value is not None and value.startswith("\x1b"):
            return str(json.loads(value[1:]))
        return value


_Id = BigInteger().with_variant(Integer, "sqlite")  # only an INTEGER key counts up in SQLite
Moment = UTCDateTime()


FREE = "state = 'open' AND taken < wanted"  # of a pair
ASK = "ask"  # of a batch: its votes are to be trained on
JUDGE = "judge"  # of a batch: its votes are verdicts, and no training data; of `via`: a machine
MACHINE = "machine"  # of a vote: a judge that is a model or a rule cast it, and nobody was asked
JUDGED, AUDITED = "judge", "audit"  # of an arm: a judge answers alone; people answer beside it
HOLD_OUT = "hold_out"  # of a pair's arm: its votes measure what the order of the queue saves


class Base(DeclarativeBase):
    """All tables of the store."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        dict[str, Any]: JSON,
        datetime: Moment,
        int: _Id,
        str: ExactText,
    }


class Project(Base):
    """What is asked about. Its rules are a `ProjectRules`."""

    __tablename__ = "projects"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    rules: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class Prompt(Base):
    """A prompt, once in a project by its content."""

    __tablename__ = "prompts"
    __table_args__ = (UniqueConstraint("project_id", "digest"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    digest: Mapped[str] = mapped_column(String(64))
    content: Mapped[Any] = mapped_column(JSON)  # text, or a list of messages
    source: Mapped[str] = mapped_column(default="")
    licence: Mapped[str] = mapped_column(default="")


class Response(Base):
    """An answer to a prompt. The same text by two models is two responses."""

    __tablename__ = "responses"
    __table_args__ = (UniqueConstraint("prompt_id", "digest"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id"))
    digest: Mapped[str] = mapped_column(String(64))  # of text, model, sampling, source, licence
    text: Mapped[str]
    model: Mapped[str] = mapped_column(default="")  # models:/demo-policy/3
    sampling: Mapped[dict[str, Any]]
    source: Mapped[str] = mapped_column(default="")
    licence: Mapped[str] = mapped_column(default="")


class Pair(Base):
    """Two responses to compare.

    `taken` counts the votes and the live leases on it, so that it is free while it is open and
    `taken < wanted`. `exchanged` says that the answers stand the other way round in what must not
    depend on who came first: digests and training files.
    """

    __tablename__ = "pairs"
    __table_args__ = (
        UniqueConstraint("project_id", "digest"),
        Index("ix_pairs_free", "project_id", "priority", "id",
              sqlite_where=text(FREE), postgresql_where=text(FREE)),
        Index(None, "project_id", "state"),
    )  # fmt: skip
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    prompt_id: Mapped[int] = mapped_column(ForeignKey("prompts.id"))
    response_a_id: Mapped[int] = mapped_column(ForeignKey("responses.id"))
    response_b_id: Mapped[int] = mapped_column(ForeignKey("responses.id"))
    digest: Mapped[str] = mapped_column(String(64))  # of both responses, in either order
    state: Mapped[str] = mapped_column(String(16), default="done")  # open, done, withdrawn
    # lower is sooner: a place, or the wish of a user (tasks.feedback.ordering.places)
    priority: Mapped[int] = mapped_column(default=0)
    wanted: Mapped[int] = mapped_column(default=0)  # votes asked for; 0 = it is not asked about
    taken: Mapped[int] = mapped_column(default=0)
    votes: Mapped[int] = mapped_column(default=0)  # valid ones, imported ones included
    # how it got its place in the queue: design, random, hold_out (never trained on), audit (a judge
    # is sure, and people are asked all the same), judge (it answers alone); "" = it came
    arm: Mapped[str] = mapped_column(String(16), default="")
    kept: Mapped[dict[str, Any]]  # columns of the user's, by name, as text
    exchanged: Mapped[bool]
    created_at: Mapped[datetime]


class Batch(Base):
    """Pairs that were asked for together, and who waits for them."""

    __tablename__ = "batches"
    __table_args__ = (UniqueConstraint("project_id", "name"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(200))
    kind: Mapped[str] = mapped_column(String(16))  # ask, judge, import
    flow_run: Mapped[str] = mapped_column(String(64), default="")  # in Prefect, that waits
    details: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    resumed_at: Mapped[datetime | None]
    withdrawn_at: Mapped[datetime | None]


class BatchPair(Base):
    """A pair of a batch; a pair may be in several."""

    __tablename__ = "batch_pairs"
    batch_id: Mapped[int] = mapped_column(ForeignKey("batches.id"), primary_key=True)
    pair_id: Mapped[int] = mapped_column(ForeignKey("pairs.id"), primary_key=True, index=True)


class GoldAnswer(Base):
    """The right answer to a pair, for control questions."""

    __tablename__ = "gold_answers"
    pair_id: Mapped[int] = mapped_column(ForeignKey("pairs.id"), primary_key=True)
    vote: Mapped[str] = mapped_column(String(16))  # a, b or tie
    reason: Mapped[str] = mapped_column(default="")
    by: Mapped[str] = mapped_column(default="")
    at: Mapped[datetime]


class Annotator(Base):
    """A pseudonym in a project.

    No pair at or before the mark, in the order of the queue, is free for this annotator. Whatever
    frees such a pair sets the mark back, so that a search for the next one is short.
    """

    __tablename__ = "annotators"
    __table_args__ = (UniqueConstraint("project_id", "pseudonym"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    pseudonym: Mapped[str] = mapped_column(String(200))
    role: Mapped[str] = mapped_column(String(16), default="annotator")  # or admin
    state: Mapped[str] = mapped_column(String(16), default="active")  # active, paused, left
    via: Mapped[str] = mapped_column(String(16), default="page")  # page, import, mlflow, judge
    mark_priority: Mapped[int | None]
    mark_id: Mapped[int | None]
    created_at: Mapped[datetime]


class Identity(Base):
    """Who is behind a pseudonym. Deleting the row leaves the votes with nobody's name."""

    __tablename__ = "identities"
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(200), default="")
    email: Mapped[str] = mapped_column(String(320), default="")
    at: Mapped[datetime]


class Invitation(Base):
    """A link that lets one person in."""

    __tablename__ = "invitations"
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"), index=True)
    token_digest: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(16), default="annotator")
    name: Mapped[str] = mapped_column(String(200), default="")  # moves to the identity when used
    email: Mapped[str] = mapped_column(String(320), default="")
    by: Mapped[str] = mapped_column(default="")
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    # whom it lets in: a new annotator, or one who comes back
    annotator_id: Mapped[int | None] = mapped_column(ForeignKey("annotators.id"))


class Session(Base):
    """A browser that has come in."""

    __tablename__ = "sessions"
    token_digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"), index=True)
    csrf: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    expires_at: Mapped[datetime]


class Consent(Base):
    """The text that somebody agreed to, by version and digest."""

    __tablename__ = "consents"
    id: Mapped[int] = mapped_column(primary_key=True)
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"), index=True)
    version: Mapped[str] = mapped_column(String(64))
    digest: Mapped[str] = mapped_column(String(64))
    licence: Mapped[str] = mapped_column(default="")
    at: Mapped[datetime]


class Assignment(Base):
    """A pair that is or was shown to an annotator. The side is drawn once, and stays."""

    __tablename__ = "assignments"
    __table_args__ = (
        UniqueConstraint("annotator_id", "pair_id", "kind"),
        Index("ix_assignments_leases", "project_id", "leased_until",
              sqlite_where=text("state = 'open'"), postgresql_where=text("state = 'open'")),
        Index(None, "annotator_id", "state"),
        Index(None, "annotator_id", "id"),
        Index(None, "pair_id"),
    )  # fmt: skip
    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str] = mapped_column(String(32), unique=True)  # what the browser knows
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    pair_id: Mapped[int] = mapped_column(ForeignKey("pairs.id"))
    annotator_id: Mapped[int] = mapped_column(ForeignKey("annotators.id"))
    kind: Mapped[str] = mapped_column(String(16), default="fresh")  # fresh, gold, repeat
    first: Mapped[str] = mapped_column(String(1))  # a or b: the answer on the left
    state: Mapped[str] = mapped_column(String(16))  # open, voted, skipped, expired
    leased_until: Mapped[datetime]
    created_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    undone_at: Mapped[datetime | None]  # since when it is on top of the desk again


class Judgment(Base):
    """A vote, a skip or a withdrawal. Rows are never changed: the one that counts is the one that
    no other replaces."""

    __tablename__ = "judgments"
    __table_args__ = (
        UniqueConstraint("project_id", "key"),
        CheckConstraint("vote IN ('a', 'b', 'tie', 'both_bad', 'skip', 'withdrawn')", name="vote"),
        Index(None, "project_id", "id"),
        Index(None, "pair_id"),
        Index(None, "annotator_id", "id"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    pair_id: Mapped[int] = mapped_column(ForeignKey("pairs.id"))
    annotator_id: Mapped[int | None] = mapped_column(ForeignKey("annotators.id"))  # None: unknown
    assignment_id: Mapped[int | None] = mapped_column(ForeignKey("assignments.id"), index=True)
    replaces_id: Mapped[int | None] = mapped_column(ForeignKey("judgments.id"), unique=True)
    key: Mapped[str] = mapped_column(String(64))  # a post that comes twice is one judgment
    kind: Mapped[str] = mapped_column(String(16))  # fresh, gold, repeat, import, machine
    vote: Mapped[str] = mapped_column(String(16))
    first: Mapped[str] = mapped_column(String(1), default="")  # the answer on the left; "" unknown
    margin: Mapped[float] = mapped_column(default=0.0)  # raw reward
    seconds: Mapped[float | None]  # from showing the pair to the vote
    note: Mapped[str] = mapped_column(default="")
    reason: Mapped[str] = mapped_column(default="")  # of a skip
    source: Mapped[str] = mapped_column(default="")  # page, or a file
    time: Mapped[str] = mapped_column(default="")  # as the source has it
    # columns of the user's that came with this vote; None: those of the pair
    kept: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    at: Mapped[datetime]
    erasure: Mapped[int | None]  # that emptied this row: what is left is that there was a vote


class Snapshot(Base):
    """The judgments that counted at one time, by the digest of what they say."""

    __tablename__ = "snapshots"
    __table_args__ = (UniqueConstraint("project_id", "digest"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"))
    digest: Mapped[str] = mapped_column(String(64))
    votes: Mapped[int]
    training: Mapped[int]  # those of them in a training file
    pairs: Mapped[int]
    annotators: Mapped[int]
    by: Mapped[str] = mapped_column(default="")
    created_at: Mapped[datetime]


class SnapshotMember(Base):
    """A judgment of a snapshot, and what was the right answer to its pair then."""

    __tablename__ = "snapshot_members"
    snapshot_id: Mapped[int] = mapped_column(ForeignKey("snapshots.id"), primary_key=True)
    judgment_id: Mapped[int] = mapped_column(ForeignKey("judgments.id"), primary_key=True)
    gold: Mapped[str] = mapped_column(String(16), default="")


class Erasure(Base):
    """Somebody who is deleted with all they did. Once it is finished it has no pseudonym."""

    __tablename__ = "erasures"
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int] = mapped_column(ForeignKey("projects.id"), index=True)
    annotator_id: Mapped[int | None]  # of a row that is deleted on the way
    pseudonym: Mapped[str | None]
    code: Mapped[str | None]  # with which the person finds themselves in the certificate
    mark: Mapped[str]  # the pseudonym, hashed with the code
    by: Mapped[str] = mapped_column(default="")
    steps: Mapped[dict[str, Any]]  # what was done, by step
    begun_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]


class ErasedSnapshot(Base):
    """A snapshot that had votes of an erased person, and the one with the others' votes."""

    __tablename__ = "erased_snapshots"
    snapshot_id: Mapped[int] = mapped_column(ForeignKey("snapshots.id"), primary_key=True)
    erasure_id: Mapped[int] = mapped_column(ForeignKey("erasures.id"), index=True)
    successor_id: Mapped[int | None] = mapped_column(ForeignKey("snapshots.id"))  # None: no votes
    made: Mapped[bool]  # the successor was made for this; else it was there
    at: Mapped[datetime]


class AuditEntry(Base):
    """Who changed what."""

    __tablename__ = "audit_log"
    id: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[int | None] = mapped_column(ForeignKey("projects.id"), index=True)
    at: Mapped[datetime]
    actor: Mapped[str]  # a pseudonym, or the user of a command
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(default="")
    details: Mapped[dict[str, Any]]

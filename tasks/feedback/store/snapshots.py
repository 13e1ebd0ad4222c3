"""Snapshots: the votes that count at one moment, kept for good under a digest of what they say.

A file of a snapshot has a vote a line, in the form that `data.preferences` reads:

    id, prompt, response_a, response_b, vote, shown_first, annotator, gold, margin, time, source,
    and the columns that were kept

Votes on control questions are in it, with gold true. Before the votes on a pair whose right answer
is known stands that answer, once, as what the annotator `gold` says, with gold true: a reward model
that knows who voted learns from it what all annotators have in common. Nobody in the store is
called so.

Repeats are members, as the report on agreement needs them, but are not written for training; nor is
somebody's second vote on a pair, as by an import of what they did elsewhere: of a person's votes on
a pair the first by its time is written. A judge that is a machine has seen both orders, and
its vote in each is written.

The digest, and every byte of the file, depends on what the votes say and on nothing else: not on
the database, nor on the order in which they came. So pairs are in the order of their digests, the
votes on a pair in that of theirs, and which of two answers is `a` follows from digests too.
"""

import contextlib
import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from sqlalchemy import ColumnElement, Select, exists, func, insert, select
from sqlalchemy.orm import Session

from rlhf_core.errors import DataError
from rlhf_core.settings.fields import GOLD
from tasks.feedback.store import audit, clock
from tasks.feedback.store.content import EXCHANGED, chunks, digest
from tasks.feedback.store.database import Database
from tasks.feedback.store.judgments import CastVote, Judgments
from tasks.feedback.store.records import SnapshotInfo
from tasks.feedback.store.tables import (
    MACHINE,
    ErasedSnapshot,
    Judgment,
    Snapshot,
    SnapshotMember,
)

LATEST = "latest"
SHORTEST = 4  # digits of a digest that name a snapshot
MEMBERS = 5_000  # written at a time


@dataclass
class _Reading:
    """What is known of a snapshot once its votes have been read. 17 bytes a vote are kept."""

    hash: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    members: "array[int]" = field(default_factory=lambda: array("q"))
    gold: dict[int, str] = field(default_factory=dict)
    training: int = 0
    pairs: int = 0
    known: int = 0  # pairs with a known answer
    people: set[str] = field(default_factory=set)

    def add(self, votes: list[CastVote], written: list[CastVote], digests: list[str]) -> None:
        """Take in the votes on a pair."""
        self.hash.update("".join(digests).encode())
        for vote in votes:
            self.members.append(vote.judgment)
            if vote.gold:  # as the pair has its answers
                turned_back = EXCHANGED.get(vote.gold, vote.gold)
                self.gold[vote.judgment] = turned_back if vote.exchanged else vote.gold
            if vote.annotator and vote.kind != MACHINE:
                self.people.add(vote.annotator)
        self.training += len(written)
        self.pairs += 1
        self.known += any(vote.gold for vote in votes)

    @property
    def digest(self) -> str:
        return self.hash.hexdigest()


class Snapshots:
    """The snapshots of a project."""

    def __init__(self, database: Database, project_id: int, project: str) -> None:
        self._database = database
        self._project = project_id
        self._name = project
        self._judgments = Judgments(database, project_id)

    def take(self, by: str = "") -> SnapshotInfo:
        """A snapshot of the votes that count now; the same votes are the same snapshot.

        Votes may come meanwhile: it has those that were there when it began.

        Raises: DataError when there is no vote.
        """
        read = self._now()
        with self._database.writing(self._project) as session:
            kept, new = self._keep(session, read, by)
            return self._info(kept, read.known, new)

    def _keep(self, session: Session, read: _Reading, by: str) -> tuple[Snapshot, bool]:
        """The snapshot of what was read, and whether it is new."""
        query = select(Snapshot).filter_by(project_id=self._project, digest=read.digest)
        found = session.scalar(query)
        if found is not None:
            return found, False
        made = Snapshot(
            project_id=self._project,
            digest=read.digest,
            votes=len(read.members),
            training=read.training,
            pairs=read.pairs,
            annotators=len(read.people),
            by=by,
            created_at=clock.now(),
        )
        session.add(made)
        session.flush()
        for some in chunks(read.members, MEMBERS):
            session.execute(
                insert(SnapshotMember.__table__),  # type: ignore[arg-type]
                [
                    {
                        "snapshot_id": made.id,
                        "judgment_id": judgment,
                        "gold": read.gold.get(judgment, ""),
                    }
                    for judgment in some
                ],
            )
        audit.note(session, self._project, by, "snapshot", read.digest)
        session.flush()
        return made, True

    def rebuild(self, snapshot: int, without: int, erasure: int) -> None:
        """Put the same votes without those of one annotator in the place of a snapshot.

        What comes in its place has the digest that it would have had if the annotator had never
        voted. The old one stays as a row that nobody can read any more.

        Args:
            snapshot: its number.
            without: the number of the annotator.
            erasure: for which this is done.
        """
        with self._database.reading() as session:
            of_them = select(Judgment.id).where(Judgment.annotator_id == without)
            left_out = frozenset(session.scalars(of_them))
        votes = self._judgments.stream(snapshot=snapshot, by_pair=True)
        read = _read(vote for vote in votes if vote.judgment not in left_out)
        with self._database.writing(self._project) as session:
            if session.get(ErasedSnapshot, snapshot) is not None:
                return
            kept, new = self._keep(session, read, "erasure") if read.members else (None, False)
            session.add(
                ErasedSnapshot(
                    snapshot_id=snapshot,
                    erasure_id=erasure,
                    successor_id=kept and kept.id,
                    made=new,
                    at=clock.now(),
                )
            )

    def look(self, which: str = LATEST) -> SnapshotInfo:
        """What `take`, for `latest`, would give, without keeping it; else what `find` gives.

        Raises: DataError, as they do.
        """
        if which != LATEST:
            return self.find(which)
        read = self._now()
        return SnapshotInfo(
            self._name, read.digest, len(read.members), read.pairs, len(read.people), clock.now(),
            training=read.training, known=read.known,
        )  # fmt: skip

    def find(self, which: str = LATEST) -> SnapshotInfo:
        """A snapshot by its digest or the beginning of it; `latest` is the last one taken.

        Raises: DataError when there is none, or several begin so.
        """
        found = self._row(which)
        with self._database.reading() as session:
            return self._info(found, _known(session, [found.id]).get(found.id, 0))

    def all(self) -> list[SnapshotInfo]:
        """All snapshots, newest first."""
        with self._database.reading() as session:
            query = select(Snapshot).filter_by(project_id=self._project).where(~_erased())
            rows = session.scalars(query.order_by(Snapshot.id.desc())).all()
            known = _known(session, [row.id for row in rows])
            return [self._info(row, known.get(row.id, 0)) for row in rows]

    def successor(self, digest: str) -> str:
        """The digest of what came in the place of a snapshot; its own if nobody was erased from it,
        and nothing if no vote is left.

        Raises: DataError when there is no such snapshot.
        """
        with self._database.reading() as session:
            row = session.scalar(
                select(Snapshot).filter_by(project_id=self._project, digest=digest)
            )
            if row is None:
                return self._row(digest).digest
            last = _successor(session, row)
            return "" if last is None else last.digest

    def votes(self, which: str) -> Iterator[CastVote]:
        """All votes of a snapshot, repeats included."""
        yield from self._judgments.stream(snapshot=self._row(which).id)

    def write(self, which: str, path: Path) -> SnapshotInfo:
        """Write the votes of a snapshot as JSON lines that `data.preferences` reads.

        Raises: DataError when the votes are no longer those of the digest: somebody has changed
            the database.
        """
        found = self._row(which)
        votes = self._judgments.stream(snapshot=found.id, by_pair=True)
        with _writing(path) as write:
            read = _read(votes, write)
            if read.digest != found.digest:
                raise DataError(
                    f"the votes of the snapshot {found.digest[:16]} of '{self._name}' are not what "
                    f"they were (they are {read.digest[:16]}): the database was changed by hand; "
                    "restore a back-up of it"
                )
        return self._info(found, read.known)

    def write_now(self, path: Path) -> None:
        """Write what `write` would, if a snapshot were taken now."""
        with _writing(path) as write:
            _read(self._judgments.stream(training=True, by_pair=True), write)

    def _now(self) -> _Reading:
        """What a snapshot would have now.

        Raises: DataError when there is no vote.
        """
        read = _read(self._judgments.stream(training=True, by_pair=True))
        if not read.members:
            raise DataError(
                f"the feedback project '{self._name}' has no votes yet; import some with "
                f"`rlhf feedback import {self._name} FILE`, or collect them with `rlhf label`"
            )
        return read

    def _row(self, which: str) -> Snapshot:
        if which != LATEST and not re.fullmatch(f"[0-9a-f]{{{SHORTEST},64}}", which):
            raise DataError(
                f"'{which[:80]}' names no snapshot: write `{LATEST}`, or {SHORTEST} to 64 digits "
                "of its digest"
            )
        with self._database.reading() as session:
            query = select(Snapshot).filter_by(project_id=self._project)
            if which == LATEST:
                found: Sequence[Snapshot] = _latest(session, query)
            else:
                found = session.scalars(query.where(Snapshot.digest.startswith(which))).all()
                _refuse_erased(session, found, self._name)
        if len(found) != 1:
            problem = "is ambiguous" if found else "does not exist"
            raise DataError(
                f"the snapshot '{which}' of the feedback project '{self._name}' {problem}; "
                f"`rlhf feedback snapshots {self._name}` lists them"
            )
        return found[0]

    def _info(self, row: Snapshot, known: int, new: bool = False) -> SnapshotInfo:
        return SnapshotInfo(
            self._name, row.digest, row.votes, row.pairs, row.annotators, row.created_at, new,
            row.training, known,
        )  # fmt: skip


def _known(session: Session, snapshots: Sequence[int]) -> Mapping[int, int]:
    """How many pairs of each snapshot had a known answer."""
    query = (
        select(SnapshotMember.snapshot_id, func.count(Judgment.pair_id.distinct()))
        .join(Judgment, Judgment.id == SnapshotMember.judgment_id)
        .where(SnapshotMember.snapshot_id.in_(snapshots), SnapshotMember.gold != "")
        .group_by(SnapshotMember.snapshot_id)
    )
    return dict(session.execute(query).tuples().all())


# ---- of whom somebody was erased ----


def _erased() -> ColumnElement[bool]:
    return exists().where(ErasedSnapshot.snapshot_id == Snapshot.id)


def _successor(session: Session, row: Snapshot) -> Snapshot | None:
    """What stands for a snapshot now; None if it has no votes left."""
    now: Snapshot | None = row
    while now is not None and (erased := session.get(ErasedSnapshot, now.id)) is not None:
        now = erased.successor_id and session.get(Snapshot, erased.successor_id)  # type: ignore
    return now


def _latest(session: Session, query: Select[tuple[Snapshot]]) -> list[Snapshot]:
    """The snapshot that was taken last, or what stands for it: a rebuilt one has its place."""
    rebuilt = exists().where(ErasedSnapshot.successor_id == Snapshot.id, ErasedSnapshot.made)
    for row in session.scalars(query.where(~rebuilt).order_by(Snapshot.id.desc())):
        if (found := _successor(session, row)) is not None:
            return [found]
    return []


def _refuse_erased(session: Session, found: Sequence[Snapshot], project: str) -> None:
    """Say what became of a snapshot that had votes of an erased person.

    Raises: DataError.
    """
    if len(found) != 1 or session.get(ErasedSnapshot, found[0].id) is None:
        return
    now = _successor(session, found[0])
    instead = (
        f"read the one with the others' votes instead: {now.digest}"
        if now
        else "no other vote was in it; take a new one with `rlhf feedback snapshot`"
    )
    raise DataError(
        f"the snapshot {found[0].digest[:16]} of the feedback project '{project}' had votes of a "
        f"person who was erased, and cannot be read any more; {instead}"
    )


# ---- what the votes say ----


def _read(
    votes: Iterable[CastVote], write: Callable[[Mapping[str, object]], None] | None = None
) -> _Reading:
    """Read the votes, which come by pair, and hand on the rows of a training file."""
    read = _Reading()
    for _, on_pair in groupby(votes, key=attrgetter("pair_digest")):
        said = sorted((_content(vote), vote) for vote in map(_turned, on_pair))
        ordered = [vote for _, vote in said]
        for_training = _once_each(ordered)
        read.add(ordered, for_training, [content for content, _ in said])
        if write is not None:
            for row in [*gold_rows(ordered), *map(training_row, for_training)]:
                write(row)
    return read


def _turned(vote: CastVote) -> CastVote:
    """A vote with its answers in the order that does not depend on who came first."""
    if not vote.exchanged:
        return vote
    return vote._replace(
        response_a=vote.response_b,
        response_b=vote.response_a,
        model_a=vote.model_b,
        model_b=vote.model_a,
        vote=EXCHANGED.get(vote.vote, vote.vote),
        first=EXCHANGED.get(vote.first, vote.first),
        gold=EXCHANGED.get(vote.gold, vote.gold),
    )


def _once_each(votes: Iterable[CastVote]) -> list[CastVote]:
    """The votes on a pair that are for training: no repeats, and one of each annotator; of a
    machine one for each order in which it was asked."""
    first: dict[tuple[str, str], CastVote] = {}
    kept = [vote for vote in votes if vote.kind != "repeat"]
    for vote in kept:
        if vote.annotator and (_who(vote) not in first or vote.time < first[_who(vote)].time):
            first[_who(vote)] = vote
    return [vote for vote in kept if not vote.annotator or first[_who(vote)] is vote]


def _who(vote: CastVote) -> tuple[str, str]:
    return vote.annotator, vote.first if vote.kind == MACHINE else ""


def _content(vote: CastVote) -> str:
    return digest(
        vote.pair_digest,
        *(vote.vote, vote.first, vote.annotator, vote.kind == "repeat", vote.gold),
        *(vote.margin, vote.seconds, vote.time, vote.source, vote.kept),
    )


def training_row(vote: CastVote) -> dict[str, object]:
    """A vote in the form that `data.preferences` reads.

    A store of before may have somebody who is called as known answers are; their vote is never
    marked as one.
    """
    return {
        "id": vote.pair_digest[:16],
        "prompt": vote.prompt,
        "response_a": vote.response_a,
        "response_b": vote.response_b,
        "vote": vote.vote,
        "shown_first": vote.first,
        "annotator": vote.annotator,
        "gold": bool(vote.gold) and vote.annotator != GOLD,
        "margin": vote.margin,
        "time": vote.time,
        "source": vote.source,
        **vote.kept,
    }


def gold_rows(votes: Sequence[CastVote]) -> list[dict[str, object]]:
    """The known answer to the pair that some votes are on, in the same form; nothing if there is
    none. Of what was said beside a vote it has the columns that were kept."""
    known = next((vote for vote in votes if vote.gold), None)
    if known is None:
        return []
    answer = known._replace(
        vote=known.gold, first="", annotator="", margin=0.0, time="", source="", kept=votes[0].kept
    )
    return [training_row(answer) | {"annotator": GOLD}]


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Callable[[Mapping[str, object]], None]]:
    """What writes a row to a file, which appears when it is whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            yield lambda row: print(json.dumps(row, ensure_ascii=False), file=file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise

"""Snapshots: the votes that count at one moment, kept for good under a digest of what they say.

A file of a snapshot has a vote a line, in the form that `data.preferences` reads:

    id, prompt, response_a, response_b, vote, shown_first, annotator, gold, margin, time, source,
    and the columns that were kept

Repeats are members, as the report on agreement needs them, but are not written for training.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import insert, select

from rlhf_core.data.prepared import canonical_prompt
from rlhf_core.errors import DataError
from tasks.feedback.store import clock
from tasks.feedback.store.content import digest
from tasks.feedback.store.database import Database
from tasks.feedback.store.judgments import CastVote, Judgments
from tasks.feedback.store.records import SnapshotInfo
from tasks.feedback.store.tables import Snapshot, SnapshotMember

LATEST = "latest"


class Snapshots:
    """The snapshots of a project."""

    def __init__(self, database: Database, project_id: int, project: str) -> None:
        self._database = database
        self._project = project_id
        self._name = project
        self._judgments = Judgments(database, project_id)

    def take(self, by: str = "") -> SnapshotInfo:
        """A snapshot of the votes that count now; the same votes are the same snapshot.

        Raises: DataError when there is no vote.
        """
        key, members, pairs, people = self._now()
        with self._database.writing() as session:
            found = session.scalar(select(Snapshot).filter_by(project_id=self._project, digest=key))
            new = found is None
            if found is None:
                found = Snapshot(
                    project_id=self._project,
                    digest=key,
                    votes=len(members),
                    pairs=pairs,
                    annotators=people,
                    by=by,
                    created_at=clock.now(),
                )
                session.add(found)
                session.flush()
                rows = [{"snapshot_id": found.id, "judgment_id": id_} for id_ in members]
                session.execute(insert(SnapshotMember), rows)
            return self._info(found, new)

    def find(self, which: str = LATEST) -> SnapshotInfo:
        """A snapshot by its digest or the beginning of it; `latest` is the last one taken.

        Raises: DataError when there is none, or several begin so.
        """
        return self._info(self._row(which), new=False)

    def votes(self, which: str) -> Iterator[CastVote]:
        """All votes of a snapshot, repeats included."""
        yield from self._judgments.stream(snapshot=self._row(which).id)

    def write(self, which: str, path: Path) -> SnapshotInfo:
        """Write the votes of a snapshot as JSON lines that `data.preferences` reads."""
        found = self._row(which)
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for vote in self._judgments.stream(snapshot=found.id):
                if vote.kind != "repeat":
                    file.write(json.dumps(training_row(vote), ensure_ascii=False) + "\n")
        return self._info(found, new=False)

    def look(self, which: str = LATEST) -> SnapshotInfo:
        """What `take`, for `latest`, would give, without keeping it; else what `find` gives.

        Raises: DataError, as they do.
        """
        if which != LATEST:
            return self.find(which)
        key, members, pairs, people = self._now()
        return SnapshotInfo(self._name, key, len(members), pairs, people, clock.now(), new=False)

    def _now(self) -> tuple[str, list[int], int, int]:
        """Digest, members, pairs and annotators of the votes that count now."""
        said: list[bytes] = []
        members: list[int] = []
        pairs: set[int] = set()
        people: set[str] = set()
        for vote in self._judgments.stream(training=True):
            said.append(bytes.fromhex(_content(vote)))
            members.append(vote.judgment)
            pairs.add(vote.pair)
            people.add(vote.annotator)
        if not members:
            raise DataError(
                f"the feedback project '{self._name}' has no votes yet; import some with "
                f"`rlhf feedback import {self._name} FILE`, or collect them with `rlhf label`"
            )
        key = hashlib.sha256(b"".join(sorted(said))).hexdigest()
        return key, members, len(pairs), len(people - {""})

    def _row(self, which: str) -> Snapshot:
        with self._database.reading() as session:
            query = select(Snapshot).filter_by(project_id=self._project)
            if which == LATEST:
                found = session.scalars(query.order_by(Snapshot.id.desc()).limit(1)).all()
            else:
                found = session.scalars(query.where(Snapshot.digest.startswith(which))).all()
        if len(found) != 1:
            problem = "is ambiguous" if found else "does not exist"
            raise DataError(
                f"the snapshot '{which}' of the feedback project '{self._name}' {problem}; "
                f"`rlhf feedback snapshots {self._name}` lists them"
            )
        return found[0]

    def _info(self, row: Snapshot, new: bool) -> SnapshotInfo:
        return SnapshotInfo(
            self._name, row.digest, row.votes, row.pairs, row.annotators, row.created_at, new
        )


def training_row(vote: CastVote) -> dict[str, object]:
    """A vote in the form that `data.preferences` reads."""
    return {
        "id": str(vote.pair),
        "prompt": vote.prompt,
        "response_a": vote.response_a,
        "response_b": vote.response_b,
        "vote": vote.vote,
        "shown_first": vote.first,
        "annotator": vote.annotator,
        "gold": bool(vote.gold),
        "margin": vote.margin,
        "time": vote.time,
        "source": vote.source,
        **vote.kept,
    }


def _content(vote: CastVote) -> str:
    return digest(
        canonical_prompt(vote.prompt),
        *(vote.response_a, vote.response_b, vote.model_a, vote.model_b),
        *(vote.vote, vote.first, vote.annotator, vote.kind, vote.gold),
        *(vote.margin, vote.seconds, vote.time, vote.source, vote.kept),
    )

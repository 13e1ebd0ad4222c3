"""Votes that were cast elsewhere, put in; and the votes that count, read as a stream."""

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, exists, func, insert, select, update
from sqlalchemy.orm import Session, aliased

from rlhf_core.data.prompts import Prompt as PromptText
from rlhf_core.errors import DataError
from rlhf_core.settings.fields import GOLD
from tasks.feedback.store import clock
from tasks.feedback.store.content import (
    EXCHANGED,
    Content,
    check_kept,
    check_text,
    chunks,
    digest,
)
from tasks.feedback.store.database import Database
from tasks.feedback.store.records import CHOICES, AddedPair, AddedVotes, Ballot, NewPair
from tasks.feedback.store.tables import (
    HOLD_OUT,
    JUDGE,
    MACHINE,
    Annotator,
    Batch,
    BatchPair,
    GoldAnswer,
    Judgment,
    Pair,
    Prompt,
    Response,
    SnapshotMember,
)

ROWS = 2000  # fetched at a time
LONGEST_PSEUDONYM = 200
KINDS = ("fresh", "gold", "repeat", "import", MACHINE)


def judged() -> ColumnElement[bool]:
    """Whether people were asked about the pair of a judgment as judges."""
    return (
        exists()
        .where(BatchPair.pair_id == Judgment.pair_id)
        .where(Batch.id == BatchPair.batch_id, Batch.kind == JUDGE)
    )


def _kept_back() -> list[tuple[str, ColumnElement[bool]]]:
    """What no training may see, by name."""
    return [("verdicts", judged()), ("hold-out", Pair.arm == HOLD_OUT)]


class KeptBack(NamedTuple):
    """Votes that no training may see."""

    votes: int
    pairs: int


class CastVote(NamedTuple):
    """A vote that counts, with everything that training and the reports need."""

    judgment: int
    pair: int
    prompt: PromptText
    response_a: str
    response_b: str
    model_a: str
    model_b: str
    vote: str  # a, b, tie, both_bad; skip only where asked for
    first: str  # a, b or "" (unknown)
    annotator: str  # pseudonym; "" = anonymous
    kind: str  # fresh, gold, repeat, import, machine
    gold: str  # the right answer, if it is known; else ""
    margin: float
    seconds: float | None
    time: str
    note: str
    reason: str
    source: str
    kept: dict[str, str]
    pair_digest: str = ""  # of what the pair says, the same in every store
    exchanged: bool = False  # the answers stand the other way round in a training file
    arm: str = ""  # of the pair, as it is now


class _Placed(NamedTuple):
    """A ballot and the pair that it is about, as the store has them."""

    pair: AddedPair
    ballot: Ballot
    kept: dict[str, str]
    vote: str
    first: str
    key: str


class Judgments:
    """The votes of a project."""

    def __init__(self, database: Database, project_id: int) -> None:
        self._database = database
        self._project = project_id

    def add(self, votes: Iterable[tuple[NewPair, list[Ballot]]], *, chunk: int = 500) -> int:
        """Put in votes that were cast elsewhere; one that is there already is not doubled.

        Returns: the number of new votes.

        Raises: DataError for a vote that cannot be kept; those before it may be in the store.
        """
        return self.put(votes, chunk=chunk).new

    def put(self, votes: Iterable[tuple[NewPair, list[Ballot]]], *, chunk: int = 500) -> AddedVotes:
        """The same, and how many there were already.

        A vote is the same if the same annotator says the same about the same pair, with the same
        answer first and at the same time, wherever it comes from: from a file, or from the page. A
        vote that was taken back is there too. An anonymous vote is the same if it has the same
        source and number as well. Somebody's second, different vote on a pair is kept: it is a
        member of snapshots, but not of a training file, which has a vote of a person once.
        """
        content = Content(self._database, self._project)
        total = AddedVotes(0, 0, 0)
        for some in chunks(votes, chunk):
            for pair, ballots in some:
                check_kept(pair.kept)
                for ballot in ballots:
                    _check(ballot)
            with self._database.writing(self._project) as session:
                pairs = content.put(session, [pair for pair, _ in some])
                placed = [
                    _place(there, ballot, dict(pair.kept))
                    for there, (pair, ballots) in zip(pairs, some, strict=True)
                    for ballot in ballots
                ]
                added = self._cast(session, placed)
            total = AddedVotes(*(one + other for one, other in zip(total, added, strict=True)))
        return total

    def _cast(self, session: Session, placed: Sequence[_Placed]) -> AddedVotes:
        there, voted = self._known(session, placed)
        people = self._annotators(session, placed)
        at = clock.now()
        rows: list[dict[str, Any]] = []
        counted: Counter[int] = Counter()
        known = again = 0
        for item in placed:
            ballot, pair = item.ballot, item.pair.id
            if item.key in there:
                known += 1
                continue
            there.add(item.key)
            if ballot.annotator and ballot.kind not in ("repeat", MACHINE) and item.vote != "skip":
                again += (pair, ballot.annotator) in voted
                voted.add((pair, ballot.annotator))
            rows.append(
                {
                    "project_id": self._project,
                    "pair_id": pair,
                    "annotator_id": people.get(ballot.annotator),
                    "key": item.key,
                    "kind": ballot.kind,
                    "vote": item.vote,
                    "first": item.first,
                    "margin": float(ballot.margin),
                    "seconds": ballot.seconds,
                    "note": ballot.note,
                    "reason": ballot.reason,
                    "source": ballot.source,
                    "time": ballot.time,
                    "kept": item.kept,
                    "at": at,
                }
            )
            if item.vote != "skip" and ballot.kind in ("fresh", "import"):
                counted[pair] += 1
        if rows:
            session.execute(insert(Judgment.__table__), rows)  # type: ignore[arg-type]
        self._count(session, counted)
        return AddedVotes(len(rows), known, again)

    def _known(
        self, session: Session, placed: Sequence[_Placed]
    ) -> tuple[set[str], set[tuple[int, str]]]:
        """The keys of the votes that are there already, and who has voted on which pair."""
        digests = {item.pair.id: item.pair.digest for item in placed}
        later = aliased(Judgment)
        replaced = exists().where(later.replaces_id == Judgment.id)
        query = (
            select(
                Judgment.key,
                Judgment.pair_id,
                Judgment.vote,
                Judgment.first,
                Judgment.kind,
                Judgment.time,
                func.coalesce(Annotator.pseudonym, "").label("annotator"),
                replaced.label("replaced"),
            )
            .outerjoin(Annotator, Annotator.id == Judgment.annotator_id)
            .where(Judgment.pair_id.in_(list(digests)))
        )
        keys, voted = set(), set()
        for row in session.execute(query):
            keys.add(row.key)
            if row.annotator:
                said = row.vote, row.first, row.annotator, row.time
                keys.add(_named_key(digests[row.pair_id], *said))
                if row.vote in CHOICES and row.kind not in ("repeat", MACHINE) and not row.replaced:
                    voted.add((row.pair_id, row.annotator))
        return keys, voted

    def _annotators(self, session: Session, placed: Sequence[_Placed]) -> dict[str, int]:
        """The ids of annotators, by pseudonym."""
        names = {item.ballot.annotator for item in placed} - {""}
        machines = {item.ballot.annotator for item in placed if item.ballot.kind == MACHINE}
        query = select(Annotator.pseudonym, Annotator.id).where(
            Annotator.project_id == self._project, Annotator.pseudonym.in_(sorted(names))
        )
        found = {row.pseudonym: row.id for row in session.execute(query)}
        missing = [
            {
                "project_id": self._project,
                "pseudonym": name,
                "role": "annotator",
                "via": JUDGE if name in machines else "import",
                "state": "left",
                "created_at": clock.now(),
            }
            for name in sorted(names - found.keys())
        ]
        if missing:
            columns = Annotator.pseudonym, Annotator.id
            made = session.execute(insert(Annotator).returning(*columns), missing)
            found |= {row.pseudonym: row.id for row in made}
        return found

    def _count(self, session: Session, counted: Counter[int]) -> None:
        """Add to the votes of pairs; what was asked for may be there now."""
        by_number: dict[int, list[int]] = {}
        for pair, number in counted.items():
            by_number.setdefault(number, []).append(pair)
        for number, pairs in by_number.items():
            session.execute(
                update(Pair)
                .where(Pair.id.in_(pairs))
                .values(votes=Pair.votes + number, taken=Pair.taken + number)
                .execution_options(synchronize_session=False)
            )
        session.execute(
            update(Pair)
            .where(Pair.id.in_(list(counted)), Pair.state == "open", Pair.votes >= Pair.wanted)
            .values(state="done")
            .execution_options(synchronize_session=False)
        )

    # ---- reading ----

    def stream(
        self,
        *,
        snapshot: int | None = None,
        skips: bool = False,
        after: int = 0,
        training: bool = False,
        by_pair: bool = False,
        also: Sequence[str] = (),
    ) -> Iterator[CastVote]:
        """The votes that count, in the order in which they came, a few at a time in memory.

        All of them are as they were when the first was read, whatever comes meanwhile.

        Args:
            snapshot: only its members; None = those that count now.
            skips: also what was skipped, with its reason.
            after: only judgments with a higher number.
            training: without those on pairs that people were asked about as judges: their prompts
                are those of an evaluation, which no training may see; nor may it see the hold-out
                of an ordered queue.
            by_pair: in the order of `pair_digest`, which is the same in every store.
            also: of `KEPT_BACK`, what comes all the same.
        """
        with self._database.reading() as session:
            query = self._query(snapshot, skips).where(Judgment.id > after)
            if training:
                query = query.where(
                    *(~is_kept for name, is_kept in _kept_back() if name not in also)
                )
            order = (Pair.digest,) if by_pair else ()
            rows = session.execute(
                query.order_by(*order, Judgment.id).execution_options(yield_per=ROWS)
            )
            for row in rows:
                yield CastVote(*row)

    def kept_back(self, also: Sequence[str] = (), *, skips: bool = False) -> dict[str, KeptBack]:
        """The votes that count, and that `stream` leaves out for training, by the reason.

        Args:
            also: as of `stream`.
            skips: whether skips count.
        """
        found: dict[str, KeptBack] = {}
        earlier: list[ColumnElement[bool]] = []
        with self._database.reading() as session:
            for name, is_kept in _kept_back():
                if name in also:
                    continue
                query = self._query(None, skips).where(is_kept, *(~one for one in earlier))
                earlier.append(is_kept)
                counts = query.with_only_columns(
                    func.count(Judgment.id), func.count(Judgment.pair_id.distinct())
                )
                votes, pairs = session.execute(counts).one()
                if votes:
                    found[name] = KeptBack(votes, pairs)
        return found

    def skips(self, until: int) -> Iterator[CastVote]:
        """The skips that count, as `stream` gives them, up to the number of a judgment."""
        with self._database.reading() as session:
            query = self._query(None, True).where(
                Judgment.vote == "skip", Judgment.id <= until, ~judged()
            )
            rows = session.execute(query.order_by(Judgment.id).execution_options(yield_per=ROWS))
            for row in rows:
                yield CastVote(*row)

    def _query(self, snapshot: int | None, skips: bool) -> Select[tuple[object, ...]]:
        a, b = aliased(Response), aliased(Response)
        later = aliased(Judgment)
        gold = GoldAnswer.vote if snapshot is None else SnapshotMember.gold
        query = (
            select(
                Judgment.id,
                Judgment.pair_id,
                Prompt.content,
                a.text,
                b.text,
                a.model,
                b.model,
                Judgment.vote,
                Judgment.first,
                func.coalesce(Annotator.pseudonym, ""),
                Judgment.kind,
                func.coalesce(gold, ""),
                Judgment.margin,
                Judgment.seconds,
                Judgment.time,
                Judgment.note,
                Judgment.reason,
                Judgment.source,
                func.coalesce(Judgment.kept, Pair.kept),
                Pair.digest,
                Pair.exchanged,
                Pair.arm,
            )
            .join(Pair, Pair.id == Judgment.pair_id)
            .join(Prompt, Prompt.id == Pair.prompt_id)
            .join(a, a.id == Pair.response_a_id)
            .join(b, b.id == Pair.response_b_id)
            .outerjoin(Annotator, Annotator.id == Judgment.annotator_id)
            .where(Judgment.project_id == self._project)
        )
        if snapshot is not None:
            return query.join(SnapshotMember, SnapshotMember.judgment_id == Judgment.id).where(
                SnapshotMember.snapshot_id == snapshot
            )
        counted = (*CHOICES, "skip") if skips else CHOICES
        return query.outerjoin(GoldAnswer, GoldAnswer.pair_id == Judgment.pair_id).where(
            Judgment.vote.in_(counted), ~exists().where(later.replaces_id == Judgment.id)
        )


def _place(pair: AddedPair, ballot: Ballot, kept: dict[str, str]) -> _Placed:
    vote: str = ballot.vote
    first: str = ballot.first
    if pair.swapped:
        vote, first = EXCHANGED.get(vote, vote), EXCHANGED.get(first, first)
    if ballot.annotator:
        key = _named_key(pair.digest, vote, first, ballot.annotator, ballot.time)
    else:
        more = ballot.time, ballot.source, ballot.ballot
        key = digest(pair.digest, vote, first, *more)
    return _Placed(pair, ballot, kept, vote, first, key)


def _named_key(pair: str, vote: str, first: str, annotator: str, time: str) -> str:
    return digest(pair, vote, first, annotator, time)


def _check(ballot: Ballot) -> None:
    """Refuse a vote that says something impossible.

    Raises: DataError.
    """
    if ballot.vote not in (*CHOICES, "skip"):
        raise DataError(f"{ballot.vote!r} is no vote; a vote is one of {', '.join(CHOICES)}, skip")
    if ballot.first not in ("a", "b", ""):
        raise DataError(f"{ballot.first!r} is no side; what was shown first is a, b or unknown")
    if ballot.kind not in KINDS:
        raise DataError(f"{ballot.kind!r} is no kind of vote; it is one of {', '.join(KINDS)}")
    if not math.isfinite(ballot.margin):
        raise DataError(f"the margin of a vote is {ballot.margin}; it has to be a finite number")
    if ballot.seconds is not None and not (math.isfinite(ballot.seconds) and ballot.seconds >= 0):
        raise DataError(f"a vote cannot have taken {ballot.seconds} seconds")
    for what in ("annotator", "time", "note", "reason", "source"):
        check_text(f"the {what} of a vote", getattr(ballot, what))
    check_pseudonym(ballot.annotator)


def check_pseudonym(name: str) -> None:
    """Refuse a name that is too long, that a terminal or a page could not show, or that is the
    one of known answers.

    Raises: DataError.
    """
    if name.strip() == GOLD:
        raise DataError(
            f"an annotator is called '{GOLD}', and votes of this name are known answers; give the "
            "person another name"
        )
    if len(name) > LONGEST_PSEUDONYM or any(unicodedata.category(c) == "Cc" for c in name):
        raise DataError(
            f"an annotator is called {name[:50]!r}: a name has up to {LONGEST_PSEUDONYM} "
            "characters, and no control characters"
        )

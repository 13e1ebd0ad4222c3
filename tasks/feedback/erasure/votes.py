"""A person's rows in the preference store: deleted, or emptied where a row has to stay.

Deleted are identity, sessions, consents, invitations, what was on the desk, and the annotator. Of a
judgment a tombstone stays: that there was a vote on this pair, and when it came in. It has no
pseudonym, vote, side, note, reason, time, source or columns of the user's any more. Triggers in the
database allow exactly that, and only while the erasure is open.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Text, cast, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session as Transaction
from sqlalchemy.orm import aliased

from tasks.feedback.erasure.names import Name
from tasks.feedback.erasure.requests import NOBODY, Request
from tasks.feedback.store.content import chunks
from tasks.feedback.store.drawing import set_marks_back
from tasks.feedback.store.records import CHOICES
from tasks.feedback.store.tables import (
    Annotator,
    Assignment,
    AuditEntry,
    Consent,
    ErasedSnapshot,
    GoldAnswer,
    Identity,
    Invitation,
    Judgment,
    Pair,
    Session,
    Snapshot,
    SnapshotMember,
)

ROWS = 500
# Tables with rows that are deleted or emptied, which Postgres has to write anew.
TABLES = (
    *("identities", "invitations", "sessions", "consents", "assignments", "annotators"),
    *("judgments", "audit_log", "snapshots", "gold_answers", "pairs", "erasures"),
)


class ErasedRows(NamedTuple):
    """How many rows are gone, and what that changed."""

    judgments: int = 0
    identities: int = 0
    sessions: int = 0
    invitations: int = 0
    consents: int = 0
    assignments: int = 0
    log_entries: int = 0
    pairs: int = 0  # that had a vote or a lease
    reopened: int = 0  # of them, that want votes again


def rows_of(request: Request, name: Name) -> ErasedRows:
    """What there is of a person, as `erase_rows` would count it; nothing is changed."""
    with request.project.database.reading() as session:
        if request.annotator is None or session.get(Annotator, request.annotator) is None:
            return ErasedRows()
        own = _own(session, request)
        found = {what: len(_numbers(session, rows)) for what, rows in own.items()}
        pairs = _pairs(session, request.annotator)
        entries = _entries(session, request, name)
        return ErasedRows(**found, log_entries=len(entries), pairs=len(pairs))


def sign_out(request: Request) -> None:
    """End the sessions of a person, whose votes are refused from now on."""
    if request.annotator is None:
        return
    with request.project.database.writing(request.project.id) as session:
        session.execute(delete(Session).where(Session.annotator_id == request.annotator))
        session.execute(
            update(Annotator).where(Annotator.id == request.annotator).values(state="left")
        )


def snapshots_of(request: Request) -> list[int]:
    """The snapshots with votes of a person that nothing has come in the place of."""
    with request.project.database.reading() as session:
        return _snapshots(session, request)


def erase_rows(request: Request, name: Name) -> ErasedRows | None:
    """Delete and empty the rows of a person, all of them or none.

    Returns: how many; None while a snapshot has votes of the person, as one that was taken
        meanwhile: it has to be rebuilt first.
    """
    project, person = request.project, request.annotator
    with project.database.writing(project.id) as session:
        if person is None or session.get(Annotator, person) is None:
            return ErasedRows()
        if _snapshots(session, request):
            return None
        own = _own(session, request)
        counts = {what: len(_numbers(session, rows)) for what, rows in own.items()}
        pairs = _pairs(session, person)
        _empty(session, request)
        session.execute(
            delete(Invitation).where(Invitation.id.in_(_numbers(session, own["invitations"])))
        )
        for table in (Assignment, Consent, Session, Identity):
            session.execute(delete(table).where(table.annotator_id == person))
        entries = _rewrite_log(session, request, name)
        _rewrite_names(session, request)
        session.execute(delete(Annotator).where(Annotator.id == person))
        session.flush()
        reopened = _count_again(session, project.id, pairs)
        return ErasedRows(**counts, log_entries=entries, pairs=len(pairs), reopened=reopened)


def _own(session: Transaction, request: Request) -> Mapping[str, Any]:
    """What is deleted or emptied, as queries of numbers."""
    person = request.annotator
    identity = session.get(Identity, person)
    same = [Invitation.annotator_id == person]
    if identity is not None and identity.email:
        same.append(func.lower(Invitation.email) == identity.email.lower())
    elif identity is not None and identity.name:
        same.append((Invitation.name == identity.name) & (Invitation.email == ""))
    return {
        "judgments": select(Judgment.id).where(Judgment.annotator_id == person),
        "identities": select(Identity.annotator_id).where(Identity.annotator_id == person),
        "sessions": select(Session.token_digest).where(Session.annotator_id == person),
        "invitations": select(Invitation.id).where(
            Invitation.project_id == request.project.id, or_(*same)
        ),
        "consents": select(Consent.id).where(Consent.annotator_id == person),
        "assignments": select(Assignment.id).where(Assignment.annotator_id == person),
    }


def _numbers(session: Transaction, query: Any) -> Sequence[Any]:
    return session.scalars(query).all()


def _pairs(session: Transaction, person: int) -> list[int]:
    voted = select(Judgment.pair_id).where(Judgment.annotator_id == person)
    leased = select(Assignment.pair_id).where(Assignment.annotator_id == person)
    return sorted({*session.scalars(voted), *session.scalars(leased)})


def _snapshots(session: Transaction, request: Request) -> list[int]:
    if request.annotator is None:  # nobody; those without a name are others
        return []
    member = (
        exists()
        .where(SnapshotMember.snapshot_id == Snapshot.id)
        .where(Judgment.id == SnapshotMember.judgment_id)
        .where(Judgment.annotator_id == request.annotator)
    )
    done = exists().where(ErasedSnapshot.snapshot_id == Snapshot.id)
    query = select(Snapshot.id).where(Snapshot.project_id == request.project.id, member, ~done)
    return list(session.scalars(query.order_by(Snapshot.id)))


def _empty(session: Transaction, request: Request) -> None:
    """Make tombstones of the judgments."""
    mine = select(Judgment.id).where(Judgment.annotator_id == request.annotator)
    for some in chunks(session.scalars(mine).all(), ROWS):
        session.execute(
            update(Judgment),
            [
                {
                    "id": number,
                    "annotator_id": None,
                    "assignment_id": None,
                    "key": f"erased-{secrets.token_hex(16)}",
                    "vote": "withdrawn",
                    "first": "",
                    "margin": 0.0,
                    "seconds": None,
                    "note": "",
                    "reason": "",
                    "source": "",
                    "time": "",
                    "kept": None,
                    "erasure": request.id,
                }
                for number in some
            ],
        )


def _count_again(session: Transaction, project: int, pairs: Sequence[int]) -> int:
    """Set the counters and states of pairs right; how many want votes again."""
    reopened = 0
    later = aliased(Judgment)
    counting = (
        Judgment.vote.in_(CHOICES),
        Judgment.kind.in_(("fresh", "import")),
        ~exists().where(later.replaces_id == Judgment.id),
    )
    for some in chunks(pairs, ROWS):
        votes = _counted(session, some, Judgment, counting)
        leases = _counted(
            session, some, Assignment, (Assignment.state == "open", Assignment.kind == "fresh")
        )
        rows = session.scalars(select(Pair).where(Pair.id.in_(some))).all()
        for pair in rows:
            before = pair.state
            pair.votes = votes.get(pair.id, 0)
            pair.taken = pair.votes + leases.get(pair.id, 0)
            if pair.state == "done" and pair.votes < pair.wanted:
                pair.state = "open"
            reopened += pair.state != before
        session.flush()
        free = [
            (pair.priority, pair.id)
            for pair in rows
            if pair.state == "open" and pair.taken < pair.wanted
        ]
        if free:
            set_marks_back(session, project, *min(free))
    return reopened


def _counted(
    session: Transaction, pairs: Sequence[int], table: Any, conditions: Sequence[Any]
) -> dict[int, int]:
    query = select(table.pair_id, func.count()).where(table.pair_id.in_(pairs), *conditions)
    return {row[0]: row[1] for row in session.execute(query.group_by(table.pair_id))}


# ---- the pseudonym in rows of others ----


def _entries(
    session: Transaction, request: Request, name: Name
) -> list[tuple[int, dict[str, Any]]]:
    """The entries of the log that have the pseudonym, and what they have to say instead."""
    found: list[tuple[int, dict[str, Any]]] = []
    query = select(AuditEntry).where(AuditEntry.project_id == request.project.id)
    for row in session.scalars(query.execution_options(yield_per=ROWS)):
        new: dict[str, Any] = {}
        if row.actor == name.text:
            new["actor"] = NOBODY
        of_person = row.action == "forget" and row.subject == str(request.annotator)
        if of_person or name.is_meant(row.subject):
            new["subject"] = NOBODY
        if _mentions(row.details, name):
            new["details"] = {}
        if new:
            found.append((row.id, new))
    return found


def _rewrite_log(session: Transaction, request: Request, name: Name) -> int:
    entries = _entries(session, request, name)
    for number, new in entries:
        session.execute(
            update(AuditEntry)
            .where(AuditEntry.id == number)
            .values(**new)
            .execution_options(synchronize_session=False)
        )
    return len(entries)


def _rewrite_names(session: Transaction, request: Request) -> None:
    """Whoever took a snapshot, gave an answer or wrote an invitation is nobody now."""
    name, project = str(request.pseudonym), request.project.id
    here = select(Pair.id).where(Pair.project_id == project)
    for change in (
        update(Snapshot).where(Snapshot.project_id == project, Snapshot.by == name),
        update(Invitation).where(Invitation.project_id == project, Invitation.by == name),
        update(GoldAnswer).where(GoldAnswer.pair_id.in_(here), GoldAnswer.by == name),
    ):
        done = change.values(by=NOBODY).execution_options(synchronize_session=False)
        session.execute(done)
    # The columns of a pair are those of its first vote, unless a vote from the page has them too,
    # which a snapshot may have.
    has_them = exists().where(
        Judgment.pair_id == Pair.id, Judgment.kept.is_(None), Judgment.erasure.is_(None)
    )
    columns = select(Pair).where(
        Pair.project_id == project,
        cast(Pair.kept, Text).contains(name, autoescape=True),
        ~has_them,
    )
    for pair in session.scalars(columns).all():
        pair.kept = {key: "" if value == name else value for key, value in pair.kept.items()}


def _mentions(value: Any, name: Name) -> bool:
    """Whether a name is a value, or a key, anywhere in what JSON holds."""
    if isinstance(value, dict):
        return any(_mentions(part, name) for item in value.items() for part in item)
    if isinstance(value, list):
        return any(_mentions(part, name) for part in value)
    return isinstance(value, str) and name.is_meant(value)

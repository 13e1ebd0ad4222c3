"""What people wrote: notes and reasons of skips, and the log of who changed what."""

from datetime import datetime
from typing import Any, Literal, NamedTuple, TypeAlias

from sqlalchemy import or_, select

from tasks.feedback.admin.people import counts
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import Annotator, AuditEntry, Judgment

PAGE = 50
What: TypeAlias = Literal["all", "notes", "skips"]


class Writing(NamedTuple):
    """A note or the reason of a skip."""

    id: int
    pair: int
    pseudonym: str  # "" = anonymous
    vote: str
    note: str
    reason: str
    at: datetime


class Change(NamedTuple):
    """An entry of the audit log."""

    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    details: dict[str, Any]


def writings(
    project: FeedbackProject, *, what: What = "all", search: str = "", before: int | None = None
) -> list[Writing]:
    """A page of what was written, newest first.

    Args:
        what: notes beside votes, skips, or both.
        search: only what contains this text.
        before: only what has a lower number; that of the last one of a page gives the next page.
    """
    wanted = {
        "all": or_(Judgment.note != "", Judgment.vote == "skip"),
        "notes": Judgment.note != "",
        "skips": Judgment.vote == "skip",
    }[what]
    query = (
        select(Judgment, Annotator.pseudonym)
        .outerjoin(Annotator, Annotator.id == Judgment.annotator_id)
        .where(Judgment.project_id == project.id, wanted, counts())
        .order_by(Judgment.id.desc())
        .limit(PAGE)
    )
    if search:
        query = query.where(
            or_(
                Judgment.note.icontains(search, autoescape=True),
                Judgment.reason.icontains(search, autoescape=True),
            )
        )
    if before is not None:
        query = query.where(Judgment.id < before)
    with project.database.reading() as session:
        return [
            Writing(said.id, said.pair_id, name or "", said.vote, said.note, said.reason, said.at)
            for said, name in session.execute(query)
        ]


def changes(project: FeedbackProject, *, before: int | None = None) -> list[Change]:
    """A page of the audit log, newest first."""
    query = (
        select(AuditEntry)
        .filter_by(project_id=project.id)
        .order_by(AuditEntry.id.desc())
        .limit(PAGE)
    )
    if before is not None:
        query = query.where(AuditEntry.id < before)
    with project.database.reading() as session:
        return [
            Change(row.id, row.at, row.actor, row.action, row.subject, row.details)
            for row in session.scalars(query)
        ]

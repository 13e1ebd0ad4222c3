"""Who changed what: entries are added and never changed."""

from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from tasks.feedback.store import clock
from tasks.feedback.store.database import Database
from tasks.feedback.store.tables import AuditEntry


def note(
    session: Session,
    project_id: int | None,
    actor: str,
    action: str,
    subject: str = "",
    details: Mapping[str, Any] | None = None,
) -> None:
    """Add an entry, in the transaction of the change."""
    session.add(
        AuditEntry(
            project_id=project_id,
            at=clock.now(),
            actor=actor,
            action=action,
            subject=subject,
            details=dict(details or {}),
        )
    )


def entries(
    database: Database, project_id: int | None = None, limit: int | None = None
) -> Iterator[AuditEntry]:
    """The log, newest first."""
    with database.reading() as session:
        query = select(AuditEntry).order_by(AuditEntry.id.desc())
        if project_id is not None:
            query = query.filter_by(project_id=project_id)
        yield from session.scalars(query.limit(limit).execution_options(yield_per=500))

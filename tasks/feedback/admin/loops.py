"""Stops what batches would start: a person's hand on the loop."""

from sqlalchemy import select

from tasks.feedback.store import audit, clock
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import ASK, Batch


def stop(project: FeedbackProject, by: str, batch: int | None = None) -> list[str]:
    """Let nothing follow the batches that wait to start a deployment, or one of them.

    Their pairs stay in the queue, and their votes count. A run that is under way goes on.

    Returns: the names of the batches.
    """
    with project.database.writing(project.id) as session:
        query = select(Batch).where(
            Batch.project_id == project.id, Batch.kind == ASK, Batch.resumed_at.is_(None)
        )
        query = query.where(Batch.id == batch) if batch is not None else query
        found = [
            row for row in session.scalars(query.order_by(Batch.id)) if row.details.get("then")
        ]
        for row in found:
            kept = {key: value for key, value in row.details.items() if key != "problem"}
            row.details = {**kept, "stopped": True}  # by whom, the log says
            row.resumed_at = clock.now()
            audit.note(session, project.id, by, "stop loop", row.name, {"then": kept["then"]})
        return [row.name for row in found]

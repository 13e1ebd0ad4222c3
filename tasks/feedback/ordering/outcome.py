"""What came of putting a queue in order; the last time is in the log of the project."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select

from rlhf_core.functional.interval import Interval
from rlhf_core.labelling.saved import SETTLED, Savings
from tasks.feedback.ordering.arrivals import ORDER
from tasks.feedback.store import audit
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import AuditEntry


@dataclass(frozen=True)
class QueueOrder:
    """What was put in order, and what the order has saved so far."""

    at: datetime
    model: str  # whose features were used; "" = there was none, so all is random
    placed: int  # pairs with a new place
    votes: int  # cast on ordered pairs
    by_design: bool  # False: in random order, for lack of a model or since nothing is saved
    savings: Savings | None  # None: too few votes to say
    seconds: float = 0.0  # that it took
    held_out: int = 0  # of the pairs with a new place
    design_votes: int = 0  # of all arms, since the first that the design asked for

    @property
    def sentence(self) -> str:
        """What an admin should know."""
        if not self.model:
            return "In random order: the project has no reward model yet."
        if self.savings is None and not self.by_design:
            return (
                f"In random order: after {self.votes:,} votes the random arm and the hold-out are "
                "too small to say whether the other order saves labels."
            )
        if self.savings is None:
            return f"Most informative first, by {self.model}; too few votes to say what that saves."
        value, low, high = (f"{100 * share:.0f} %" for share in self.savings.saved)
        found = f"labels saved: {value} ({low} to {high}), by {self.votes:,} votes"
        if self.by_design:
            settled = "" if self.design_votes >= SETTLED else f"; decided at {SETTLED} votes"
            return f"Most informative first, by {self.model}; {found}{settled}."
        return f"In random order, since the other order saves nothing; {found}."

    @property
    def said(self) -> str:
        """The same, with what was done."""
        held_out = f" {self.held_out:,} of them are held out: no training sees their votes."
        return f"{self.placed:,} pairs in order. {self.sentence}{held_out * bool(self.held_out)}"

    @property
    def numbers(self) -> dict[str, float]:
        """The metrics, by name."""
        found = {
            "labelling/votes": float(self.votes),
            "labelling/placed": float(self.placed),
            "labelling/by_design": float(self.by_design),
            "labelling/seconds": self.seconds,
        }
        if self.savings is not None:
            saved, labels = self.savings.saved, self.savings.labels
            found |= {
                "labelling/saved": saved.value,
                "labelling/saved_low": saved.low,
                "labelling/saved_high": saved.high,
                "labelling/labels_saved": labels.value,
                "labelling/labels_saved_low": labels.low,
                "labelling/labels_saved_high": labels.high,
                "labelling/design_votes": float(self.savings.design_votes),
                "labelling/random_votes": float(self.savings.random_votes),
                "labelling/tested_prompts": float(self.savings.tested),
            }
        return found


def last_order(project: FeedbackProject) -> QueueOrder | None:
    """How the queue was put in order last, with the estimate; None if it never was."""
    found = orders(project, 1)
    return found[-1] if found else None


def orders(project: FeedbackProject, latest: int = 500) -> list[QueueOrder]:
    """The latest orders of the queue, the oldest first."""
    query = select(AuditEntry).filter_by(project_id=project.id, action=ORDER)
    with project.database.reading() as session:
        entries = session.scalars(query.order_by(AuditEntry.id.desc()).limit(latest)).all()
    return [_order_of(entry) for entry in reversed(entries)]


def _order_of(entry: AuditEntry) -> QueueOrder:
    details = dict(entry.details)
    savings = details.pop("savings")
    return QueueOrder(at=entry.at, savings=_savings_of(savings), **details)


def remember(
    project: FeedbackProject,
    by: str,
    model: str,
    placed: int,
    votes: int,
    by_design: bool,
    savings: Savings | None,
    **more: float,
) -> QueueOrder:
    """Keep what was done in the log of the project.

    Args:
        more: the other fields of a `QueueOrder`.
    """
    details: dict[str, Any] = {
        "model": model,
        "placed": placed,
        "votes": votes,
        "by_design": by_design,
        "savings": None if savings is None else asdict(savings),
        **more,
    }
    with project.database.writing(project.id) as session:
        audit.note(session, project.id, by, ORDER, project.name, details)
    found = last_order(project)
    assert found is not None
    return found


def begin(project: FeedbackProject, by: str) -> None:
    """Have pairs that come in get their arms, if the rules want an order and there was none."""
    if project.rules.ordered and last_order(project) is None:
        remember(project, by, "", 0, 0, False, None)


def _savings_of(details: Mapping[str, Any] | None) -> Savings | None:
    if details is None:
        return None
    lists = {name: tuple(details[name]) for name in ("sizes", "random_loss", "design_loss")}
    return Savings(**{**details, **lists, "saved": Interval(*details["saved"])})

"""What annotators agree on, for admins: looked at anew when votes have come in."""

import threading
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, Response
from sqlalchemy import func, select

from rlhf_core.errors import DataError
from tasks.feedback.page.access import Admin, OwnProject, admin
from tasks.feedback.page.pages import page
from tasks.feedback.store import clock
from tasks.feedback.store.store import FeedbackProject
from tasks.feedback.store.tables import Judgment

if TYPE_CHECKING:  # scipy and pandas take seconds, and nobody waits for them to label
    from rlhf_core.agreement.quality import Quality

router = APIRouter(prefix="/admin/agreement", dependencies=[Depends(admin)])
MOST_PEOPLE = 200  # in the table; the whole report has them all


class Examined(NamedTuple):
    """A report, and which votes it has seen."""

    last: int  # number of the last judgment
    at: datetime
    quality: "Quality"


class Examiner:
    """Keeps the report of each project until another judgment comes in. One at a time is made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[int, Examined] = {}

    def look(self, project: FeedbackProject) -> Examined:
        """The report on the votes as they are now.

        Raises: DataError when there is no vote.
        """
        from tasks.feedback.quality.examine import examine

        with self._lock:
            with project.database.reading() as session:
                query = select(func.max(Judgment.id)).filter_by(project_id=project.id)
                last = session.scalar(query) or 0
            known = self._found.get(project.id)
            if known is None or known.last != last:
                known = Examined(last, clock.now(), examine(project))
                self._found[project.id] = known
            return known


def _examined(request: Request, project: FeedbackProject) -> Examined:
    examiner: Examiner = request.app.state.examiner
    return examiner.look(project)


@router.get("")
def show(who: Admin, project: OwnProject, request: Request) -> Response:
    """The main figures, each with its interval."""
    try:
        found = _examined(request, project)
    except DataError:
        found = None
    judges = _judges(found.quality) if found else []
    return page(
        "admin_agreement.html",
        csrf=who.csrf,
        who=who,
        project=project.name,
        rules=project.rules,
        here="agreement",
        at=found.at if found else None,
        quality=found.quality if found else None,
        most=MOST_PEOPLE,
        judges=judges,
    )


def _judges(quality: "Quality") -> list[str]:
    from rlhf_core.agreement.machines import machine_sentence

    return [machine_sentence(machine) for machine in quality.machines]


@router.get("/report.html")
def report(who: Admin, project: OwnProject, request: Request) -> Response:
    """The whole report as a file: it has its own styles, which this server lets no page have."""
    from tasks.feedback.quality.page import quality_page

    found = _examined(request, project)
    headers = {"Content-Disposition": 'attachment; filename="agreement.html"'}
    return HTMLResponse(quality_page(found.quality), headers=headers)

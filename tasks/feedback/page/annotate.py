"""One pair a screen: what an annotator sees, and what comes back.

Nothing that is sent tells what kind of task it is, who wrote an answer or how others voted: the
same fields in the same order, a token that is drawn for each task, and answers that leave on a
clock, so that a control question takes as long as a fresh pair.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import HTMLResponse
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from tasks.feedback.page.access import Here, OwnProject
from tasks.feedback.page.pages import page
from tasks.feedback.page.progress import Remaining
from tasks.feedback.page.rendering import Rendered, rendered, rendered_prompt
from tasks.feedback.store import clock
from tasks.feedback.store.people import SignedIn
from tasks.feedback.store.queue import StaleTaskError
from tasks.feedback.store.records import Task, Vote
from tasks.feedback.store.store import FeedbackProject

DESK = 2  # tasks that a browser holds: the one that is shown, and the next
TICK = 0.025  # seconds; answers leave at a multiple of it
LONGEST_DAY = timedelta(hours=25)  # when clocks go back
LONGEST_NOTE = 4000  # characters
REASONS = (
    "I do not know enough about this topic",
    "I do not read this language",
    "It is offensive or harmful",
    "The question makes no sense",
    "The answers are broken or cut off",
)

router = APIRouter()
Key = Annotated[str, Field(pattern=r"^[0-9a-f-]{16,64}$")]


class PostedVote(BaseModel):
    """A vote as the page sends it."""

    model_config = ConfigDict(extra="forbid")

    task: str = Field(pattern=r"^[0-9a-f]{32}$")
    choice: Literal["left", "right", "tie", "both_bad", "skip"]
    key: Key
    seconds: float | None = Field(
        None, ge=0, le=86_400, allow_inf_nan=False, description="In sight and in focus"
    )
    note: str = Field("", max_length=LONGEST_NOTE)
    reason: str = Field("", max_length=1000)


class PostedUndo(BaseModel):
    """The wish to take the last vote back; the same key twice is one wish."""

    model_config = ConfigDict(extra="forbid")

    key: Key


class View(BaseModel):
    """A text as HTML, in both views."""

    markdown: str
    plain: str


class ShownTask(BaseModel):
    """A task as the browser gets it."""

    task: str
    prompt: View
    left: View
    right: View


class Desk(BaseModel):
    """What is to be done now. Without tasks, `paused` says whether to wait for the project."""

    tasks: list[ShownTask]
    paused: bool


class DeskAgain(Desk):
    """The desk after an undo."""

    undone: bool


class ShownProgress(BaseModel):
    """How far somebody is."""

    done: int
    today: int
    left: int
    more: bool


class OwnSession(BaseModel):
    """Whose page this is: the proof for requests, and whose unsent votes may be sent."""

    csrf: str
    owner: str


@contextmanager
def on_the_clock() -> Iterator[None]:
    """Leave at a multiple of `TICK` after entering."""
    start = time.monotonic()
    try:
        yield
    finally:
        time.sleep(TICK - (time.monotonic() - start) % TICK)


def owner_of(who: SignedIn) -> str:
    """What unsent votes in a browser are kept under: tells people apart, and not who they are."""
    return hashlib.sha256(f"outbox {who.project} {who.pseudonym}".encode()).hexdigest()[:16]


def _view(text: Rendered) -> View:
    return View(markdown=text.markdown, plain=text.plain)


def _shown(task: Task) -> ShownTask:
    return ShownTask(
        task=task.token,
        prompt=_view(rendered_prompt(task.prompt)),
        left=_view(rendered(task.left)),
        right=_view(rendered(task.right)),
    )


def _tasks(who: SignedIn, project: FeedbackProject) -> list[ShownTask]:
    return [_shown(task) for task in project.queue.lease(who.annotator, DESK)]


@router.get("/")
def show(who: Here, project: OwnProject) -> HTMLResponse:
    """The page. Its scripts ask for the tasks."""
    rules = project.rules
    return page(
        "task.html",
        csrf=who.csrf,
        owner=owner_of(who),
        admin=who.role == "admin",
        question=rules.question,
        guidelines=rules.guidelines,
        reasons=REASONS,
        lease_seconds=round(60 * rules.lease_minutes),
        longest_note=LONGEST_NOTE,
    )


@router.get("/api/session")
def session(who: Here) -> OwnSession:
    """For a page that was open while somebody signed in again."""
    return OwnSession(csrf=who.csrf, owner=owner_of(who))


@router.get("/api/tasks")
def tasks(who: Here, project: OwnProject) -> Desk:
    """The two tasks on top of the desk: the one that is shown, and the next."""
    with on_the_clock():
        found = _tasks(who, project)
        return Desk(tasks=found, paused=not found and project.rules.paused)


@router.post("/api/votes", status_code=204)
def vote(posted: PostedVote, who: Here, project: OwnProject) -> None:
    """Keep a vote; the same key twice is one vote."""
    said = Vote(posted.choice, posted.key, posted.seconds, posted.note, posted.reason)
    with on_the_clock():
        try:
            project.queue.vote(who.annotator, posted.task, said)
        except StaleTaskError as error:
            raise HTTPException(409, str(error)) from error


@router.post("/api/undo")
def undo(posted: PostedUndo, who: Here, project: OwnProject) -> DeskAgain:
    """Take the last vote or skip back; its task is on top of the desk again."""
    with on_the_clock():
        try:
            undone = project.queue.undo(who.annotator, posted.key) is not None
        except StaleTaskError as error:
            raise HTTPException(409, str(error)) from error
        found = _tasks(who, project)
        return DeskAgain(tasks=found, paused=not found and project.rules.paused, undone=undone)


def _remaining(request: Request) -> Remaining:
    state = request.app.state
    if not hasattr(state, "remaining"):
        state.remaining = Remaining()
    found: Remaining = state.remaining
    return found


@router.get("/api/progress")
def progress(
    who: Here,
    project: OwnProject,
    remaining: Annotated[Remaining, Depends(_remaining)],
    since: AwareDatetime | None = None,
) -> ShownProgress:
    """How many are done, in all and since midnight where the annotator is, and left."""
    earliest = clock.now() - LONGEST_DAY
    moment = max(since.astimezone(UTC), earliest) if since else earliest
    found = project.queue.progress(who.annotator, moment)
    left, more = remaining.tell((project.id, who.annotator), found)
    return ShownProgress(done=found.done, today=found.recent, left=left, more=more)

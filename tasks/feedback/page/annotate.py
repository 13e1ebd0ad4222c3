"""One pair a screen: what an annotator sees, and what comes back."""

from typing import Literal

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, ConfigDict, Field

from tasks.feedback.page.access import Here, OwnProject
from tasks.feedback.store.queue import StaleTaskError
from tasks.feedback.store.records import Vote

router = APIRouter()


class PostedVote(BaseModel):
    """A vote as the page sends it."""

    model_config = ConfigDict(extra="forbid")

    task: str = Field(pattern=r"^[0-9a-f]{32}$")
    choice: Literal["left", "right", "tie", "both_bad", "skip"]
    key: str = Field(pattern=r"^[0-9a-f-]{16,64}$")
    seconds: float | None = Field(None, ge=0, le=86_400)
    note: str = Field("", max_length=4000)
    reason: str = Field("", max_length=1000)


@router.get("/api/tasks")
def tasks(who: Here, project: OwnProject) -> list[dict[str, object]]:
    """The two tasks on top of the desk: the one that is shown, and the next."""
    return [
        {"task": task.token, "prompt": task.prompt, "left": task.left, "right": task.right}
        for task in project.queue.lease(who.annotator, 2)
    ]


@router.post("/api/votes", status_code=204)
def vote(posted: PostedVote, who: Here, project: OwnProject) -> None:
    """Keep a vote; the same key twice is one vote."""
    said = Vote(posted.choice, posted.key, posted.seconds, posted.note, posted.reason)
    try:
        project.queue.vote(who.annotator, posted.task, said)
    except StaleTaskError as error:
        raise HTTPException(409, str(error)) from error

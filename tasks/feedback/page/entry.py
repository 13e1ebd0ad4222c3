"""Coming in by an invitation link, and signing out.

Opening a link changes nothing, for mail programs and chats open links to preview them: it shows a
page with a button, and the button uses the link.
"""

from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

from tasks.feedback.page.access import (
    LONGEST,
    Here,
    let_in,
    session_of,
    store_of,
    visitor,
)
from tasks.feedback.page.pages import page
from tasks.feedback.store.people import InvitationError
from tasks.feedback.store.store import Store

router = APIRouter()
TheStore = Annotated[Store, Depends(store_of)]
LONGEST_TOKEN = 200  # characters


@router.get("/enter/{token}")
def invitation(token: str, request: Request, store: TheStore) -> Response:
    """The page behind a link: with a button, or why the link does not work."""
    try:
        found = store.door.look(token[:LONGEST_TOKEN])
    except InvitationError as error:
        who = visitor(request)
        if who is not None and store.door.is_own(token[:LONGEST_TOKEN], who.annotator):
            return RedirectResponse(_start(who.role), 303)  # the same browser comes back
        raise HTTPException(410, str(error)) from error
    return page(
        "enter.html",
        token=token,
        project=found.project,
        role=found.role,
        expires=found.expires,
        before=visitor(request),
    )


@router.post("/enter/{token}")
def enter(token: str, request: Request, store: TheStore) -> Response:
    """Use a link: a new session begins, and one that the browser had before ends."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise HTTPException(415, "Use the button of the page.")  # a foreign form cannot send JSON
    try:
        found = store.door.look(token[:LONGEST_TOKEN])
        hours = LONGEST[found.role].total_seconds() / 3600
        session = store.door.enter(token[:LONGEST_TOKEN], hours=hours)
    except InvitationError as error:
        raise HTTPException(410, str(error)) from error
    if before := session_of(request):
        store.door.leave(before)
    answer = JSONResponse({"to": _start(found.role)})
    let_in(answer, request.app.state.address, session)
    return answer


@router.post("/leave")
def leave(_: Here, request: Request, store: TheStore) -> Response:
    """Sign out: the session ends on the server too."""
    store.door.leave(session_of(request))
    answer = JSONResponse({"to": "/left"})
    address = request.app.state.address
    answer.delete_cookie(
        address.cookie, path="/", secure=address.is_https, httponly=True, samesite="lax"
    )
    return answer


@router.get("/left")
def left() -> Response:
    """The page after signing out."""
    text = "You are signed out, and what you have done is kept. Ask for a new link to come back."
    return page("problem.html", title="Thank you", text=text)


def _start(role: str) -> str:
    return "/admin" if role == "admin" else "/"

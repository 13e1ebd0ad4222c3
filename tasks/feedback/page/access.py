"""Who asks: the session of a request, its proof that it comes from our page, and consent."""

import secrets
from datetime import timedelta
from typing import Annotated

from fastapi import Depends, HTTPException, Request, Response

from tasks.feedback.page.problems import ConsentMissingError
from tasks.feedback.page.shield import Address
from tasks.feedback.store.people import SignedIn
from tasks.feedback.store.store import FeedbackProject, Store

CSRF = "X-CSRF-Token"  # header of each request that changes something
# How long a session lasts at most, and unused: an admin's link is quickly made anew, while a new
# link for an annotator costs two people a message each.
LONGEST = {"annotator": timedelta(days=14), "admin": timedelta(days=7)}
IDLE = {"annotator": timedelta(days=4), "admin": timedelta(hours=12)}


def store_of(request: Request) -> Store:
    """The store of this server."""
    found: Store = request.app.state.store
    return found


def session_of(request: Request) -> str:
    """The token of the session that a request brings; empty if it brings none."""
    address: Address = request.app.state.address
    return request.cookies.get(address.cookie, "")


def visitor(request: Request) -> SignedIn | None:
    """Who sends a request, if anybody is signed in."""
    token = session_of(request)
    return store_of(request).door.who(token, idle=IDLE) if token else None


def signed_in(request: Request) -> SignedIn:
    """Who sends the request.

    Raises: HTTPException 401 without a session, 403 for a change without proof.
    """
    who = visitor(request)
    if who is None:
        raise HTTPException(
            401, "Open your invitation link to sign in; if it was used before, ask for a new one."
        )
    proof = request.headers.get(CSRF, "").encode()
    changes = request.method not in ("GET", "HEAD")
    if changes and not secrets.compare_digest(proof, who.csrf.encode()):
        raise HTTPException(403, "This request did not come from the page; reload it.")
    return who


Here = Annotated[SignedIn, Depends(signed_in)]


def admin(who: Here) -> SignedIn:
    """Who sends the request, an admin.

    Raises: HTTPException 403 for anybody else.
    """
    if who.role != "admin" or who.state != "active":
        raise HTTPException(403, "Only an admin of the project may see this.")
    return who


Admin = Annotated[SignedIn, Depends(admin)]


def project_of(who: Here, store: Annotated[Store, Depends(store_of)]) -> FeedbackProject:
    """The project of whoever asks."""
    return store.by_id(who.project)


OwnProject = Annotated[FeedbackProject, Depends(project_of)]


def may_label(who: Here, project: OwnProject) -> None:
    """Let through who has agreed to the present text, and is not paused.

    Raises: ConsentMissingError; HTTPException 403 for whoever is paused.
    """
    if who.state != "active":
        raise HTTPException(
            403, "An admin has paused your work here. What you have done so far is kept."
        )
    if not project.people.has_agreed(who.annotator, project.rules.consent_version):
        raise ConsentMissingError


def let_in(answer: Response, address: Address, session: str) -> None:
    """Give a browser its session."""
    longest = max(LONGEST.values())
    answer.set_cookie(
        address.cookie,
        session,
        max_age=int(longest.total_seconds()),
        path="/",
        secure=address.is_https,
        httponly=True,
        samesite="lax",
    )

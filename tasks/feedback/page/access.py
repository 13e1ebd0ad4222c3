"""Who asks: the session of a request, and its proof that it comes from our page."""

import secrets
from typing import Annotated

from fastapi import Depends, HTTPException, Request

from tasks.feedback.store.people import SignedIn
from tasks.feedback.store.store import FeedbackProject, Store

COOKIE = "rlhf_label"
CSRF = "X-CSRF-Token"  # header of each request that changes something


def store_of(request: Request) -> Store:
    """The store of this server."""
    found: Store = request.app.state.store
    return found


def signed_in(request: Request, store: Annotated[Store, Depends(store_of)]) -> SignedIn:
    """Who sends the request.

    Raises: HTTPException 401 without a session, 403 for a change without proof.
    """
    who = store.door.who(request.cookies.get(COOKIE, ""))
    if who is None:
        raise HTTPException(401, "Open your invitation link to sign in.")
    proof = request.headers.get(CSRF, "")
    if request.method not in ("GET", "HEAD") and not secrets.compare_digest(proof, who.csrf):
        raise HTTPException(403, "This request did not come from the page; reload it.")
    return who


Here = Annotated[SignedIn, Depends(signed_in)]


def admin(who: Here) -> SignedIn:
    """Who sends the request, an admin.

    Raises: HTTPException 403 for anybody else.
    """
    if who.role != "admin":
        raise HTTPException(403, "Only an admin of the project may see this.")
    return who


Admin = Annotated[SignedIn, Depends(admin)]


def project_of(who: Here, store: Annotated[Store, Depends(store_of)]) -> FeedbackProject:
    """The project of whoever asks."""
    return store.by_id(who.project)


OwnProject = Annotated[FeedbackProject, Depends(project_of)]

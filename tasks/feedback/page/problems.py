"""What went wrong, in words: a page for people, JSON for the scripts of our pages."""

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError, TimeoutError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import Scope

from rlhf_core.errors import UserError
from rlhf_core.redaction import masked
from tasks.feedback.page.pages import page

logger = logging.getLogger(__name__)
TITLES = {
    400: "That request is not understood",
    401: "Please sign in",
    403: "This is not for you",
    404: "There is no such page",
    405: "That cannot be done here",
    409: "That has changed meanwhile",
    410: "This link does not work any more",
    413: "That is too large",
    422: "That is not right yet",
    429: "A little slower, please",
    500: "Something went wrong here",
    503: "Not available for a moment",
}
WORDS = {
    404: "Check the address, or go back to the start.",
    405: "This address does not take this kind of request.",
}
CONSENT = "/consent"


class ConsentMissingError(Exception):
    """Somebody wants to label and has not agreed to the text yet, or only to an older version."""


def problem(
    scope: Scope,
    status: int,
    text: str,
    headers: Mapping[str, str] | None = None,
    **more: str,
) -> Response:
    """An error as a page, or as JSON `{"detail": text}` where a script or a program asks."""
    text = masked(text)
    if _wants_json(scope):
        return JSONResponse({"detail": text, **more}, status, headers)
    title = TITLES.get(status, "That did not work")
    answer = page("problem.html", status=status, title=title, text=text)
    answer.headers.update(headers or {})
    return answer


def _wants_json(scope: Scope) -> bool:
    asked = HTTPConnection(scope)
    path: str = scope["path"]
    accepted = asked.headers.get("accept", "")
    is_json = asked.headers.get("content-type", "").startswith("application/json")
    return path.startswith("/api/") or is_json or accepted.startswith("application/json")


def install(app: FastAPI) -> None:
    """Let an application say in words what went wrong."""

    @app.exception_handler(HTTPException)
    def known(request: Request, error: HTTPException) -> Response:
        text = WORDS.get(error.status_code, "") if _is_default(error) else str(error.detail)
        return problem(request.scope, error.status_code, text, error.headers)

    @app.exception_handler(ConsentMissingError)
    def not_agreed(request: Request, error: ConsentMissingError) -> Response:
        if _wants_json(request.scope):
            text = "Read what you agree to first, and agree to it."
            return problem(request.scope, 403, text, reason="consent", page=CONSENT)
        return RedirectResponse(CONSENT, 303)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
        text = f"{place}: {first['msg']}." if place and first["type"] != "json_invalid" else ""
        return problem(request.scope, 422, text or "The request is not valid JSON.")

    @app.exception_handler(UserError)
    def refused(request: Request, error: UserError) -> Response:
        return problem(request.scope, 422, str(error))

    @app.exception_handler(InterfaceError)
    @app.exception_handler(OperationalError)
    @app.exception_handler(TimeoutError)
    def no_database(request: Request, error: SQLAlchemyError) -> Response:
        logger.error("the database fails: %s", masked(str(error).partition("\n")[0]))
        text = "The database does not respond. Nothing that was saved is lost; try again soon."
        return problem(request.scope, 503, text, {"Retry-After": "2"})

    @app.exception_handler(Exception)
    def defect(request: Request, error: Exception) -> Response:
        text = "The reason is in the log of this server. Try again, or tell who invited you."
        return problem(request.scope, 500, text)


def _is_default(error: HTTPException) -> bool:
    return error.status_code in WORDS and error.detail in ("Not Found", "Method Not Allowed")

"""Access control in front of the Prefect and MLflow servers, and signing in.

A browser lets any web page send requests to the loopback address, and a host name that resolves to
it (DNS rebinding) can even read the responses. So a request must have one of this server's names in
`Host`, and a request from a page must come from this server's own pages (`Origin`). Other users of
the machine can reach the port too, so there is a password.
"""

import secrets
from base64 import b64decode
from collections.abc import Callable, Collection, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from rlhf_core.errors import printable
from tasks.servers import sign_in
from tasks.servers.error_log import PATH as ERRORS
from tasks.servers.error_log import ErrorLog

LOOPBACK = ("127.0.0.1", "localhost")
HEALTH = "/health"  # it reports only that there is a server
UNKNOWN_LINK = "This sign-in link was used before or has expired: `rlhf sign-in` prints a new one."
SIGNED_OUT = "Sign in first: `rlhf sign-in` prints a link."
Welcome = Callable[[Request], Response]


def behind_gate(
    app: ASGIApp,
    *,
    names: Iterable[str],
    origins: Iterable[str],
    account: str,
    welcome: Welcome,
    cookie: str = "",
) -> ASGIApp:
    """Put an app behind the checks, and add two pages: `/sign-in` and `/errors`.

    Args:
        names: host names of this server, without a port.
        origins: addresses whose pages may send requests: those of this server.
        account: `user:password`, which signs the links.
        welcome: makes the response to a valid sign-in link.
        cookie: name of a session cookie, for an app that does not check the password itself. Its
            requests then need the password (Basic) or this cookie, which a sign-in link sets. From
            another site, browsers send the cookie only when a link is followed (`SameSite=Lax`).
    """
    errors = ErrorLog.of_this_process()
    known = frozenset(urlsplit(origin)._replace(path="").geturl() for origin in origins)
    inner: ASGIApp = _SignIn(app, account, welcome, errors, closed=bool(cookie))
    if cookie:
        inner = SessionMiddleware(inner, secret_key=account, session_cookie=cookie)
    return _OwnPages(inner, frozenset(names), known)


def own_names(page: str, *more: str) -> set[str]:
    """The names of a server: the loopback names, the host of its public page, and others."""
    return {*LOOPBACK, urlsplit(page).hostname or LOOPBACK[0], *more}


def own_origins(page: str, port: int) -> set[str]:
    """The origins of a server's pages: its public address and its loopback addresses."""
    return {page, *(f"http://{name}:{port}" for name in LOOPBACK)}


class _OwnPages:
    """Refuses requests with a foreign host name or from foreign pages, and framing by them.

    Its own pages may connect only to this server, so the browser blocks scripts that phone home.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], origins: Collection[str]) -> None:
        self._app = app
        self._names = names
        self._origins = origins
        sockets = (f"ws{origin.removeprefix('http')}" for origin in origins)
        allowed = " ".join(sorted({*origins, *sockets}))
        self._policy = f"frame-ancestors 'self'; connect-src 'self' data: blob: {allowed}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.append("Content-Security-Policy", self._policy)
                headers.setdefault("Referrer-Policy", "same-origin")
            await send(message)

        why = ""
        if scope["type"] in ("http", "websocket"):
            why = refusal(Headers(scope=scope), self._names, self._origins)
        if why:
            await _answer(PlainTextResponse(f"Refused: {why}.", 403), scope, receive, send)
        else:
            await self._app(scope, receive, with_policy)


def refusal(headers: Headers, names: Collection[str], origins: Collection[str]) -> str:
    """Why a request is refused; empty if it is allowed. Programs send no origin.

    Args:
        names: host names of this server, without a port.
        origins: addresses whose pages may send requests.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    if _name(host) not in names:
        return f"this server is not called {printable(host)}"
    if origin is not None and origin not in origins:
        return f"it was sent by a page of {printable(origin)}"
    return ""


def _name(host: str) -> str:
    """A host without its port; empty if it is invalid."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class _SignIn:
    """Serves `/sign-in` and `/errors`, and the app, which may be `closed` without signing in."""

    def __init__(
        self, app: ASGIApp, account: str, welcome: Welcome, errors: ErrorLog, *, closed: bool
    ) -> None:
        self._app = app
        self._account = account
        self._welcome = welcome
        self._errors = errors
        self._closed = closed
        self._links = sign_in.Links(account)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and path == sign_in.PATH:
            await _answer(self._sign_in(Request(scope)), scope, receive, send)
        elif scope["type"] == "http" and path == ERRORS:
            known = self._is_known(scope)
            answer = JSONResponse(self._errors.recent()) if known else _challenge()
            await _answer(answer, scope, receive, send)
        elif scope["type"] == "lifespan":
            self._errors.attach()
            await self._app(scope, receive, send)
        elif not self._closed or path == HEALTH or self._is_known(scope):
            await self._app(scope, receive, send)
        else:
            await _answer(_challenge(), scope, receive, send)

    def _sign_in(self, request: Request) -> Response:
        token = request.query_params.get("token", "")
        good = request.method == "GET" and self._links.accept(token)
        response = self._welcome(request) if good else PlainTextResponse(UNKNOWN_LINK, 403)
        response.headers["Cache-Control"] = "no-store"
        return response

    def _is_known(self, scope: Scope) -> bool:
        if scope.get("session", {}).get(sign_in.SIGNED_IN):
            return True
        scheme, _, credentials = Headers(scope=scope).get("authorization", "").partition(" ")
        try:
            sent = b64decode(credentials, validate=True)
        except ValueError:
            return False
        return scheme.lower() == "basic" and secrets.compare_digest(sent, self._account.encode())


def _challenge() -> Response:
    """A 401 response, for which a browser shows a password form."""
    return PlainTextResponse(SIGNED_OUT, 401, headers={"WWW-Authenticate": 'Basic realm="rlhf"'})


async def _answer(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await WebSocketClose(code=1008)(scope, receive, send)
    else:
        await response(scope, receive, send)

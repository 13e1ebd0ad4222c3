"""What stands before every page: own names and pages only, small bodies, a rate, strict headers."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from urllib.parse import urlsplit

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tasks.feedback.page.problems import problem
from tasks.feedback.store.people import token_digest
from tasks.servers.gate import own_names, own_origins, refusal

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "font-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",  # an invitation is in the address
        "X-Frame-Options": "DENY",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    }
)
STATIC = "/static/"
LARGEST = 1 << 20  # bytes of a body: guidelines of 100,000 characters and more


@dataclass(frozen=True)
class Address:
    """What the server is called: its public address, its port, and other host names of it."""

    public: str = "http://127.0.0.1:4300"
    port: int = 4300
    names: tuple[str, ...] = ()

    @property
    def is_https(self) -> bool:
        """Whether browsers reach it over TLS."""
        return urlsplit(self.public).scheme == "https"

    @property
    def cookie(self) -> str:
        """The name of the session cookie. Cookies ignore ports, so the name has it.

        With `__Host-`, a browser takes it only over https, from this very host.
        """
        return "__Host-rlhf_label" if self.is_https else f"rlhf_label_{self.port}"


@dataclass(frozen=True)
class Rates:
    """Requests a minute. Nobody who reads what they judge comes near them."""

    session: int = 3_000  # of one browser
    address: int = 30_000  # of all browsers of a network, which may share an address
    entering: int = 30  # uses of invitation links from one address


class Shield:
    """Refuses what no page of ours sends, before the application sees it."""

    def __init__(self, app: ASGIApp, address: Address, rates: Rates) -> None:
        self._app = app
        self._cookie = address.cookie
        self._names = own_names(address.public, *address.names)
        self._origins = own_origins(_origin(address.public), address.port)
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._rates = {
            "session": RateLimitItemPerMinute(rates.session),
            "address": RateLimitItemPerMinute(rates.address),
            "entering": RateLimitItemPerMinute(rates.entering),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request here, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                cached = path.startswith(STATIC) and message["status"] in (200, 304)
                headers["Cache-Control"] = "no-cache" if cached else "no-store"
            await send(message)

        headers = Headers(scope=scope)
        if why := refusal(headers, self._names, self._origins):
            refused = problem(scope, 403, f"Refused: {why}.")
            await refused(scope, receive, guarded)
        elif not headers.get("content-length", "0").isdecimal():
            await problem(scope, 400, "The length of the request is no number.")(
                scope, receive, guarded
            )
        elif int(headers.get("content-length", "0")) > LARGEST:
            await _too_large(scope, receive, guarded)
        elif seconds := self._wait(scope):
            text = f"That was a lot in a short time. Wait {seconds} s, and try again."
            busy = problem(scope, 429, text, {"Retry-After": str(seconds)})
            await busy(scope, receive, guarded)
        else:
            await self._within(scope, receive, guarded)

    async def _within(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; one whose body grows beyond the limit is answered here."""
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            return {"type": "http.disconnect"} if read > LARGEST else message

        async def unless_too_large(message: Message) -> None:
            if read <= LARGEST:
                await send(message)

        try:
            await self._app(scope, limited, unless_too_large)
        finally:
            if read > LARGEST:
                await _too_large(scope, receive, send)

    def _wait(self, scope: Scope) -> int:
        """Seconds to wait before the next request; 0 = it may come now."""
        path: str = scope["path"]
        if path.startswith(STATIC) or path == "/health":
            return 0
        host = (scope.get("client") or ("", 0))[0]
        asked = [(self._rates["address"], "address", host)]
        if path.startswith("/enter") and scope["method"] == "POST":
            asked.append((self._rates["entering"], "entering", host))
        if session := HTTPConnection(scope).cookies.get(self._cookie):
            asked.append((self._rates["session"], "session", token_digest(session)))
        return max(self._hit(item, kind, who) for item, kind, who in asked)

    def _hit(self, item: RateLimitItem, kind: str, who: str) -> int:
        if self._limiter.hit(item, kind, who):
            return 0
        reset = self._limiter.get_window_stats(item, kind, who).reset_time
        return max(1, ceil(reset - time.time()))


async def _too_large(scope: Scope, receive: Receive, send: Send) -> None:
    text = f"This is larger than {LARGEST >> 20} MiB, the most that a request may have."
    await problem(scope, 413, text, {"Connection": "close"})(scope, receive, send)


def _origin(public: str) -> str:
    return urlsplit(public)._replace(path="", query="", fragment="").geturl()

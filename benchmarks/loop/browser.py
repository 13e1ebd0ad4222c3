"""A browser on the page for annotators: comes in by a link, agrees, takes tasks, votes, takes back.

It knows the page by what the server sends, as a browser does: the session is a cookie, the proof of
a request is in the page, and texts are HTML. Nothing of the preference store is imported here.
"""

import re
import threading
import time
import uuid
from html import unescape
from html.parser import HTMLParser
from typing import Any, NamedTuple

import httpx

PATIENCE = 60.0  # seconds that a server may be away or busy
PAUSE = 0.2
BUSY = (429, 502, 503, 504)
_CSRF = re.compile(r'<meta name="csrf" content="([^"]*)"')
_VERSION = re.compile(r'<input type="hidden" name="version" value="([^"]*)"')


class PageError(Exception):
    """The page does not do what was asked; the message is what it says."""

    def __init__(self, status: int, says: str) -> None:
        super().__init__(f"{says} (status {status})")
        self.status = status


class StoppedError(Exception):
    """The person was asked to stop while waiting for the server."""


class Shown(NamedTuple):
    """A pair as somebody reads it."""

    task: str
    prompt: str
    left: str
    right: str


class Browser:
    """The browser of one person. It is used by one thread."""

    def __init__(self, stop: threading.Event | None = None) -> None:
        """Args: stop: ends the waiting for a server that is away."""
        self._http = httpx.Client(timeout=30, trust_env=False)
        self._stop = stop or threading.Event()
        self._at = ""
        self._csrf = ""

    def close(self) -> None:
        """Close it; the session stays on the server."""
        self._http.close()

    def come_in(self, link: str) -> str:
        """Open an invitation, press its button, and agree to the text if there is one to agree to.

        Returns: the page that the link leads to.

        Raises: PageError for a link that does not work.
        """
        self._at = str(httpx.URL(link).copy_with(path="", query=None)).rstrip("/")
        self._ask("GET", link)
        to = self._ask("POST", link, json={}).json()["to"]
        page = self._ask("GET", to)
        if page.is_redirect:  # to what has to be agreed to
            self.agree()
            page = self._ask("GET", to)
        self._csrf = _found(_CSRF, page.text, "proof")
        return str(to)

    def agree(self) -> str:
        """Read the text of the project, and agree to it. Returns: its version."""
        page = self._ask("GET", "/consent").text
        self._csrf = _found(_CSRF, page, "proof")
        version = _found(_VERSION, page, "version to agree to")
        self._ask("POST", "/consent", json={"version": version, "agreed": True})
        return version

    def tasks(self) -> list[Shown]:
        """The pairs on the desk, the one to be judged first."""
        said = self._ask("GET", "/api/tasks").json()
        return [
            Shown(found["task"], *(as_text(found[part]["plain"]) for part in Shown._fields[1:]))
            for found in said["tasks"]
        ]

    def vote(
        self, task: str, choice: str, *, seconds: float, note: str = "", reason: str = ""
    ) -> bool:
        """Send a vote until it is answered; its key makes it one vote. False: it came too late."""
        said = {"task": task, "choice": choice, "key": uuid.uuid4().hex, "seconds": seconds}
        try:
            self._ask("POST", "/api/votes", json={**said, "note": note, "reason": reason})
        except PageError as error:
            if error.status != httpx.codes.CONFLICT:
                raise
            return False
        return True

    def undo(self) -> bool:
        """Take the last vote or skip back. False: there is nothing to take back any more."""
        try:
            answer = self._ask("POST", "/api/undo", json={"key": uuid.uuid4().hex})
        except PageError as error:
            if error.status != httpx.codes.CONFLICT:
                raise
            return False
        return bool(answer.json()["undone"])

    def invite(self, name: str, role: str = "annotator") -> str:
        """As an admin on the page People: a link for somebody new."""
        answer = self._ask("POST", "/admin/invite", json={"name": name, "role": role})
        return str(answer.json()["link"])

    def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """An answer that is no error; a server that is away or busy is asked again."""
        address = path if path.startswith("http") else self._at + path
        deadline = time.monotonic() + PATIENCE
        headers = {"Accept": "application/json" if path.startswith("/api") else "text/html"}
        if method != "GET":
            headers |= {"X-CSRF-Token": self._csrf, "Origin": self._at}
        while True:
            pause = PAUSE
            try:
                answer = self._http.request(method, address, headers=headers, **more)
            except httpx.TransportError as error:
                why, status = f"{type(error).__name__}: {error}", 0
            else:
                if answer.status_code not in BUSY:
                    if answer.is_success or answer.is_redirect:
                        return answer
                    raise PageError(answer.status_code, _says(answer))
                why, status = _says(answer), answer.status_code
                pause = max(pause, float(answer.headers.get("Retry-After", 0)))
            if time.monotonic() + pause > deadline:
                raise PageError(status, f"{address.partition('/enter/')[0]} does not answer: {why}")
            if self._stop.wait(pause):
                raise StoppedError


class _Text(HTMLParser):
    """The text of a piece of HTML, without the marks for white space that the page adds."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._marks = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Count how deep we are in a mark."""
        if self._marks or dict(attrs).get("class") == "white":
            self._marks += 1

    def handle_endtag(self, tag: str) -> None:
        """Come out of a mark."""
        self._marks = max(0, self._marks - 1)

    def handle_data(self, data: str) -> None:
        """Keep what somebody reads."""
        if not self._marks:
            self.parts.append(data)


def as_text(html: str) -> str:
    """What somebody reads in a text "as written" of the page."""
    reader = _Text()
    reader.feed(html)
    reader.close()
    return "".join(reader.parts)


def _found(pattern: re.Pattern[str], page: str, what: str) -> str:
    match = pattern.search(page)
    if match is None:
        raise PageError(httpx.codes.OK, f"the page has no {what}")
    return unescape(match[1])


def _says(answer: httpx.Response) -> str:
    """The sentence of an error, from JSON or from the page."""
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return " ".join(as_text(answer.text).split())[:300]

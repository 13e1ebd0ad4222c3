"""A small HTTP client for our servers.

python -m tasks.servers.client URL: the exit status is 0 if the response is a success.
"""

import sys
import time
from base64 import b64encode
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rlhf_core.redaction import masked

if TYPE_CHECKING:
    from ssl import SSLContext

SECONDS = 5.0
DRIP_FACTOR = 2  # the whole response may take this many times as long as a part of it
LARGEST = 16 << 20  # bytes of a response: ours are of kilobytes
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class NoAnswerError(OSError):
    """There was no response or it was not a success; the message has the reason."""

    def __init__(self, reason: str, status: int = 0, text: str = "") -> None:
        """Args: status: HTTP status, 0 without a response; text: body of the response."""
        super().__init__(reason)
        self.status = status
        self.text = text


def ask(
    url: str,
    question: object = None,
    *,
    account: str = "",
    seconds: float = SECONDS,
    verify: bool = True,
    **headers: str,
) -> bytes:
    """The response of `url` to a GET, or to a POST of `question` as JSON.

    Proxies of the environment are not used for a loopback address.

    Args:
        account: `user:password`.
        seconds: timeout for the connection and for each part of the response, which is read for
            twice as long.
        verify: whether the certificate of the server must be trusted.

    Raises: NoAnswerError.
    """
    import httpx  # not at the top: it takes 0.25 s, which would delay `rlhf --help`

    if account:
        headers["Authorization"] = f"Basic {b64encode(account.encode()).decode()}"
    try:
        trust_env = urlsplit(url).hostname not in LOOPBACK
        with httpx.Client(
            trust_env=trust_env,
            follow_redirects=True,
            timeout=seconds,
            verify=_certificates(trust_env) if verify else False,
        ) as client:
            method = "GET" if question is None else "POST"
            with client.stream(method, url, json=question, headers=headers) as answer:
                content = _read(answer.iter_bytes(), time.monotonic() + DRIP_FACTOR * seconds)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise NoAnswerError(str(error) or type(error).__name__) from error
    if not answer.is_success:
        status = answer.status_code
        text = content.decode("utf-8", errors="replace")
        raise NoAnswerError(f"it answers {status} {answer.reason_phrase}", status, text)
    return content


@cache
def _certificates(trust_env: bool) -> "SSLContext":
    """What certificates are checked with. To load it takes longer than a request to this machine,
    and who waits for a server asks often."""
    import httpx

    return httpx.create_ssl_context(trust_env=trust_env)


def _read(parts: Iterable[bytes], deadline: float) -> bytes:
    """A response that comes in parts, each of which may be in time and tiny."""
    content = bytearray()
    for part in parts:
        content += part
        if len(content) > LARGEST:
            raise NoAnswerError(f"its response has more than {LARGEST >> 20} MiB")
        if time.monotonic() > deadline:
            raise NoAnswerError("its response does not end")
    return bytes(content)


def unreachable(url: str, account: str = "") -> str:
    """Why `url` does not respond with success; empty if it does."""
    try:
        ask(url, account=account)
    except OSError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.exit(masked(unreachable(sys.argv[1])) or 0)

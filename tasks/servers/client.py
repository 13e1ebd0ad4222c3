"""Asks a server over HTTP: whether it answers, and what.

python -m tasks.servers.client URL: the exit status is 0 when it answers with success.
"""

import sys
from base64 import b64encode
from urllib.parse import urlsplit

SECONDS = 5.0
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class NoAnswerError(OSError):
    """There was no answer, or none of success; the message has the reason."""

    def __init__(self, reason: str, status: int = 0, text: str = "") -> None:
        """Args: status: that of the answer, 0 without one; text: what it says."""
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
    """What `url` answers to a GET, or to a POST of a question as JSON.

    The proxies of the environment are not asked for a loopback address.

    Args:
        account: `user:password`.
        seconds: to wait for a connection, and for each part of the answer.
        verify: whether the certificate of the server has to be a trusted one.

    Raises: NoAnswerError.
    """
    import httpx  # here, as it takes a quarter of a second, which `rlhf --help` need not wait

    if account:
        headers["Authorization"] = f"Basic {b64encode(account.encode()).decode()}"
    try:
        with httpx.Client(
            trust_env=urlsplit(url).hostname not in LOOPBACK,
            follow_redirects=True,
            timeout=seconds,
            verify=verify,
        ) as client:
            method = "GET" if question is None else "POST"
            answer = client.request(method, url, json=question, headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise NoAnswerError(str(error) or type(error).__name__) from error
    if not answer.is_success:
        status = answer.status_code
        raise NoAnswerError(f"it answers {status} {answer.reason_phrase}", status, answer.text)
    return answer.content


def unreachable(url: str, account: str = "") -> str:
    """Why `url` does not answer with success; empty when it does."""
    try:
        ask(url, account=account)
    except OSError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.exit(unreachable(sys.argv[1]) or 0)

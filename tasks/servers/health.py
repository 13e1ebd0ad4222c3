"""The health check of the servers of the stack: python -m tasks.servers.health URL

A server is healthy if it responds and has not logged the same error repeatedly: a service inside
it, such as Prefect's scheduler, may fail every minute while all pages work.
"""

import json
import sys
from urllib.parse import urlsplit

from rlhf_core.redaction import masked
from tasks.servers.client import ask
from tasks.servers.error_log import PATH
from tasks.settings import read_settings

SECONDS = 10.0
TOLERATED = 2  # equal errors within the time that a server remembers


def problem(url: str) -> str:
    """The problem of the server with the health page `url`; empty if there is none."""
    root = urlsplit(url)._replace(path=PATH).geturl()
    try:
        ask(url, seconds=SECONDS)
        answer = ask(root, account=read_settings().account, seconds=SECONDS)
    except OSError as error:
        return masked(f"{url}: {error}")
    errors: list[str] = json.loads(answer)
    repeated = [error for error in errors if errors.count(error) > TOLERATED]
    return f"it keeps logging the same error: {repeated[-1]}" if repeated else ""


if __name__ == "__main__":
    sys.exit(problem(sys.argv[1]) or 0)

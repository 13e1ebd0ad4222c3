"""The Prefect server behind the gate: python -m tasks.servers.prefect_app --port 4200

The app that `prefect server start` runs. Prefect checks the password itself, for its web sockets
too, and its page keeps it in the browser's local storage, which is where a sign-in link puts it.
"""

import argparse
import json
from base64 import b64encode

import uvicorn
from prefect.server.api.server import create_app
from prefect.settings import get_current_settings
from starlette.responses import HTMLResponse, Response

from tasks.servers.gate import LOOPBACK, behind_gate, own_names, own_origins
from tasks.settings import read_settings

PAGE = """<!doctype html><meta charset="utf-8"><title>Signing in</title><script>
localStorage.setItem("prefect-password", %s); location.replace("/");
</script>"""


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="The Prefect server of rlhf.")
    parser.add_argument("--host", default=LOOPBACK[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", action="append", default=[], help="another name of this server")
    given = parser.parse_args()
    account, page = read_settings().account, read_settings().prefect_public_url
    server = get_current_settings().server
    uvicorn.run(
        behind_gate(
            create_app(),
            names=own_names(page, *given.name),
            origins=own_origins(page, given.port),
            account=account,
            welcome=lambda _: sign_in(account),
        ),
        host=given.host,
        port=given.port,
        timeout_keep_alive=server.api.keepalive_timeout,
        ws_ping_interval=server.api.websocket_ping_interval,
        ws_ping_timeout=server.api.websocket_ping_timeout,
        log_level=server.logging_level.lower(),
    )


def sign_in(account: str) -> Response:
    """A page that hands the password to Prefect's page, in the browser that opens it."""
    return HTMLResponse(PAGE % json.dumps(b64encode(account.encode()).decode()))


if __name__ == "__main__":
    main()

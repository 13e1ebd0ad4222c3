"""The Prefect server behind the gate: python -m tasks.servers.prefect_app --port 4200

It serves the app of `prefect server start`. Prefect itself checks the password, also for its web
sockets. Its page keeps the password in the browser's local storage, where a sign-in link puts it.
"""

import argparse
import json
from base64 import b64encode

import uvicorn
from starlette.responses import HTMLResponse, Response

from rlhf_core.machine.imports import importing
from tasks.servers import fresh_database
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
    parser.add_argument(
        "--name", action="append", default=[], help="another host name of this server"
    )
    options = parser.parse_args()
    with importing():
        from prefect.server.api.server import create_app
        from prefect.settings import get_current_settings

    account, page = read_settings().account, read_settings().prefect_public_url
    server = get_current_settings().server
    if url := server.database.connection_url:
        fresh_database.create("prefect", url.get_secret_value())
    uvicorn.run(
        behind_gate(
            create_app(),
            names=own_names(page, *options.name),
            origins=own_origins(page, options.port),
            account=account,
            welcome=lambda _: sign_in(account),
        ),
        host=options.host,
        port=options.port,
        timeout_keep_alive=server.api.keepalive_timeout,
        ws_ping_interval=server.api.websocket_ping_interval,
        ws_ping_timeout=server.api.websocket_ping_timeout,
        log_level=server.logging_level.lower(),
    )


def sign_in(account: str) -> Response:
    """A page that stores the password for Prefect's page in the browser that opens it."""
    return HTMLResponse(PAGE % json.dumps(b64encode(account.encode()).decode()))


if __name__ == "__main__":
    main()

"""The web application for annotators: python -m tasks.feedback.page.app --port 4300"""

import argparse
import sys
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from fastapi import Depends, FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.types import ASGIApp

from rlhf_core.errors import UserError, brief
from rlhf_core.redaction import masked
from tasks.feedback.asking.watching import watching
from tasks.feedback.page import admin, agreement, annotate, consent, entry, problems
from tasks.feedback.page.access import may_label
from tasks.feedback.page.shield import Address, Rates, Shield
from tasks.feedback.store.store import Store
from tasks.servers.gate import LOOPBACK
from tasks.settings import read_settings

HERE = Path(__file__).parent
HOST = LOOPBACK[0]


class _Shielded(FastAPI):
    """An application behind its shield, which is outside of everything, errors included."""

    def build_middleware_stack(self) -> ASGIApp:
        """What a request passes through."""
        return Shield(super().build_middleware_stack(), self.state.address, self.state.rates)


def create_app(
    store: Store, *, address: Address | None = None, rates: Rates | None = None
) -> FastAPI:
    """The application on a store.

    Args:
        address: what the server is called; it answers to no other name.
        rates: how many requests a minute it takes.
    """
    app = _Shielded(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.store = store
    app.state.address = address or Address()
    app.state.rates = rates or Rates()
    app.state.examiner = agreement.Examiner()
    problems.install(app)
    app.include_router(entry.router)
    app.include_router(consent.router)
    app.include_router(admin.router)
    app.include_router(agreement.router)
    app.include_router(annotate.router, dependencies=[Depends(may_label)])
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")

    @app.get("/health")
    def health() -> dict[str, str]:
        store.names()  # a server without its database is not healthy
        return {"status": "ok"}

    return app


class Served(uvicorn.Server):
    """The server of an application. It logs no addresses, for links are secrets."""

    def __init__(self, app: FastAPI, *, host: str = HOST, port: int) -> None:
        address: Address = app.state.address
        behind_proxy = (urlsplit(address.public).hostname or HOST) not in LOOPBACK
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=behind_proxy,
                timeout_graceful_shutdown=5,
            )
        )


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="The page for annotators of rlhf.")
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument(
        "--name", action="append", default=[], help="another host name of this server"
    )
    options = parser.parse_args()
    try:
        settings = read_settings()
        store = Store.open(settings)
    except UserError as error:
        sys.exit(f"rlhf: {brief(masked(str(error)))}")
    address = Address(settings.label_public_url, options.port, tuple(options.name))
    with watching(store, settings):
        Served(create_app(store, address=address), host=options.host, port=options.port).run()


if __name__ == "__main__":
    main()

"""The web application for annotators: python -m tasks.feedback.page.app --port 4300"""

import argparse
from pathlib import Path
from typing import Annotated

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.responses import RedirectResponse
from fastapi.staticfiles import StaticFiles

from tasks.feedback.page import annotate
from tasks.feedback.page.access import COOKIE, store_of
from tasks.feedback.store.people import InvitationError
from tasks.feedback.store.store import Store
from tasks.settings import read_settings

HERE = Path(__file__).parent
HOST = "127.0.0.1"


def create_app(store: Store) -> FastAPI:
    """The application on a store."""
    app = FastAPI(title="rlhf label", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.store = store
    app.include_router(annotate.router)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/enter/{token}")
    def enter(token: str, store: Annotated[Store, Depends(store_of)]) -> Response:
        try:
            session = store.door.enter(token)
        except InvitationError as error:
            raise HTTPException(403, str(error)) from error
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, session, httponly=True, samesite="lax")
        return answer

    return app


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="The page for annotators of rlhf.")
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    app = create_app(Store.open(read_settings()))
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()

"""The MLflow server behind the gate: mlflow server --app-name rlhf

The name is an entry point of this package in MLflow's group `mlflow.app`. MLflow has its own
authentication (`basic-auth`) with users and a password form; here there is one password, and links
that sign in.
"""

from urllib.parse import urlsplit

from mlflow.server import app as flask_app
from mlflow.server.fastapi_app import create_fastapi_app
from mlflow.server.fastapi_security import get_allowed_hosts
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp

from tasks.servers import sign_in
from tasks.servers.gate import behind_gate, own_names, own_origins
from tasks.settings import read_settings

START = "/#/experiments?workflowType=machine_learning"  # else it opens on language-model traces


def create_app() -> ASGIApp:
    """The app that uvicorn serves."""
    settings = read_settings()
    page = settings.mlflow_public_url
    port = urlsplit(page).port or 80
    hosts = (urlsplit(f"//{host}").hostname for host in get_allowed_hosts() if "*" not in host)
    return behind_gate(
        create_fastapi_app(flask_app),
        names=own_names(page, *(host for host in hosts if host)),
        origins=own_origins(page, port),
        account=settings.account,
        welcome=welcome,
        # Cookies ignore ports: the servers of two homes would overwrite each other's.
        cookie=f"rlhf-mlflow-{port}",
    )


def welcome(request: Request) -> Response:
    """Sign the browser in and show the experiments."""
    request.session[sign_in.SIGNED_IN] = True
    return RedirectResponse(START, 303)

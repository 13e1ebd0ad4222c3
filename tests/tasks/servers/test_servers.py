"""The gate before the servers, its links, and the errors that it tells."""

import logging
import os
import subprocess
import sys
import threading
import time
from base64 import b64encode

import pytest
import uvicorn
from itsdangerous import URLSafeTimedSerializer
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from tasks.servers import sign_in
from tasks.servers.error_log import ErrorLog
from tasks.servers.gate import behind_gate, own_names, own_origins
from tasks.servers.prefect_app import sign_in as prefect_welcome

ACCOUNT = "rlhf:a-password-of-tests"
PAGE = "http://127.0.0.1:4200"
SOCKET = "ws://127.0.0.1:4200/ws"
BASIC = {"Authorization": f"Basic {b64encode(ACCOUNT.encode()).decode()}"}


async def hello(request):
    return PlainTextResponse("hello")


async def echo(websocket):
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.close()


def welcome(request):
    if "session" in request.scope:
        request.session[sign_in.SIGNED_IN] = True
    return PlainTextResponse("welcome")


def client(cookie: str = "", **headers: str) -> TestClient:
    routes = [Route(path, hello, methods=["GET", "POST"]) for path in ("/", "/health")]
    app = Starlette(routes=[*routes, WebSocketRoute("/ws", echo)])
    gated = behind_gate(
        app,
        names=own_names(PAGE, "prefect"),
        origins=own_origins(PAGE, 4200),
        account=ACCOUNT,
        welcome=welcome,
        cookie=cookie,
    )
    return TestClient(gated, base_url=PAGE, headers=headers)


# ---- names and pages ----


@pytest.mark.parametrize(
    "host", ["127.0.0.1:4200", "localhost", "LOCALHOST:9", "prefect:4200", "127.0.0.1"]
)
def test_own_names_are_answered(host):
    assert client().get("/", headers={"Host": host}).text == "hello"


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "10.evil.example", "127.0.0.1.evil.example:4200", "10.0.0.1", "[::1"),
        *("user@evil.example", "", "127.0.0.1@evil.example", "evil.example#127.0.0.1", "0.0.0.0"),
    ],
)
def test_other_names_are_not(host):
    answer = client().get("/", headers={"Host": host})
    assert (answer.status_code, "hello" in answer.text) == (403, False)


@pytest.mark.parametrize("origin", [PAGE, "http://localhost:4200"])
def test_own_pages_may_ask(origin):
    assert client().post("/", headers={"Origin": origin}).status_code == 200
    with client().websocket_connect(SOCKET, headers={"Origin": origin}) as socket:
        assert socket.receive_text() == "hello"


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "", "http://127.0.0.1:4201", "https://127.0.0.1:4200"],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_other_pages_may_not_whatever_they_send(origin, method):
    answer = client().request(method, "/", headers={"Origin": origin, **BASIC})
    assert answer.status_code == 403
    with pytest.raises(WebSocketDisconnect):
        client().websocket_connect(SOCKET, headers={"Origin": origin}).__enter__()


def test_no_page_may_frame_it_and_its_own_pages_may_ask_nobody_else():
    assert client().get("/").headers["Content-Security-Policy"] == (
        "frame-ancestors 'self'; connect-src 'self' data: blob: http://127.0.0.1:4200 "
        "http://localhost:4200 "
        "ws://127.0.0.1:4200 ws://localhost:4200"
    )


# ---- the password and the cookie ----


def test_an_app_that_does_not_ask_itself_is_closed_to_strangers():
    closed = client("the-cookie")
    for path in ("/", "/errors", "/no-such-page"):
        assert closed.get(path).status_code == 401, path
        for bad in ("Basic !!", "Basic", "Bearer x", f"Basic {b64encode(b'rlhf:no').decode()}"):
            assert closed.get(path, headers={"Authorization": bad}).status_code == 401
    with pytest.raises(WebSocketDisconnect):
        closed.websocket_connect(SOCKET).__enter__()
    with closed.websocket_connect(SOCKET, headers=BASIC) as socket:
        assert socket.receive_text() == "hello"
    assert closed.get("/health").text == "hello"
    assert closed.get("/", headers=BASIC).text == "hello"


def test_a_link_signs_a_browser_in_once():
    closed = client("the-cookie")
    link = sign_in.link(PAGE, ACCOUNT)
    assert closed.post(link).status_code == 403  # a link is followed
    assert closed.get(link).text == "welcome"
    assert closed.get("/").text == "hello"
    closed.cookies.clear()
    assert closed.get("/").status_code == 401
    assert closed.get(link).status_code == 403


def test_a_cookie_that_was_changed_is_nothing():
    closed = client("the-cookie")
    closed.get(sign_in.link(PAGE, ACCOUNT))
    value = closed.cookies["the-cookie"]
    closed.cookies.clear()
    closed.cookies.set("the-cookie", value[:-2] + ("aa" if value[-2:] != "aa" else "bb"))
    assert closed.get("/").status_code == 401


def test_links_of_other_passwords_old_links_and_nonsense_are_refused(monkeypatch):
    links = sign_in.Links(ACCOUNT)
    token = sign_in.link(PAGE, ACCOUNT).partition("token=")[2]
    other = sign_in.link(PAGE, "rlhf:another-one").partition("token=")[2]
    salted = URLSafeTimedSerializer(ACCOUNT, salt="something else").dumps("1234")
    for bad in (other, salted, "", "x", token[:-1], token + "x", "é"):
        assert not links.accept(bad), bad
    monkeypatch.setattr(sign_in, "LINK_SECONDS", -1)
    assert not links.accept(token)
    monkeypatch.undo()
    assert links.accept(token)
    assert not links.accept(token)


def test_the_page_of_prefect_gets_the_password_as_text_only():
    account = 'rlhf:</script><script>alert("x")</script>'
    body = bytes(prefect_welcome(account).body).decode()
    assert body.count("<script>") == body.count("</script>") == 1
    assert b64encode(account.encode()).decode() in body


# ---- errors ----


def test_errors_are_kept_once_each_with_their_cause():
    log = ErrorLog.of_this_process()
    logger = logging.getLogger("prefect.server.of-tests")
    logger.propagate = True
    logger.warning("not this")
    logger.error("first line\nsecond line")
    try:
        raise ValueError("broken\nin lines")
    except ValueError:
        logger.exception("a service failed")
    found = [line for line in log.recent() if line.startswith("prefect.server.of-tests")]
    assert found == [
        "prefect.server.of-tests: first line",
        "prefect.server.of-tests: a service failed (ValueError: broken)",
    ]
    assert log.recent(seconds=-1) == []
    answer = client().get("/errors", headers=BASIC)
    assert found[0] in answer.json()
    assert client().get("/errors").status_code == 401


@pytest.fixture
def served():
    """The gate on a real port: its address, and the errors that it tells."""
    errors = ErrorLog.of_this_process()
    server = uvicorn.Server(uvicorn.Config(client().app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", errors
    server.should_exit = True
    thread.join()


def health(url: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "tasks.servers.health", url],
        env={**os.environ, "RLHF_PASSWORD": ACCOUNT.partition(":")[2]},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


def test_a_server_that_fails_again_and_again_is_not_healthy(served):
    address, errors = served
    assert health(f"{address}/health") == (0, "")
    logger = logging.getLogger("docket.of-tests")
    for _ in range(2):
        logger.error("Can't evaluate bulk DML statement")
    assert health(f"{address}/health") == (0, "")
    logger.error("Can't evaluate bulk DML statement")
    said = "it keeps logging the same error: docket.of-tests: Can't evaluate bulk DML statement\n"
    assert health(f"{address}/health") == (1, said)
    errors._lines.clear()
    logging.getLogger("uvicorn.error").error("Exception in ASGI application")  # once, not twice
    assert errors.recent() == ["uvicorn.error: Exception in ASGI application"]
    code, said = health(f"{address}/no-such-page")
    assert (code, "404" in said) == (1, True)
    code, said = health("http://127.0.0.1:9/health")
    assert (code, "refused" in said) == (1, True)

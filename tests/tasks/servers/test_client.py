"""The one HTTP client, against a plain server of the standard library."""

import json
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tasks.servers.client import NoAnswerError, ask, unreachable

VARIABLES = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")


class Echo(BaseHTTPRequestHandler):
    """Says what it was asked; /moved leads to /there, /secret is refused."""

    def do_GET(self):
        length = int(self.headers.get("Content-Length", 0))
        said = {
            "method": self.command,
            "path": self.path,
            "headers": dict(self.headers),
            "body": self.rfile.read(length).decode(),
        }
        status = {"/moved": 302, "/secret": 403}.get(self.path, 200)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/there")
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())

    def do_POST(self):
        self.do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def echo():
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def closed():
    with socket.socket() as probe:  # bound and not listening, so nobody else gets the port
        probe.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_question_makes_it_a_post_of_json(echo):
    got = json.loads(ask(f"http://{echo}/a"))
    assert (got["method"], got["path"], got["body"]) == ("GET", "/a", "")
    got = json.loads(ask(f"http://{echo}/a", {}, **{"X-Token": "t"}))
    assert (got["method"], json.loads(got["body"])) == ("POST", {})
    assert got["headers"]["Content-Type"] == "application/json"
    assert got["headers"]["X-Token"] == "t"


def test_the_account_is_sent_as_basic_authentication(echo):
    sent = json.loads(ask(f"http://{echo}/", account="rlhf:pä:ss"))["headers"]["Authorization"]
    assert sent == "Basic " + b64encode("rlhf:pä:ss".encode()).decode()
    assert "Authorization" not in json.loads(ask(f"http://{echo}/"))["headers"]


def test_a_redirection_is_followed(echo):
    assert json.loads(ask(f"http://{echo}/moved"))["path"] == "/there"


def test_no_proxy_is_asked_for_a_loopback_address(echo, closed, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://{closed}")
    port = echo.partition(":")[2]
    assert unreachable(f"http://127.0.0.1:{port}/") == ""
    assert unreachable(f"http://localhost:{port}/") == ""


def test_the_proxy_of_the_environment_is_asked_for_any_other(echo, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://{echo}")
    got = json.loads(ask("http://mlflow.invalid/health"))
    assert got["headers"]["Host"] == "mlflow.invalid"


def test_a_refusal_has_its_status_and_text(echo):
    with pytest.raises(NoAnswerError, match=r"^it answers 403 Forbidden$") as refused:
        ask(f"http://{echo}/secret")
    assert refused.value.status == 403
    assert json.loads(refused.value.text)["path"] == "/secret"


def test_a_closed_port_and_an_address_that_is_none(closed):
    assert "refused" in unreachable(f"http://{closed}/")
    with pytest.raises(NoAnswerError) as failed:
        ask(f"http://{closed}/")
    assert failed.value.status == 0
    for address in ("no address", "http://", "http://[", "http://a:port/", "ftp://127.0.0.1/"):
        assert unreachable(address) != ""


def test_a_server_that_says_nothing_is_waited_for_as_long_as_was_said():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(NoAnswerError, match="timed out"):
            ask(f"http://127.0.0.1:{silent.getsockname()[1]}/", seconds=0.3)
        assert 0.2 < time.monotonic() - start < 4


def test_as_a_program(echo, closed):
    def status(url):
        program = [sys.executable, "-P", "-m", "tasks.servers.client", url]
        return subprocess.run(program, capture_output=True).returncode

    assert status(f"http://{echo}/") == 0
    assert status(f"http://{echo}/secret") == 1
    assert status(f"http://{closed}/") == 1


def answering(code: str):
    """A server in a process of its own, which answers one connection by some code on `c`."""
    server = socket.create_server(("127.0.0.1", 0))
    program = f"import socket, time; s = socket.socket(fileno=0); c, _ = s.accept(); {code}"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=server.fileno())
    return server, process, f"http://127.0.0.1:{server.getsockname()[1]}/"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("[(c.sendall(b'x'), time.sleep(0.05)) for _ in range(10_000)]", "does not end"),
        ("[c.sendall(b'x' * 2**20) for _ in range(100)]", "more than 16 MiB"),
    ],
)
def test_a_response_that_never_ends_is_given_up(body, reason):
    head = "c.sendall(b'HTTP/1.1 200 OK' + b'\\r\\n' * 2)"
    server, process, address = answering(f"{head}; {body}")
    try:
        start = time.monotonic()
        with pytest.raises(NoAnswerError, match=reason):
            ask(address, seconds=1.0)
        assert time.monotonic() - start < 8
    finally:
        process.kill()
        process.wait()
        server.close()

"""MLflow is there, or it is said why not."""

import multiprocessing
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from rlhf_core.errors import UserError
from tasks.record.describe import ensure_experiment
from tasks.record.tracking import connect
from tasks.settings import Settings


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_does_not_answer_is_said_within_seconds():
    settings = Settings.model_validate({"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}"})
    start = time.monotonic()
    with pytest.raises(UserError, match=r"does not respond .*rlhf up.*MLFLOW_TRACKING_URI"):
        connect(settings)
    assert time.monotonic() - start < 5


def test_a_server_that_refuses_its_name_is_said_with_the_way_out():
    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(403)
            self.end_headers()
            self.wfile.write(b"Invalid Host header - possible DNS rebinding attack detected")

        def log_message(self, *_):
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Refusal)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    uri = f"http://127.0.0.1:{server.server_port}"
    try:
        with pytest.raises(UserError, match="MLFLOW_SERVER_ALLOWED_HOSTS"):
            connect(Settings.model_validate({"MLFLOW_TRACKING_URI": uri}))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("uri", ["sqlite:////proc/nowhere/mlflow.db", "ftp://example.org"])
def test_a_place_that_is_no_database_is_an_error(uri):
    with pytest.raises(UserError, match="check MLFLOW_TRACKING_URI"):
        connect(Settings.model_validate({"MLFLOW_TRACKING_URI": uri}))


def first_steps(settings, start, answers):
    start.wait()
    try:
        answers.put(ensure_experiment(connect(settings), "demo", settings))
    except Exception as error:
        answers.put(repr(error))


def test_two_processes_may_make_the_database_and_the_experiment_at_once(tmp_path):
    settings = Settings.model_validate({"RLHF_HOME": tmp_path / "new"})
    fork = multiprocessing.get_context("fork")  # keeps the imports, which take longer than the test
    start, answers = fork.Barrier(2), fork.Queue()
    processes = [fork.Process(target=first_steps, args=(settings, start, answers)) for _ in "ab"]
    for process in processes:
        process.start()
    got = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert got == ["1", "1"]
    assert (tmp_path / "new" / "mlflow" / "mlflow.db").exists()

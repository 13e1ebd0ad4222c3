"""Metrics reach MLflow in order and complete, whatever happens in between."""

import io
import itertools
import math
import multiprocessing
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from mlflow.exceptions import MlflowException
from rich.console import Console

from rlhf_core.errors import UserError
from tasks.record import tracking
from tasks.record.stage import ensure_experiment
from tasks.record.tracking import MlflowLogger, TerminalDisplay, connect, on_terminal
from tasks.settings import Settings


@pytest.fixture
def client(settings):
    return connect(settings)


@pytest.fixture
def run_id(client, settings):
    return client.create_run(ensure_experiment(client, "demo", settings)).info.run_id


class Flaky:
    """A real client that refuses its first `refusals` batches, as a server that restarts does."""

    def __init__(self, client, refusals):
        self.client, self.refusals, self.taken = client, refusals, []
        self.on_refusal = lambda: None

    def log_batch(self, run_id, metrics):
        if self.refusals:
            self.refusals -= 1
            self.on_refusal()
            raise MlflowException("the server restarts")
        self.taken += [metric.step for metric in metrics]
        self.client.log_batch(run_id, metrics=metrics)


def steps_of(client, run_id, name):
    return [(m.step, m.value) for m in client.get_metric_history(run_id, name)]


def test_every_value_arrives_in_order(client, run_id):
    logger = MlflowLogger(client, run_id, flush_steps=7)
    for step in range(50):
        logger.metrics({"loss": step / 2, "objective/kl": -step}, step)
    logger.close()
    assert steps_of(client, run_id, "loss") == [(step, step / 2) for step in range(50)]
    assert steps_of(client, run_id, "objective/kl") == [(step, -step) for step in range(50)]


def test_values_are_visible_while_the_stage_runs(client, run_id):
    logger = MlflowLogger(client, run_id, flush_steps=1000, flush_seconds=0.1)
    logger.metrics({"loss": 1.0}, step=0)
    deadline = time.monotonic() + 30
    while not steps_of(client, run_id, "loss") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert steps_of(client, run_id, "loss") == [(0, 1.0)]
    logger.close()


def test_a_full_buffer_does_not_wait(client, run_id):
    logger = MlflowLogger(client, run_id, flush_steps=10, flush_seconds=1000)
    for step in range(10):
        logger.metrics({"loss": 1.0}, step)
    deadline = time.monotonic() + 30
    while not steps_of(client, run_id, "loss") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(steps_of(client, run_id, "loss")) == 10
    logger.close()


def test_more_than_a_batch_of_mlflow_is_split(client, run_id):
    logger = MlflowLogger(client, run_id, flush_steps=10**6, flush_seconds=1000)
    for step in range(300):
        logger.metrics({f"metric_{i}": step for i in range(8)}, step)  # 2,400 values, limit 1,000
    logger.close()
    for i in range(8):
        assert steps_of(client, run_id, f"metric_{i}") == [(step, step) for step in range(300)]


def test_a_refused_batch_is_written_later_and_in_order(client, run_id):
    flaky = Flaky(client, refusals=2)
    logger = MlflowLogger(flaky, run_id, flush_steps=5, flush_seconds=1000)
    steps = iter(range(1000))

    def train(updates):
        for step in itertools.islice(steps, updates):
            logger.metrics({"loss": step}, step)

    flaky.on_refusal = lambda: train(5)  # training goes on while the server refuses
    train(5)
    deadline = time.monotonic() + 30
    while not flaky.taken and time.monotonic() < deadline:
        time.sleep(0.02)
    train(3)
    logger.close()
    assert flaky.taken == list(range(18))
    assert steps_of(client, run_id, "loss") == [(step, step) for step in range(18)]


def test_what_cannot_be_written_raises_at_the_end(client, run_id):
    logger = MlflowLogger(Flaky(client, refusals=10**6), run_id, flush_seconds=0.01)
    logger.metrics({"loss": 1.0, "accuracy": 0.5}, step=0)
    with pytest.raises(UserError, match=r"2 metric values .* could not be written .*restarts"):
        logger.close()


def test_flush_returns_when_all_is_written(client, run_id):
    logger = MlflowLogger(client, run_id, flush_seconds=1000)
    logger.metrics({"loss": 2.0}, step=3)
    logger.flush()
    assert steps_of(client, run_id, "loss") == [(3, 2.0)]
    logger.close()


def test_a_closed_logger_takes_nothing_and_closes_twice(client, run_id):
    logger = MlflowLogger(client, run_id)
    logger.close()
    logger.close()
    with pytest.raises(ValueError, match="closed"):
        logger.metrics({"loss": 1.0}, step=0)


def test_two_threads_may_log(client, run_id):
    logger = MlflowLogger(client, run_id, flush_steps=3)
    threads = [
        threading.Thread(target=lambda n=n: [logger.metrics({n: s}, s) for s in range(30)])
        for n in ("a", "b")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logger.close()
    for name in ("a", "b"):
        assert steps_of(client, run_id, name) == [(s, s) for s in range(30)]


def test_values_that_are_not_finite_are_nan(client, run_id, caplog):
    logger = MlflowLogger(client, run_id)
    for step, value in enumerate([math.nan, math.inf, -math.inf, 1.0]):
        logger.metrics({"loss": value}, step)
    logger.close()
    values = [value for _, value in steps_of(client, run_id, "loss")]
    assert [math.isnan(value) for value in values] == [True, True, True, False]
    assert [r.message for r in caplog.records] == ["loss is infinite at step 1; logged as NaN"]


@pytest.mark.parametrize("name", ["", "loss (nats)", "kl%", "a" * 251])
def test_a_name_that_mlflow_refuses_is_refused_at_once(client, run_id, name):
    logger = MlflowLogger(client, run_id)
    with pytest.raises(ValueError, match="no name of a metric"):
        logger.metrics({name: 1.0}, step=0)
    logger.close()


def test_a_call_costs_the_training_thread_little(client, run_id):
    """1000 steps of 10 metrics. One `log_metrics` call a step takes about 16 ms, so 16 s."""
    logger = MlflowLogger(client, run_id)
    values = {f"metric_{i}": 1.0 for i in range(10)}
    start = time.thread_time()
    for step in range(1000):
        logger.metrics(values, step)
    own = time.thread_time() - start
    start = time.monotonic()
    logger.close()
    print(f"1000 steps: {own * 1000:.0f} ms in the caller, {time.monotonic() - start:.2f} s to end")
    assert own < 1.0
    assert len(steps_of(client, run_id, "metric_9")) == 1000


def test_without_a_terminal_progress_is_a_line_now_and_then():
    out = io.StringIO()
    display = TerminalDisplay("sft", Console(file=out), line_seconds=1000)
    for done in range(1, 101):
        display.show(done, 100, f"[loss] {done}")
    display.close()
    assert out.getvalue().splitlines() == ["sft: 1/100 [loss] 1", "sft: 100/100 [loss] 100"]


def test_on_a_terminal_progress_is_one_bar():
    out = io.StringIO()
    display = TerminalDisplay("ppo", Console(file=out, force_terminal=True, width=100))
    for done in range(1, 4):
        display.show(done, 3, f"kl {done}")
    display.close()
    last = out.getvalue().rsplit("\r", 1)[-1]
    assert "ppo" in last
    assert "3/3" in last
    assert "kl 3" in last


def test_the_logger_shows_the_last_state(client, run_id):
    out = io.StringIO()
    display = TerminalDisplay("sft", Console(file=out), line_seconds=1000)
    logger = MlflowLogger(client, run_id, [display])
    for done in range(1, 21):
        logger.progress(done, 20, "working")
    logger.close()
    assert out.getvalue().splitlines()[-1] == "sft: 20/20 working"


class Shown:
    """A display that keeps what it is shown."""

    def __init__(self):
        self.states = []

    def show(self, done, total, note):
        self.states.append((done, total, note))

    def close(self):
        """Nothing."""

    def wait_for(self, wanted):
        """The first state that is wanted, once it is there."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for state in list(self.states):
                if wanted(*state):
                    return state
            time.sleep(0.01)
        raise AssertionError(f"never shown; shown were {self.states}")


def test_a_phase_is_shown_with_its_share_until_the_next_step_is_done(client, run_id, monkeypatch):
    monkeypatch.setattr(tracking, "LOOK_SECONDS", 0.05)
    display = Shown()
    logger = MlflowLogger(client, run_id, [display])
    logger.phase("loading the model")  # before it is known how many steps there will be
    assert display.wait_for(lambda *state: True) == (0, 0, "loading the model")
    logger.progress(8, 8, "loss 0.4")
    display.wait_for(lambda *state: state == (8, 8, "loss 0.4"))
    logger.phase("sampling, batch 2 of 4", 3, 8)
    display.wait_for(lambda *state: state == (8, 8, "sampling, batch 2 of 4 37 % · loss 0.4"))
    logger.close()
    assert display.states[-1] == (8, 8, "loss 0.4")


def test_a_step_that_is_silent_is_shown_with_how_long_it_has_been(client, run_id, monkeypatch):
    monkeypatch.setattr(tracking, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(tracking, "SILENCE_SECONDS", 1.0)
    display = Shown()
    logger = MlflowLogger(client, run_id, [display])
    logger.progress(2, 8, "loss 0.4")
    logger.phase("uploading")
    display.wait_for(lambda *state: state == (2, 8, "uploading · loss 0.4 · for 2 s"))
    logger.phase("registering")  # is news
    display.wait_for(lambda *state: state[2] == "registering · loss 0.4")
    logger.close()


def test_to_tell_of_a_phase_costs_nothing(client, run_id):
    """A hundred thousand times, as for each token of a thousand long texts."""
    logger = MlflowLogger(client, run_id, [Shown()])
    start = time.thread_time()
    for token in range(100_000):
        logger.phase("sampling", token, 100_000)
    own = time.thread_time() - start
    logger.close()
    print(f"{own * 10:.2f} µs each")
    assert own < 1.0


def test_what_comes_after_the_last_step_is_a_line_now_and_then_too():
    out = io.StringIO()
    display = TerminalDisplay("reward_model", Console(file=out), line_seconds=1000)
    for done in range(1, 9):
        display.show(done, 8, "loss 0.4")
    for percent in range(100):
        display.show(8, 8, f"sampling {percent} % · loss 0.4")
    assert out.getvalue().splitlines() == [
        "reward_model: 1/8 loss 0.4",
        "reward_model: 8/8 loss 0.4",
    ]


def test_on_a_terminal_a_bar_without_an_end_says_what_goes_on():
    out = io.StringIO()
    display = TerminalDisplay("ppo", Console(file=out, force_terminal=True, width=100))
    display.show(0, 0, "loading the models")
    assert "loading the models" in out.getvalue()
    display.show(1, 3, "sampling 40 %")
    display.close()
    last = out.getvalue().rsplit("\r", 1)[-1]
    assert "1/3" in last
    assert "sampling 40 %" in last


def test_of_what_never_had_steps_no_bar_is_left():
    out = io.StringIO()
    display = TerminalDisplay("promotion", Console(file=out, force_terminal=True, width=100))
    display.show(0, 0, "storing the report")
    display.close()
    assert "storing the report" in out.getvalue()
    assert "promotion" not in out.getvalue().rsplit("\x1b[2K", 1)[-1]


def test_work_without_a_run_says_something_only_if_it_takes_long(capsys, monkeypatch):
    for seconds in (10.0, 0.0):
        display = TerminalDisplay("validate", line_seconds=seconds, passing=True)
        monkeypatch.setattr(tracking, "TerminalDisplay", lambda *_, d=display, **__: d)
        with on_terminal("validate") as logger:
            logger.phase("reading the preferences")
            logger.progress(1, 1)
            logger.phase("tokenising", 1, 4)
        said = capsys.readouterr().err.splitlines()
        assert said == (
            []
            if seconds
            else [
                "validate: reading the preferences",
                "validate: 1/1",
                "validate: 1/1 tokenising 25 %",
            ]
        )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_does_not_answer_is_said_within_seconds():
    settings = Settings.model_validate({"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}"})
    start = time.monotonic()
    with pytest.raises(UserError, match=r"does not answer .*rlhf up.*MLFLOW_TRACKING_URI"):
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

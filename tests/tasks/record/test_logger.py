"""Metrics reach MLflow in order and complete, whatever happens in between."""

import io
import itertools
import math
import threading
import time

import pytest
from mlflow.exceptions import MlflowException
from rich.console import Console

from rlhf_core.errors import UserError
from rlhf_core.metrics import Alarm
from tasks.record import logger as logger_module
from tasks.record.describe import ensure_experiment
from tasks.record.logger import MlflowLogger
from tasks.record.terminal import TerminalDisplay
from tasks.record.tracking import connect


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

    def log_batch(self, run_id, metrics, tags=()):
        if self.refusals:
            self.refusals -= 1
            self.on_refusal()
            raise MlflowException("the server restarts")
        self.taken += [metric.step for metric in metrics]
        self.client.log_batch(run_id, metrics=metrics, tags=tags)


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


def test_an_alarm_is_a_tag_even_if_mlflow_refuses_it_at_first_and_is_announced(client, run_id):
    told = []
    flaky = Flaky(client, refusals=1)
    logger = MlflowLogger(flaky, run_id, flush_seconds=1000, announce=told.append)
    first, second = (
        Alarm("gap", step, 1.5, 1.0, "halve_learning_rate", "the reward runs ahead")
        for step in (3, 8)
    )
    logger.alarm(first)
    logger.alarm(second)
    logger.close()
    assert told == [first, second]
    found = client.get_run(run_id).data.tags["alarm.gap"]
    assert found == ("monitor, iteration 8: the reward runs ahead. The learning rate is halved")


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
    with pytest.raises(ValueError, match="is not a metric name"):
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
    monkeypatch.setattr(logger_module, "LOOK_SECONDS", 0.05)
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
    monkeypatch.setattr(logger_module, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(logger_module, "SILENCE_SECONDS", 1.0)
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

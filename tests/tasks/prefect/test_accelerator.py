"""One training at a time: a second one waits for the first, where there is a limit."""

import threading
import time

import pytest
from httpx import AsyncClient, Client, ConnectError
from prefect import flow
from prefect.client.orchestration import get_client

from tasks.prefect import accelerator as accelerator_module
from tasks.prefect.accelerator import LIMIT, accelerator

pytestmark = pytest.mark.integration


@pytest.fixture
def limit(prefect_server):
    """A limit of one, whatever other tests have left."""
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(LIMIT, 1)
        yield
        client.delete_global_concurrency_limit_by_name(LIMIT)


def test_a_second_training_waits_for_the_first(limit):
    held, tried, order = threading.Event(), threading.Event(), []

    @flow
    def first():
        with accelerator():
            held.set()
            assert tried.wait(30)
            time.sleep(1)  # time enough to come in where nobody is kept waiting
            order.append("first")

    @flow
    def second():
        assert held.wait(30)
        tried.set()
        with accelerator():
            order.append("second")

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert order == ["first", "second"]


def test_without_a_limit_or_without_prefect_nothing_is_waited_for(prefect_server):
    @flow
    def alone():
        with accelerator():
            return "done"

    assert alone() == "done"
    with accelerator():
        pass


def test_a_place_that_cannot_be_given_back_does_not_end_the_training(limit, monkeypatch, caplog):
    """As when the server is killed meanwhile: its lease frees the place."""

    def refuse(*_):
        raise ConnectError("away")

    @flow
    def training():
        with accelerator():
            monkeypatch.setattr(Client, "send", refuse)
            monkeypatch.setattr(AsyncClient, "send", refuse)
            done = "trained"
        monkeypatch.undo()
        return done

    assert training() == "trained"
    assert "could not be released (ConnectError); it expires in 90 s" in caplog.text


def test_a_server_that_is_away_is_waited_for(monkeypatch, caplog):
    monkeypatch.setattr(accelerator_module, "PAUSE_SECONDS", 0.01)
    answers = [ConnectError("away"), ConnectError("away"), True]

    def ask():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert accelerator_module._retry(ask)
    assert caplog.text.count("Prefect does not respond (ConnectError)") == 2
    monkeypatch.setenv("RLHF_OUTAGE_SECONDS", "0")
    answers = [ConnectError("away")]
    with pytest.raises(ConnectError):
        accelerator_module._retry(ask)

"""What a flow sets up: at its run and not at its import, and for the right run."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from contextvars import copy_context

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.logging.handlers import APILogWorker
from prefect.runtime import flow_run
from prefect.settings import (
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    get_current_settings,
    temporary_settings,
)

from flows.config import PipelineConfig
from flows.pipeline_flow import pipeline_flow
from flows.rlhf import rlhf
from tasks.prefect.ui import LIBRARIES, forward_logs, stage_task

IMPORT = """
import logging
import prefect.main
from prefect.settings import get_current_settings

def state():
    names = ("rlhf_core", "tasks", "flows", "prefect.flow_runs", "prefect.task_runs")
    loggers = [logging.getLogger(name) for name in names]
    beats = get_current_settings().flows.heartbeat_frequency
    return [(x.level, x.filters[:], x.handlers[:], x.propagate) for x in loggers], beats

before = state()
import flows.retrain, flows.rlhf, flows.stages, flows.sweep
assert state() == before, state()
"""


@pytest.fixture(autouse=True)
def levels():
    """Other tests find the loggers as they were."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


def test_importing_the_flows_leaves_logging_and_heartbeats_as_they_were():
    subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", IMPORT], check=True, timeout=120)


def lines(run_id: str) -> Counter[tuple[str, int, str, str]]:
    """(task run, level, logger, text) of what Prefect has of our loggers in a flow run."""
    APILogWorker.drain_all(timeout=10)
    deadline = time.monotonic() + 20
    while True:
        with get_client(sync_client=True) as client:
            this = FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
            runs = {run.id: run.name for run in client.read_task_runs(flow_run_filter=this)}
            logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id])))
        found = Counter(
            (runs.get(log.task_run_id, ""), log.level, log.name, log.message)
            for log in logs
            if log.name.startswith(LIBRARIES)
        )
        if any("the last one" in text for *_, text in found) or time.monotonic() > deadline:
            return found
        time.sleep(0.3)


@pytest.mark.integration
def test_each_line_is_in_the_log_of_its_own_task_once(prefect_server, recwarn):
    core, of_tasks = logging.getLogger("rlhf_core.a"), logging.getLogger("tasks.b")
    together = threading.Barrier(2, timeout=60)

    @task(task_run_name="{name}")
    def work(name):
        forward_logs()  # as a stage does; many times is once
        together.wait()
        for step in range(3):
            core.debug("%s debug", name)
            core.info("%s step %d", name, step)
            of_tasks.warning("%s warning %d", name, step)
        context = copy_context()
        thread = threading.Thread(target=lambda: context.run(of_tasks.info, f"{name} writer"))
        thread.start()
        thread.join()
        together.wait()
        if name == "b":  # the other one has ended, or is about to
            time.sleep(0.5)
            core.info("b later")

    @pipeline_flow("two-tasks", "two tasks")
    def two_tasks():
        of_tasks.info("between tasks")
        for future in [work.submit("a"), work.submit("b")]:
            future.result()
        core.info("the last one")
        return flow_run.id

    core.info("before")
    run_id = two_tasks()
    of_tasks.warning("after")

    expected = [("", 20, "tasks.b", "between tasks"), ("", 20, "rlhf_core.a", "the last one")]
    for name in ("a", "b"):
        expected += [(name, 20, "rlhf_core.a", f"{name} step {step}") for step in range(3)]
        expected += [(name, 30, "tasks.b", f"{name} warning {step}") for step in range(3)]
        expected += [(name, 20, "tasks.b", f"{name} writer")]
    expected += [("b", 20, "rlhf_core.a", "b later")]
    assert lines(run_id) == Counter(expected)
    # Prefect warns of lines that are of no run.
    assert not [w for w in recwarn if "flow run id" in str(w.message)]


def test_a_level_that_tells_more_stays():
    logging.getLogger("tasks").setLevel(logging.DEBUG)
    logging.getLogger("rlhf_core").setLevel(logging.WARNING)
    forward_logs()
    assert logging.getLogger("tasks").level == logging.DEBUG
    assert logging.getLogger("rlhf_core").level == logging.INFO


@pytest.mark.integration
def test_the_heartbeats_of_a_run_are_as_often_as_the_automation_expects(prefect_server):
    def frequency():
        return get_current_settings().flows.heartbeat_frequency

    assert pipeline_flow("without", "without")(frequency)() is None  # as the tests have it
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 180}):
        assert flow(name="plain")(frequency)() == 180
        assert pipeline_flow("often", "often")(frequency)() == 30


@pytest.mark.integration
def test_a_worker_says_in_one_sentence_which_parameters_do_not_fit(prefect_server):
    """Its process imports the entry point and nothing else of ours."""
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(
            client.create_flow(rlhf),
            name="of-this-test",
            entrypoint="flows.rlhf:rlhf",
            pull_steps=[],
        )
        config = PipelineConfig().model_dump(mode="json")
        config["ppo"] |= {"rollout_size": 4, "batch_size": 64}
        made = client.create_flow_run_from_deployment(deployment, parameters={"config": config})
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-m", "prefect.engine"],
        env=os.environ
        | get_current_settings().to_environment_variables(exclude_unset=True)
        | {"PREFECT__FLOW_RUN_ID": str(made.id)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "batch_size 64 is larger than rollout_size 4" in done.stderr
    assert "Traceback" not in done.stderr


@pipeline_flow("leaky-of-the-test", "leaky")
def leaky(in_task: bool) -> None:
    leak() if in_task else _leak()


@stage_task("leak", "leak")
def leak() -> None:
    _leak()


def _leak() -> None:
    raise RuntimeError("API request to http://me:secret@mlflow:5000/api failed")


@pytest.mark.integration
@pytest.mark.parametrize("in_task", [True, False])
def test_prefect_keeps_no_password_of_what_a_library_raises(prefect_server, caplog, in_task):
    state = leaky(in_task, return_state=True)
    assert state.is_failed()
    assert "http://me:***@mlflow:5000/api failed" in state.message
    assert "me:secret" not in state.message
    assert "me:***@mlflow" in caplog.text
    assert "RuntimeError: API request to http://me:secret" not in caplog.text

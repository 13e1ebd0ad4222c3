"""Where the end of a report leads: to the flow run where its page stays, else to MLflow."""

import pytest
from prefect import flow, task
from prefect.runtime import flow_run

from tasks.prefect.ui import prefect_link_lines
from tasks.settings import read_settings


@pytest.fixture
def links(home, prefect_server):
    """What a report ends with, written by a task as that of the pipeline and by the flow as that of
    a sweep; and the flow run."""

    @task
    def write():
        return prefect_link_lines(read_settings())

    @flow
    def around():
        return write(), prefect_link_lines(read_settings()), flow_run.id

    def call():
        by_task, by_flow, run_id = around()
        assert by_task == by_flow
        return by_task, run_id

    return call


@pytest.mark.integration
def test_where_prefect_stays_it_is_the_flow_run(links, monkeypatch):
    monkeypatch.setenv("RLHF_PREFECT_URL", "https://prefect.example.org/")
    lines, run_id = links()
    page = f"https://prefect.example.org/runs/flow-run/{run_id}"
    assert lines == [f"- The flow run in Prefect: {page}"]


@pytest.mark.integration
def test_a_server_of_the_run_alone_has_no_page_to_lead_to(links, monkeypatch):
    lines, _ = links()
    assert "http" not in "".join(lines)
    assert "`rlhf up`" in "".join(lines)
    # An MLflow server is open already, and nothing has to be said of it.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.org")
    assert links()[0] == []


def test_outside_prefect_there_is_no_flow_run(settings):
    named = settings.model_validate(
        {"RLHF_HOME": settings.home, "RLHF_PREFECT_URL": "https://prefect.example.org"}
    )
    assert "http" not in "".join(prefect_link_lines(named))

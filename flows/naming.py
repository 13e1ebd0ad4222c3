"""Names of runs in Prefect and MLflow: project, preset and number, as in `demo/small#12`."""

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.runtime import deployment, flow_run

from flows.generated_names import is_generated

PIPELINE = "rlhf"


def name_flow_run() -> str:
    """The name of the flow run that is about to start.

    A pipeline run is named after its deployment, which is the preset; other flows use their own
    name, as in `demo/sft#3`. The number counts the runs of that name on this Prefect server. A name
    that a person chose is kept, and so is that of a run that resumes after a crash or a suspension.
    """
    name = str(flow_run.name or "")
    if flow_run.run_count or not is_generated(name):
        return name
    config = flow_run.parameters["config"]
    project = getattr(config, "pipeline", config).project  # retrain and sweep nest the pipeline
    what = deployment.name if flow_run.flow_name == PIPELINE else flow_run.flow_name
    series = f"{project}/{what}#" if what else f"{project}#"
    return f"{series}{_runs_of(series) + 1}"


def _runs_of(series: str) -> int:
    filter_ = FlowRunFilter(name=FlowRunFilterName(like_=series))
    with get_client(sync_client=True) as client:
        return client.count_flow_runs(flow_run_filter=filter_)

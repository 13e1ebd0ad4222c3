"""The decorator of every flow here: Prefect's `flow`, without side effects at import."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Flow

from flows.cli.logs import shorten_user_errors
from flows.naming import name_flow_run
from flows.working_dir import in_working_dir
from tasks.prefect.events import beat_often
from tasks.prefect.ui import forward_logs

P = ParamSpec("P")
R = TypeVar("R")


class PipelineFlow(Flow[P, R]):
    """A flow that sets up its process when it runs, not when it is imported."""

    def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Set up logging and heartbeats, then validate: this is the first step of a run.

        Raises: ParameterTypeError, which Prefect then logs as one sentence.
        """
        shorten_user_errors()
        forward_logs()
        beat_often()
        return super().validate_parameters(parameters)


def pipeline_flow(
    name: str, flow_run_name: str | Callable[[], str] = name_flow_run
) -> Callable[[Callable[P, R]], PipelineFlow[P, R]]:
    """Make a function a flow that runs in the working folder of its deployment."""

    def decorate(function: Callable[P, R]) -> PipelineFlow[P, R]:
        return PipelineFlow(in_working_dir(function), name=name, flow_run_name=flow_run_name)

    return decorate

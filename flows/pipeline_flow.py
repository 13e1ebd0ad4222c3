"""The decorator of every flow here: Prefect's `flow`, for code that a worker only imports."""

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
    """A flow whose process is set up when it runs, and not when it is imported."""

    def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Set up logging and heartbeats, then validate, which is the first thing in a run.

        Raises: ParameterTypeError, which Prefect logs as a sentence from here on.
        """
        shorten_user_errors()
        forward_logs()
        beat_often()
        return super().validate_parameters(parameters)


def pipeline_flow(
    name: str, flow_run_name: str | Callable[[], str] = name_flow_run
) -> Callable[[Callable[P, R]], PipelineFlow[P, R]]:
    """Make a function a flow that works in the folder of its deployment."""

    def decorate(function: Callable[P, R]) -> PipelineFlow[P, R]:
        return PipelineFlow(in_working_dir(function), name=name, flow_run_name=flow_run_name)

    return decorate

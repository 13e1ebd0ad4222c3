"""The decorator of every flow here: Prefect's `flow`, without side effects at import."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from prefect import Flow

from flows.cli.logs import shorten_user_errors
from flows.naming import name_flow_run
from flows.working_dir import in_working_dir
from rlhf_core.redaction import mask_error
from tasks.prefect.events import beat_often
from tasks.prefect.ui import forward_logs
from tasks.settings import read_settings

P = ParamSpec("P")
R = TypeVar("R")


class PipelineFlow(Flow[P, R]):
    """A flow that sets up its process when it runs, not when it is imported."""

    def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Set up logging and heartbeats, then validate: this is the first step of a run.

        Raises: ParameterTypeError, which Prefect then logs as one sentence.
        """
        read_settings()  # from here on secrets are masked in the logs
        shorten_user_errors()
        forward_logs()
        beat_often()
        try:
            return super().validate_parameters(parameters)
        except Exception as error:
            mask_error(error)
            raise


def pipeline_flow(
    name: str, flow_run_name: str | Callable[[], str] = name_flow_run
) -> Callable[[Callable[P, R]], PipelineFlow[P, R]]:
    """Make a function a flow that runs in the working folder of its deployment."""

    def decorate(function: Callable[P, R]) -> PipelineFlow[P, R]:
        inside = in_working_dir(_without_secrets(function))
        return PipelineFlow(inside, name=name, flow_run_name=flow_run_name)

    return decorate


def _without_secrets(function: Callable[P, R]) -> Callable[P, R]:
    """Mask the secrets in what a flow raises, which Prefect keeps as the state of its run."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            mask_error(error)
            raise

    return call

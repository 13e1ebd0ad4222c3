"""Where a flow works: the folder that relative paths in its config refer to."""

import os
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.runtime import deployment, flow_run

from rlhf_core.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")


def in_working_dir(function: Callable[P, T]) -> Callable[P, T]:
    """Go to the folder of the deployment, `working_dir` of its job variables, before a flow begins.

    The process of a worker starts in an empty folder and has imported everything by then, so that
    nothing which lies in the user's folder can take the place of a package.

    Raises: UserError, from the flow, when this machine has no such folder.
    """

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        if folder := _folder():
            try:
                os.chdir(folder)
            except OSError as error:
                raise UserError(
                    f"this worker cannot go to {folder} ({error.strerror}), where relative paths "
                    "start: make it, or change `working_dir` of the deployment's job variables"
                ) from None
        return function(*args, **kwargs)

    return inside


def _folder() -> str:
    """What the run was given, else its deployment; empty for a run of no deployment."""
    if not deployment.id:
        return ""
    with get_client(sync_client=True) as client:
        variables = client.read_deployment(UUID(deployment.id)).job_variables
        own = client.read_flow_run(UUID(flow_run.id)).job_variables or {}
    return str((variables | own).get("working_dir") or "")

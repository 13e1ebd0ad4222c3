"""The working folder of a flow, which relative paths in its config start from."""

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
    """Change to the folder of the deployment, its job variable `working_dir`, before a flow runs.

    The process of a worker starts in an empty folder and has imported everything by then, so no
    file in the user's folder can shadow a package.

    Raises: UserError, from the flow, if this machine has no such folder.
    """

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        if folder := _folder():
            try:
                os.chdir(folder)
            except OSError as error:
                raise UserError(
                    f"this worker cannot change to the working folder {folder} "
                    f"({error.strerror}): create it, or change `working_dir` in the job variables "
                    "of the deployment"
                ) from None
        return function(*args, **kwargs)

    return inside


def _folder() -> str:
    """The `working_dir` of the run, else of its deployment; empty without a deployment."""
    if not deployment.id:
        return ""
    with get_client(sync_client=True) as client:
        variables = client.read_deployment(UUID(deployment.id)).job_variables
        own = client.read_flow_run(UUID(flow_run.id)).job_variables or {}
    return str((variables | own).get("working_dir") or "")

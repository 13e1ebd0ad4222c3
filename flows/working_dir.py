"""Where a flow works: the folder that relative paths in its config refer to."""

import os
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from rlhf_core.errors import UserError
from tasks.settings import read_settings

P = ParamSpec("P")
T = TypeVar("T")


def in_working_dir(function: Callable[P, T]) -> Callable[P, T]:
    """Go to the folder that RLHF_WORKING_DIR names, if any, before the flow begins.

    The process of a worker starts in an empty folder and has imported everything by then, so that
    nothing which lies in the user's folder can take the place of a package.

    Raises: UserError, from the flow, when this machine has no such folder.
    """

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        if folder := read_settings().working_dir:
            try:
                os.chdir(folder)
            except OSError as error:
                raise UserError(
                    f"this worker cannot go to {folder} ({error.strerror}), where relative paths "
                    "start: make it, or change `working_dir` of the deployment's job variables"
                ) from None
        return function(*args, **kwargs)

    return inside

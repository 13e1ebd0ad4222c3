"""Becomes another program, in the environment that the settings imply: what each container runs.

    python -m flows.local.container_entry prefect worker start --pool rlhf

So a worker or a server of the stack has what `rlhf up` gives to its own: the credentials of both
servers from RLHF_PASSWORD, no telemetry, patience with MLflow, memory that is kept.
"""

import os
import sys

from flows.local import allocator
from tasks.settings import apply_environment, read_settings


def main(program: str, *arguments: str) -> None:
    """Replace this process by `program`; what is set in the environment already stays."""
    apply_environment(read_settings())
    for name, value in allocator.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.execvp(program, [program, *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])

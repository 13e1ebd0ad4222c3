"""Entry point of the containers: replaces itself by a program, in the environment of the settings.

    python -m flows.local.container_entry prefect worker start --pool rlhf

So a worker or a server of the stack gets what `rlhf up` gives to its own services: the credentials
of both servers from RLHF_PASSWORD, no telemetry, retries for MLflow, and the allocator settings.
"""

import os
import sys

from flows.local import allocator
from tasks.settings import apply_environment, read_settings, set_defaults


def main(program: str, *arguments: str) -> None:
    """Replace this process by `program`; variables that are set already are kept."""
    apply_environment(read_settings())
    set_defaults(allocator.ENVIRONMENT)
    os.execvp(program, [program, *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])

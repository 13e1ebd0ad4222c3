"""Runs a flow run as the child of a worker does, and dies by SIGKILL at a place: a program.

    python dying.py FLOW_RUN MODULE:NAME before|after [N]

The process kills itself at the N-th call of what a module calls by that name, before the call or
after it. Without a place it runs to its end.
"""

import os
import signal
import sys
from importlib import import_module

from prefect.flow_engine import load_flow, load_flow_run, run_flow


def die_at(place: str, when: str, count: int) -> None:
    """Replace a function of a module by one that kills this process."""
    module, _, path = place.partition(":")
    owner = import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), [0]

    def dying(*args, **kwargs):
        calls[0] += 1
        if calls[0] < count:
            return real(*args, **kwargs)
        if when == "after":
            real(*args, **kwargs)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)


if __name__ == "__main__":
    flow_run, *place = sys.argv[1:]
    if place:
        die_at(place[0], place[1], int(place[2]) if len(place) > 2 else 1)
    loaded = load_flow_run(flow_run_id=flow_run)
    state = run_flow(load_flow(loaded), flow_run=loaded, return_type="state")
    sys.exit(0 if state.is_completed() else 1)

"""Puts one queue in order, out of the way of everything else on the machine.

    python -m tasks.feedback.ordering.program PROJECT MODEL SECONDS

It writes what came of it as a line of JSON, or one sentence to standard error, with status 2. After
so many seconds it is ended, should the run that began it be gone.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from rlhf_core.errors import UserError


def main() -> int:
    """Put the queue in order; the exit status."""
    project, model, seconds = sys.argv[1:]
    signal.setitimer(signal.ITIMER_REAL, float(seconds))
    os.nice(19)
    with suppress(OSError):  # elsewhere than on Linux
        Path("/proc/self/oom_score_adj").write_text("1000")
    import torch

    from tasks.feedback.ordering.task import put_in_order
    from tasks.registry.refs import ModelRef
    from tasks.settings import read_settings

    torch.set_num_threads(1)
    try:
        order = put_in_order(project, read_settings(), ModelRef.parse(model))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({"said": order.said}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

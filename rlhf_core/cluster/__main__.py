"""Run the stage of a job on its Ray cluster, as `launch` starts it:

    python -m rlhf_core.cluster JOB.json

What it prints, and the files beside the job, are those of `rlhf_core.launch`.
"""

import os
import sys
import traceback
from pathlib import Path

from rlhf_core.errors import ConfigError, UserError
from rlhf_core.launch import Job, fail, keep_report, only_lines_on_stdout
from rlhf_core.training.session import Interrupted


def main(arguments: list[str]) -> None:
    """Run the job, and write its report or its failure beside it."""
    path = Path(arguments[0])
    write = only_lines_on_stdout()
    try:
        try:
            from rlhf_core.cluster.driver import train_on_cluster
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"RLHF_CLUSTER is set, but {error.name} is not installed; "
                "pip install 'rlhf-pipeline[cluster]'"
            ) from error
        keep_report(path, train_on_cluster(Job.model_validate_json(path.read_bytes()), write))
    except (UserError, Interrupted) as error:
        fail(path, type(error).__name__, str(error))
    except Exception:
        fail(path, "", traceback.format_exc())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    else:
        code = 0
    sys.stderr.flush()
    os._exit(code)  # threads of Ray may wait for ranks that are gone

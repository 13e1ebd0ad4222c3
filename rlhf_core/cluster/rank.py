"""One of the processes that share a stage, inside a Ray worker."""

import logging
import pickle
import time
import traceback
from collections.abc import Callable
from typing import Any

import ray
import torch

from rlhf_core.cluster.mailbox import Letter
from rlhf_core.errors import UserError
from rlhf_core.launch import Job, Lines, run
from rlhf_core.metrics import SilentLogger
from rlhf_core.training.checkpoint import newest_step
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.session import Interrupted

ASK_SECONDS = 0.5  # between two looks whether the ranks shall stop


def train(given: dict[str, Any]) -> None:
    """Run the stage of a job as one of its ranks; everything that is said goes to the mailbox.

    An error of the user, and a request to stop, are no failures for Ray, which would try again.

    Args:
        given: `job` as JSON, the mailbox as `box`, the `threads` of a process, and the `sameness`.
    """
    job, box = Job.model_validate_json(given["job"]), given["box"]
    torch.set_num_threads(given["threads"])
    ranks, device = Ranks.meet(
        cpu=job.device == "cpu", strategy=job.strategy, stopping=_asking(box)
    )
    post = _Post(box)
    log = logging.getLogger("rlhf_core")
    log.addHandler(warnings := _Warnings(post, ranks.rank))
    try:
        given["sameness"].require(ranks)
        if ranks.main:
            post({"began": 0 if job.checkpoints is None else newest_step(job.checkpoints)})
        report = run(job, Lines(post) if ranks.main else SilentLogger(), ranks, device)
        if ranks.main:
            post.surely({"report": pickle.dumps(report)})
    except (UserError, Interrupted) as error:
        post.surely({"failed": type(error).__name__, "message": str(error)})
    except Exception:
        post.surely({"error": traceback.format_exc(), "rank": ranks.rank})
        raise
    finally:
        log.removeHandler(warnings)


class _Post:
    """Sends letters to the mailbox, without waiting for it."""

    def __init__(self, box: Any) -> None:
        self._box = box

    def __call__(self, letter: Letter) -> None:
        self._box.tell.remote(letter)

    def surely(self, letter: Letter) -> None:
        """Send one, and wait until it is there."""
        ray.get(self._box.tell.remote(letter))


class _Warnings(logging.Handler):
    """Sends what is logged as a warning, or worse."""

    def __init__(self, post: _Post, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._post, self._rank = post, rank

    def emit(self, record: logging.LogRecord) -> None:
        """Send one line."""
        self._post({"warning": f"rank {self._rank}: {record.getMessage()}"})


def _asking(box: Any) -> Callable[[], bool]:
    """Whether the ranks shall stop, asked for at most twice a second."""
    asked, stop = 0.0, False

    def stopping() -> bool:
        nonlocal asked, stop
        if not stop and time.monotonic() - asked >= ASK_SECONDS:
            stop, asked = bool(ray.get(box.stopping.remote())), time.monotonic()
        return stop

    return stopping

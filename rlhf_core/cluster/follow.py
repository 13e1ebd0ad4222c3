"""What has become of a stage on a cluster, from what its ranks have said so far."""

import re
import time
from collections.abc import Callable

from rlhf_core.cluster.mailbox import Letter
from rlhf_core.errors import UserError
from rlhf_core.launch import Job
from rlhf_core.training.session import Interrupted

LAST_WORDS_SECONDS = 10.0  # for Ray to end the ranks after one of them has given up
FAILURES: dict[str, type[BaseException]] = {**UserError.kinds(), Interrupted.__name__: Interrupted}


class Following:
    """Reads the letters of the ranks, and says how the stage has ended once it has.

    Args:
        write: gets what a logger of this process would: metrics, progress, phases, alarms, and
            warnings.
    """

    def __init__(self, job: Job, write: Callable[[Letter], None]) -> None:
        self.stopping = ""  # the signal that came
        self._job = job
        self._write = write
        self._working = False
        self._waiting = ""  # for what, while no rank is at work
        self._short = False  # the cluster has too few places
        self._tries = 0
        self._step = 0  # where the ranks of this try began
        self._errors: list[tuple[int, int, str]] = []  # of code: try, where it began, last line
        self._traceback = ""  # of the newest
        self._report: bytes | None = None
        self._failure: BaseException | None = None
        self._since = 0.0  # of the failure, or of the wish to stop
        self._waits(f"waiting for {_places(job.processes, 'free ')} on the cluster")

    def read(self, letter: Letter) -> None:
        """Take note of a letter, or pass it on."""
        if "report" in letter:
            self._report = letter["report"]
        elif "failed" in letter:
            kind = FAILURES.get(letter["failed"], RuntimeError)
            self._fail(kind(letter["message"]))
        elif "began" in letter:
            self._working, self._short, self._step = True, False, letter["began"]
        elif "error" in letter:
            self._error(letter["error"])
        elif "lost" in letter:
            self._lost(letter["lost"])
        else:
            self._write(letter)

    def room(self, found: int) -> None:
        """Say whether the cluster can run the stage at all, while no rank is at work.

        Args:
            found: processes that fit on it.
        """
        short = found < self._job.processes
        if self._working or self.stopping or short == self._short:
            return
        self._short = short
        if not short:
            self._write({"phase": self._waiting, "done": 0, "total": 0})
            return
        has = f"the cluster has {_places(found) if found else 'none'}"
        waits = f"waiting for {_places(self._job.processes)}; {has}"
        self._write({"phase": waits, "done": 0, "total": 0})
        fewer = f"; or cancel, and resume with RLHF_PROCESSES={found}" if found else ""
        self._write({"warning": f"{waits}. It goes on when a machine joins{fewer}"})

    def stop(self, signal: str) -> None:
        """Take note that the stage shall stop."""
        self.stopping = signal
        if self._failure is None:
            self._since = time.monotonic()

    def outcome(self, over: bool, error: str, grace: float) -> bytes | None:
        """The report of the main rank; None while the ranks are at work.

        Args:
            over: Ray Train has ended.
            error: of Ray Train.
            grace: seconds for the ranks to save a checkpoint when they have to stop.

        Raises: the failure of the stage.
        """
        if self._report is not None:
            return self._report
        waited = time.monotonic() - self._since
        if self._failure is not None and (over or waited > LAST_WORDS_SECONDS):
            raise self._failure
        if self.stopping and self._failure is None:
            end = f"training was stopped by {self.stopping}"
            if over or not self._working:
                raise Interrupted(f"{end} while no rank was at work; run again to resume")
            if waited > grace:
                raise Interrupted(f"{end}, and its ranks did not answer; run again to resume")
        if over and self._failure is None:
            seen = self._traceback or error or "no rank has reported"
            raise RuntimeError(f"the {self._job.stage} stage failed on the cluster\n\n{seen}")
        return None

    def _fail(self, failure: BaseException) -> None:
        # A user's error first: the other ranks may only report that this one is gone.
        if self._failure is None or isinstance(self._failure, Interrupted):
            self._failure, self._since = failure, time.monotonic()

    def _error(self, traceback: str) -> None:
        """An error in code. Ray cannot tell a bug from a broken link, so it tries again; one that
        comes again where it came before, after no progress, is a bug."""
        last = traceback.strip().splitlines()[-1]
        before = {(step, line) for tried, step, line in self._errors if tried < self._tries}
        self._errors.append((self._tries, self._step, last))
        self._traceback = traceback
        if (self._step, last) in before:
            self._fail(RuntimeError(f"the {self._job.stage} stage failed\n\n{traceback}"))

    def _lost(self, lost: dict[int, str]) -> None:
        self._working = False
        self._tries += 1
        ranks = ", ".join(f"rank {rank} ({_cause(why)})" for rank, why in sorted(lost.items()))
        again = f"try {self._tries} of {self._job.cluster_retries}"
        if self._tries > self._job.cluster_retries:
            self._write({"warning": f"lost on the cluster: {ranks}"})
            return
        self._write({"warning": f"lost on the cluster: {ranks}; starting again ({again})"})
        self._waits(f"starting again after a lost rank ({again})")

    def _waits(self, why: str) -> None:
        self._waiting = why
        self._write({"phase": why, "done": 0, "total": 0})


def _places(number: int, kind: str = "") -> str:
    return f"{number} {kind}place{'' if number == 1 else 's'}"


def _cause(why: str) -> str:
    """Of what Ray says of a lost rank: its machine, and the sentence with the cause."""
    machine = re.search(r"hostname='([^']+)'", why)
    sentence = re.search(r"The actor (?:is dead|died) because [^.]*", why)
    said = sentence[0] if sentence else why[:200]
    return f"on {machine[1]}: {said}" if machine else said

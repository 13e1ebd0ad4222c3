"""Run one stage on several processes of this machine, or of a Ray cluster.

    python -m rlhf_core.launch JOB.json

starts the ranks and waits for them. The main rank reports progress on stdout as lines of JSON:
`{"metrics": {...}, "step": 3}`, `{"done": 3, "total": 9, "note": "..."}`,
`{"phase": "...", "done": 3, "total": 9}`, `{"alarm": {...}}` or `{"warning": "..."}`. At the end it
writes its report, or the error, beside the job. `launch` does all this from Python. The ranks of a
job that names a cluster are started by Ray Train (`rlhf_core.cluster`).
"""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

import torch
from pydantic import Field
from torch.distributed import destroy_process_group, is_torchelastic_launched
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rlhf_core.config import Section
from rlhf_core.engines.client import EnginePlace
from rlhf_core.errors import UserError
from rlhf_core.machine.imports import importing
from rlhf_core.metrics import Alarm, SilentLogger, StageLogger
from rlhf_core.rewards.functions import RewardPlaces
from rlhf_core.training.ranks import Ranks, Strategy
from rlhf_core.training.session import Interrupted, StopRequest

if TYPE_CHECKING:  # keeps the process that waits for the ranks small
    from rlhf_core.types import Report
    from rlhf_core.work import Work

REPORT, FAILURE = "report.pickle", "failure-{}.json"
PHASE_SECONDS = 1.0  # between two lines about one phase
GRACE = 120  # seconds for ranks to write a checkpoint when they have to stop

log = logging.getLogger(__name__)


class Job(Section):
    """A stage, its arguments, and the number of processes to run it on."""

    stage: str = Field(description="A row of the stage table")
    config: dict[str, Any] = Field(default_factory=dict, description="Its own settings")
    sections: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Settings shared with other stages, by name"
    )
    inputs: dict[str, Path] = Field(
        default_factory=dict, description="Directories to read, by role"
    )
    outputs: dict[str, Path] = Field(
        default_factory=dict, description="Directories to write, by kind"
    )
    seed: int = Field(description="Seed of the run")
    device: str = Field("cpu", description="cpu, or cuda for one GPU each")
    checkpoints: Path | None = Field(None, description="Where checkpoints are kept; null = nowhere")
    every_seconds: float = Field(60.0, ge=0, description="Least time between two checkpoints (s)")
    strategy: Strategy = Field(
        "ddp", description="Each process has all weights (ddp), or a shard of them (fsdp)"
    )
    processes: int = Field(ge=1, description="Processes that share the work")
    rewards_from: RewardPlaces | None = Field(
        None, description="Where reward functions may come from; null = anywhere"
    )
    engine: EnginePlace | None = Field(None, description="The servers that sample roll-outs")
    cluster: str = Field("", description="HOST:PORT of a Ray cluster; empty = this machine")
    cluster_retries: int = Field(3, ge=0, description="How often lost ranks are started again")
    cluster_cpus: int = Field(1, ge=1, description="CPU cores of each process on the cluster")
    folder: Path = Field(Path(), description="On a cluster: a folder that all its machines share")

    @classmethod
    def of(
        cls,
        stage: str,
        config: Section,
        work: "Work",
        *,
        processes: int,
        strategy: Strategy,
        **cluster: Any,
    ) -> Self:
        """The same call as a job for other processes.

        Args:
            cluster: the fields about a cluster.
        """
        sections = {name: part.model_dump(mode="json") for name, part in work.sections.items()}
        return cls(
            stage=stage,
            config=config.model_dump(mode="json"),
            sections=sections,
            inputs=dict(work.inputs),
            outputs=dict(work.outputs),
            seed=work.seed,
            device=work.device,
            checkpoints=work.recovery.directory,
            every_seconds=work.recovery.every_seconds,
            strategy=strategy,
            processes=processes,
            rewards_from=work.rewards_from,
            engine=work.engine,
            **cluster,
        )


def launch(job: Job, logger: StageLogger) -> "Report":
    """Run a stage on its processes; metrics and progress arrive while it runs.

    SIGTERM and SIGINT are forwarded to the ranks, which save a checkpoint and exit; then this stops
    like a stage in this process. No process is left running in any case.

    Raises: the UserError of the stage; RuntimeError when a rank failed otherwise.
    """
    with TemporaryDirectory(prefix="rlhf-") as name:
        folder = Path(name)
        path = folder / "job.json"
        path.write_text(job.model_dump_json(), encoding="utf-8")
        module = "rlhf_core.cluster" if job.cluster else "rlhf_core.launch"
        command = [sys.executable, "-P", "-m", module, str(path)]
        # A new session, so that Ctrl-C reaches only this process, which forwards it once.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        with process, StopRequest(lambda _: process.terminate()) as request:
            try:
                for line in cast(TextIO, process.stdout):
                    _forward(logger, json.loads(line))
            except BaseException:
                process.terminate()
                raise
            finally:
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=2 * GRACE)
                process.kill()
        try:
            report = _outcome(folder, f"the {job.stage} stage failed ({process.returncode})")
        except (Interrupted, RuntimeError) as error:
            if request.number is None:
                raise
            request.stop(str(error))
        if request.number is not None:
            request.stop(f"{request.number.name} came after the {job.stage} stage was done")
        return report


def start_ranks(work: Callable[..., None], *arguments: Any, processes: int) -> None:
    """Call a function in several new processes that form a group, and wait for all of them.

    If one fails or a signal comes, all get SIGTERM, and SIGKILL `GRACE` seconds later.

    Raises: ChildFailedError, SignalException.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="rlhf",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",  # a free port
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=GRACE,
    )
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        elastic_launch(config, work)(*arguments)
    finally:  # torch does not restore the handlers
        for number, handler in before.items():
            signal.signal(number, handler)


def run(job: Job, logger: StageLogger, ranks: Ranks, device: str) -> "Report":
    """Run the stage of a job as one of its ranks."""
    # Imported here to keep the waiting process small.
    with importing():
        from rlhf_core.stages.table import STAGES, run_stage
        from rlhf_core.training.recovery import Recovery
        from rlhf_core.work import Work

    spec = STAGES[job.stage]
    work = Work(
        inputs=job.inputs,
        outputs=job.outputs,
        sections={
            name: kind.model_validate(job.sections.get(name, {}))
            for name, kind in spec.sections.items()
        },
        seed=job.seed,
        device=device,
        logger=logger,
        recovery=Recovery(job.checkpoints, job.every_seconds),
        ranks=ranks,
        rewards_from=job.rewards_from,
        engine=job.engine,
    )
    return run_stage(job.stage, spec.config.model_validate(job.config), work)


class Lines:
    """A logger that writes what it gets as JSON objects; what else it writes with is given."""

    def __init__(self, write: Callable[[dict[str, Any]], None]) -> None:
        self._write = write
        self._phase = ""
        self._next = 0.0

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Write named values at a step."""
        self._write({"metrics": dict(values), "step": step})

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Write that `done` of `total` units of work are finished."""
        self._write({"done": done, "total": total, "note": note})

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        """Write every new phase, and then at most once a second: each token may have a call."""
        if what != self._phase or time.monotonic() >= self._next:
            self._phase, self._next = what, time.monotonic() + PHASE_SECONDS
            self._write({"phase": what, "done": done, "total": total})

    def alarm(self, alarm: Alarm) -> None:
        """Write an alarm of the monitor."""
        self._write({"alarm": asdict(alarm)})


def only_lines_on_stdout() -> Callable[[dict[str, Any]], None]:
    """Writes lines of JSON to what is stdout now; other output goes to stderr from now on."""
    file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return lambda line: print(json.dumps(line), file=file, flush=True)


def _forward(logger: StageLogger, line: dict[str, Any]) -> None:
    if "metrics" in line:
        logger.metrics(line["metrics"], line["step"])
    elif "alarm" in line:
        logger.alarm(Alarm(**line["alarm"]))
    elif "warning" in line:
        log.warning("%s", line["warning"])
    elif "phase" in line:
        logger.phase(line["phase"], line["done"], line["total"])
    else:
        logger.progress(line["done"], line["total"], line["note"])


def _rank(path: Path) -> None:
    """Run as one of the processes that share the work."""
    write = only_lines_on_stdout()
    try:
        job = Job.model_validate_json(path.read_bytes())
        torch.set_num_threads(max(1, torch.get_num_threads() // job.processes))
        ranks, device = Ranks.meet(cpu=job.device == "cpu", strategy=job.strategy)
        report = run(job, Lines(write) if ranks.main else SilentLogger(), ranks, device)
        if ranks.main:
            keep_report(path, pickle.dumps(report))
        if ranks.world > 1:
            destroy_process_group()
    except (UserError, Interrupted) as error:
        fail(path, type(error).__name__, str(error))
    except Exception:
        fail(path, "", traceback.format_exc())


def keep_report(path: Path, report: bytes) -> None:
    """Write the pickled report of the main rank beside the job."""
    new = path.with_name("report.new")
    new.write_bytes(report)
    new.rename(path.with_name(REPORT))


def fail(path: Path, kind: str, message: str) -> None:
    """Write the reason beside the job and end this rank, and so all ranks."""
    failure = {"kind": kind, "message": message}
    path.with_name(FAILURE.format(os.getpid())).write_text(json.dumps(failure), encoding="utf-8")
    sys.exit(1)


def _outcome(folder: Path, failed: str) -> "Report":
    """The report of the main rank; raises the error if there is none."""
    if (folder / REPORT).is_file():
        return cast("Report", pickle.loads((folder / REPORT).read_bytes()))
    failures = [json.loads(file.read_bytes()) for file in sorted(folder.glob(FAILURE.format("*")))]
    # A user's error first: the other ranks may only report that this one is gone.
    for kind in (*UserError.kinds().values(), Interrupted):
        for failure in failures:
            if failure["kind"] == kind.__name__:
                raise kind(failure["message"])
    raise RuntimeError("\n\n".join([failed, *(failure["message"] for failure in failures)]))


def main(arguments: list[str]) -> None:
    """The command: start the ranks of a job, or run as one of those that torchrun started."""
    path = Path(arguments[0])
    if is_torchelastic_launched():
        _rank(path)
        return
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # reported below
    job = Job.model_validate_json(path.read_bytes())
    try:
        start_ranks(_rank, path, processes=job.processes)
    except SignalException as signal:
        sys.exit(128 + signal.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        fail(path, "", f"rank {rank} failed: {failure.message}")


if __name__ == "__main__":
    main(sys.argv[1:])

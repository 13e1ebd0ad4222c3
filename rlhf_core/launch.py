"""One training stage on several processes of this machine.

    python -m rlhf_core.launch JOB.json

starts the ranks and waits for them. The main rank tells how it goes on stdout, a line of JSON each
time: `{"metrics": {...}, "step": 3}`, `{"done": 3, "total": 9, "note": "..."}` or
`{"phase": "...", "done": 3, "total": 9}`. Its report, or why there is none, lies beside the job in
the end. `launch` does all this from Python; on several machines that share a disk, torchrun starts
the same command as its ranks.
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
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO, TypeVar, cast

import torch
from pydantic import Field, model_validator
from torch.distributed import destroy_process_group, is_torchelastic_launched
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rlhf_core.config import Section
from rlhf_core.errors import UserError
from rlhf_core.metrics import SilentLogger, StageLogger
from rlhf_core.training.ranks import Ranks, Strategy
from rlhf_core.training.session import Interrupted, StopRequest

if TYPE_CHECKING:  # the process that waits for the ranks is a small one
    from rlhf_core.types import Report

REPORT, FAILURE = "report.pickle", "failure-{}.json"
PHASE_SECONDS = 1.0  # between two lines about one phase
GRACE = 120  # seconds that ranks which have to stop get to write a checkpoint
PATHS = {
    "sft": {"data", "output"},
    "reward_model": {"sft", "data", "output"},
    "dpo": {"sft", "data", "policy_output"},
    "ppo": {"sft", "data", "policy_output", "critic_output"},
    "rloo": {"sft", "data", "policy_output"},
    "grpo": {"sft", "data", "policy_output"},
}

Config = TypeVar("Config", bound=Section)


class Job(Section):
    """A stage, what it is called with, and on how many processes it runs."""

    stage: Literal["sft", "reward_model", "dpo", "ppo", "rloo", "grpo"] = Field(
        description="Which stage"
    )
    sections: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="The stage's config sections, by name"
    )
    paths: dict[str, Path] = Field(description="What the stage reads and writes, by parameter name")
    reward_models: dict[str, Path] = Field(
        default_factory=dict, description="Directories of reward models, by their source"
    )
    seed: int = Field(description="Seed of the run")
    device: str = Field("cpu", description="cpu, or cuda for a GPU each")
    checkpoints: Path | None = Field(None, description="Where checkpoints are kept; null = nowhere")
    every_seconds: float = Field(60.0, ge=0, description="Least time between two checkpoints (s)")
    strategy: Strategy = Field(
        "ddp", description="Each process has all weights (ddp), or a part of them (fsdp)"
    )
    processes: int = Field(ge=1, description="Processes that share the work")

    @model_validator(mode="after")
    def _paths_of_the_stage(self) -> Self:
        if self.paths.keys() != PATHS[self.stage]:
            raise ValueError(
                f"{self.stage} needs the paths {', '.join(sorted(PATHS[self.stage]))}; "
                f"given are {', '.join(sorted(self.paths)) or 'none'}"
            )
        return self

    def section(self, name: str, kind: type[Config]) -> Config:
        """One of the config sections; what it leaves out has its default."""
        return kind.model_validate(self.sections.get(name, {}))


def launch(job: Job, logger: StageLogger) -> "Report":
    """Run a stage on its processes; metrics and progress arrive while it runs.

    SIGTERM and SIGINT go on to the ranks, which checkpoint and end; then it stops as a stage that
    runs in this process would. No process is left in any case.

    Raises: the UserError that the stage raised; RuntimeError when a rank failed otherwise.
    """
    with TemporaryDirectory(prefix="rlhf-") as name:
        folder = Path(name)
        path = folder / "job.json"
        path.write_text(job.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "rlhf_core.launch", str(path)]
        # In a session of its own: a Ctrl-C reaches this process alone, which passes it on once.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        with process, StopRequest(lambda _: process.terminate()) as request:
            try:
                for line in cast(TextIO, process.stdout):
                    _tell(logger, json.loads(line))
            except BaseException:
                process.terminate()
                raise
            finally:
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=2 * GRACE)
                process.kill()
        try:
            report = _outcome(folder, f"the {job.stage} stage has failed ({process.returncode})")
        except (Interrupted, RuntimeError) as error:
            if request.number is None:
                raise
            request.stop(str(error))
        if request.number is not None:
            request.stop(f"{request.number.name} came when the {job.stage} stage was done")
        return report


def start_ranks(work: Callable[..., None], *arguments: Any, processes: int) -> None:
    """Call a function in several new processes that can meet each other, and wait for all of them.

    When one fails or a signal comes, all get SIGTERM, and SIGKILL `GRACE` seconds later.

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
    finally:  # torch leaves its own handlers behind
        for number, handler in before.items():
            signal.signal(number, handler)


def run(job: Job, logger: StageLogger, ranks: Ranks, device: str) -> "Report":
    """The stage of a job, as one of its ranks."""
    # Imported here for the same reason.
    from rlhf_core.backbone.models import ModelConfig
    from rlhf_core.backbone.sampling import SamplingConfig
    from rlhf_core.onpolicy.loop import Given
    from rlhf_core.stages.dpo import DPOConfig, train_dpo
    from rlhf_core.stages.grpo import GRPOConfig, train_grpo
    from rlhf_core.stages.ppo import PPOConfig, train_ppo
    from rlhf_core.stages.reward_model import RewardModelConfig, train_reward_model
    from rlhf_core.stages.rloo import RLOOConfig, train_rloo
    from rlhf_core.stages.sft import SFTConfig, train_sft
    from rlhf_core.training.recovery import Recovery

    recovery = Recovery(job.checkpoints, job.every_seconds)
    common: dict[str, Any] = {"seed": job.seed, "device": device, "logger": logger}
    common |= {"recovery": recovery, "ranks": ranks}
    paths: dict[str, Any] = dict(job.paths)
    sampling = job.section("sampling", SamplingConfig)
    match job.stage:
        case "sft":
            model = job.section("model", ModelConfig)
            return train_sft(job.section("sft", SFTConfig), model=model, **paths, **common)
        case "reward_model":
            config = job.section("reward_model", RewardModelConfig)
            return train_reward_model(config, sampling, **paths, **common)
        case "dpo":
            return train_dpo(job.section("dpo", DPOConfig), **paths, **common)
    outputs = {name: paths.pop(name) for name in job.paths if name.endswith("output")}
    given = Given(**paths, reward_models=job.reward_models, **common)
    match job.stage:
        case "ppo":
            return train_ppo(job.section("ppo", PPOConfig), sampling, given, **outputs)
        case "rloo":
            return train_rloo(job.section("rloo", RLOOConfig), sampling, given, **outputs)
        case "grpo":
            return train_grpo(job.section("grpo", GRPOConfig), sampling, given, **outputs)


class _Lines:
    """Tells by lines of JSON."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._phase = ""
        self._next = 0.0

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._say({"metrics": dict(values), "step": step})

    def progress(self, done: int, total: int, note: str = "") -> None:
        self._say({"done": done, "total": total, "note": note})

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        # One that is new, and then as often as somebody looks: there may be one for each token.
        if what != self._phase or time.monotonic() >= self._next:
            self._phase, self._next = what, time.monotonic() + PHASE_SECONDS
            self._say({"phase": what, "done": done, "total": total})

    def _say(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._file, flush=True)


def _tell(logger: StageLogger, said: dict[str, Any]) -> None:
    if "metrics" in said:
        logger.metrics(said["metrics"], said["step"])
    elif "phase" in said:
        logger.phase(said["phase"], said["done"], said["total"])
    else:
        logger.progress(said["done"], said["total"], said["note"])


def _rank(path: Path) -> None:
    """One of the processes that share the work."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed does not come between the lines
    try:
        job = Job.model_validate_json(path.read_bytes())
        torch.set_num_threads(max(1, torch.get_num_threads() // job.processes))
        ranks, device = Ranks.meet(cpu=job.device == "cpu", strategy=job.strategy)
        report = run(job, _Lines(lines) if ranks.main else SilentLogger(), ranks, device)
        if ranks.main:
            new = path.with_name("report.new")
            new.write_bytes(pickle.dumps(report))
            new.rename(path.with_name(REPORT))
        if ranks.world > 1:
            destroy_process_group()
    except (UserError, Interrupted) as error:
        _leave(path, type(error).__name__, str(error))
    except Exception:
        _leave(path, "", traceback.format_exc())


def _leave(path: Path, kind: str, message: str) -> None:
    """End this rank, and so all, with the reason beside the job."""
    failure = {"kind": kind, "message": message}
    path.with_name(FAILURE.format(os.getpid())).write_text(json.dumps(failure), encoding="utf-8")
    sys.exit(1)


def _outcome(folder: Path, failed: str) -> "Report":
    """The report that the main rank has left, or else the error."""
    if (folder / REPORT).is_file():
        return cast("Report", pickle.loads((folder / REPORT).read_bytes()))
    failures = [json.loads(file.read_bytes()) for file in sorted(folder.glob(FAILURE.format("*")))]
    # What can be mended comes first: all that other ranks may say is that this one has gone.
    for kind in (*UserError.__subclasses__(), Interrupted):
        for failure in failures:
            if failure["kind"] == kind.__name__:
                raise kind(failure["message"])
    raise RuntimeError("\n\n".join([failed, *(failure["message"] for failure in failures)]))


def main(arguments: list[str]) -> None:
    """The command: start the ranks of a job, or be one of those that torchrun has started."""
    path = Path(arguments[0])
    if is_torchelastic_launched():
        _rank(path)
        return
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it is told below
    job = Job.model_validate_json(path.read_bytes())
    try:
        start_ranks(_rank, path, processes=job.processes)
    except SignalException as signal:
        sys.exit(128 + signal.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        _leave(path, "", f"rank {rank} has ended: {failure.message}")


if __name__ == "__main__":
    main(sys.argv[1:])

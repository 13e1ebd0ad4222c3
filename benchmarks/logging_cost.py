"""Measures what it costs a training to log metrics to MLflow. Prints one line of JSON.

    python benchmarks/logging_cost.py configs/demo.yaml --pairs 3

SFT and PPO of a config run in turn with metrics to an MLflow server, as a stage logs them, and with
a logger that keeps them in memory. The server is a separate process on the same machine, with
SQLite.

A few per cent of two whole runs drown in the noise of most machines, so the work itself is counted
as well: seconds that the training waits in the logger, CPU seconds of the thread that writes and of
the server, and seconds until `close` has written the rest. Their sum over the time of a run without
is `at_most`: the cost if nothing ran in parallel with training.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import psutil
from mlflow import MlflowClient

from flows.cli.loading import load_config
from flows.config import PipelineConfig
from flows.local.supervisor import unreachable
from rlhf_core.config import Section
from rlhf_core.metrics import MemoryLogger, StageLogger
from rlhf_core.stages.table import STAGES, run_stage
from rlhf_core.work import Work
from tasks.record.logger import MlflowLogger


class Counted:
    """A logger, and the seconds that its caller has spent in it."""

    def __init__(self, logger: StageLogger) -> None:
        self.logger = logger
        self.seconds = 0.0

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        begun = time.perf_counter()
        self.logger.metrics(values, step)
        self.seconds += time.perf_counter() - begun

    def progress(self, done: int, total: int, note: str = "") -> None:
        begun = time.perf_counter()
        self.logger.progress(done, total, note)
        self.seconds += time.perf_counter() - begun

    def phase(self, what: str, done: int = 0, total: int = 0) -> None:
        begun = time.perf_counter()
        self.logger.phase(what, done, total)
        self.seconds += time.perf_counter() - begun


@contextmanager
def mlflow_server(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port]
    command += ["-w", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        while unreachable(f"{address}/health"):
            time.sleep(0.2)
        yield address, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    config = load_config(arguments.config, (), PipelineConfig)
    line: dict[str, dict[str, float]] = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        mlflow_server(Path(scratch)) as (address, server),
    ):
        client = MlflowClient(tracking_uri=address)
        for name, train in trainings(config, Path(scratch)).items():
            runs = [pair(train, client, server, swap=i % 2 > 0) for i in range(arguments.pairs)]
            line[name] = {key: round(median(run[key] for run in runs), 4) for key in runs[0]}
    print(json.dumps({"config": arguments.config.name, "pairs": arguments.pairs, **line}))


def pair(
    train: Callable[[StageLogger], object],
    client: MlflowClient,
    server: psutil.Process,
    *,
    swap: bool,
) -> dict[str, float]:
    """One run with MLflow and one without, in either order."""
    found: dict[str, float] = {}
    for side in ("with", "without") if swap else ("without", "with"):
        if side == "with":
            found |= with_mlflow(train, client, server)
        else:
            begun = time.perf_counter()
            train(MemoryLogger())
            found["without_s"] = time.perf_counter() - begun
    parts = ("waits_s", "close_s", "writer_cpu_s", "server_cpu_s")
    found["overhead"] = found["with_s"] / found["without_s"] - 1
    found["at_most"] = sum(found[part] for part in parts) / found["without_s"]
    return found


def with_mlflow(
    train: Callable[[StageLogger], object], client: MlflowClient, server: psutil.Process
) -> dict[str, float]:
    run_id = client.create_run("0").info.run_id
    before, threads = cpu_seconds(server), set(threading.enumerate())
    logger = MlflowLogger(client, run_id)
    (writer,) = set(threading.enumerate()) - threads
    counted = Counted(logger)
    begun = time.perf_counter()
    train(counted)
    ended = time.perf_counter()
    writer_cpu = time.clock_gettime(time.pthread_getcpuclockid(writer.ident or 0))
    logger.close()
    closed = time.perf_counter()
    server_cpu = cpu_seconds(server) - before
    names = client.get_run(run_id).data.metrics
    return {
        "values": sum(len(client.get_metric_history(run_id, name)) for name in names),
        "with_s": closed - begun,
        "waits_s": counted.seconds,
        "close_s": closed - ended,
        "writer_cpu_s": writer_cpu,
        "server_cpu_s": server_cpu,
    }


def cpu_seconds(process: psutil.Process) -> float:
    """Of a process and its children, so far."""
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def trainings(config: PipelineConfig, folder: Path) -> dict[str, Callable[[StageLogger], object]]:
    """SFT and PPO of a config, on data and models that are made here once."""
    made = {kind: folder / kind for kind in ("data", "sft", "reward")}
    sections: dict[str, Section] = {
        "model": config.model,
        "sampling": config.sampling,
        "limits": config.length_limits,
    }
    numbers = iter(range(1000))

    def run(stage: str, settings: Section, outputs: dict[str, Path], logger: StageLogger) -> object:
        spec = STAGES[stage]
        work = Work(
            inputs={role: made[role] for role in spec.inputs},
            outputs=outputs,
            sections={name: sections[name] for name in spec.sections},
            seed=config.seed,
            logger=logger,
        )
        return run_stage(stage, settings, work)

    def run_sft(logger: StageLogger) -> object:
        return run("sft", config.sft, {"sft": folder / f"out-{next(numbers)}"}, logger)

    def run_ppo(logger: StageLogger) -> object:
        outputs = {kind: folder / f"out-{next(numbers)}" for kind in ("policy", "critic")}
        return run("ppo", config.ppo, outputs, logger)

    for stage, kind in (("prepare", "data"), ("sft", "sft"), ("reward_model", "reward")):
        settings = config.data if stage == "prepare" else getattr(config, stage)
        run(stage, settings, {kind: made[kind]}, MemoryLogger())
    return {"sft": run_sft, "ppo": run_ppo}


if __name__ == "__main__":
    main()

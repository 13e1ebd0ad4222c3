"""What it costs a training that its metrics go to MLflow. Prints one line of JSON.

    python benchmarks/logging_cost.py configs/demo.yaml --pairs 3

SFT and PPO of a config run in turn with metrics to an MLflow server, as a stage logs them, and with
a logger that keeps them in memory. The server is a process of its own on the same machine, with
SQLite.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from flows.config import PipelineConfig
from flows.loading import load_config
from flows.supervisor import unreachable
from rlhf_core.metrics import MemoryLogger, StageLogger
from rlhf_core.onpolicy import Given
from rlhf_core.scoring import PIPELINE_REWARD
from rlhf_core.stages.ppo import train_ppo
from rlhf_core.stages.prepare import prepare_data
from rlhf_core.stages.reward_model import train_reward_model
from rlhf_core.stages.sft import train_sft
from tasks.tracking import MlflowLogger


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
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
        yield address
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    config = load_config(arguments.config, (), PipelineConfig)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        train = trainings(config, folder)
        with mlflow_server(folder) as address:
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=address)
            seconds: dict[str, dict[str, list[float]]] = {
                name: {"mlflow": [], "memory": []} for name in train
            }
            values = {}
            for _ in range(arguments.pairs):
                for name, run in train.items():
                    run_id = client.create_run("0").info.run_id
                    logger = MlflowLogger(client, run_id)
                    seconds[name]["mlflow"].append(timed(run, logger))
                    begun = time.perf_counter()
                    logger.close()
                    seconds[name]["mlflow"][-1] += time.perf_counter() - begun
                    seconds[name]["memory"].append(timed(run, MemoryLogger()))
                    names = client.get_run(run_id).data.metrics
                    values[name] = sum(len(client.get_metric_history(run_id, n)) for n in names)
    line = {
        name: {
            "mlflow_s": median(took["mlflow"]),
            "memory_s": median(took["memory"]),
            "overhead": median(
                with_it / without - 1
                for with_it, without in zip(took["mlflow"], took["memory"], strict=True)
            ),
            "values": values[name],
        }
        for name, took in seconds.items()
    }
    print(json.dumps({"config": arguments.config.name, "pairs": arguments.pairs, **line}))


def timed(run: Callable[[StageLogger], object], logger: StageLogger) -> float:
    begun = time.perf_counter()
    run(logger)
    return time.perf_counter() - begun


def trainings(config: PipelineConfig, folder: Path) -> dict[str, Callable[[StageLogger], object]]:
    """SFT and PPO of a config, on data and models that are made here once."""
    data, sft, reward = folder / "data", folder / "sft", folder / "reward"
    numbers = iter(range(1000))
    prepare_data(
        config.data,
        model=config.model,
        limits=config.length_limits,
        output=data,
        seed=config.seed,
        logger=MemoryLogger(),
    )

    def run_sft(logger: StageLogger, output: Path | None = None) -> object:
        return train_sft(
            config.sft,
            model=config.model,
            data=data,
            output=output or folder / f"out-{next(numbers)}",
            seed=config.seed,
            device="cpu",
            logger=logger,
        )

    def run_ppo(logger: StageLogger) -> object:
        given = Given(
            sft=sft,
            reward_models={PIPELINE_REWARD: reward},
            data=data,
            seed=config.seed,
            device="cpu",
            logger=logger,
        )
        outputs = {
            "policy_output": folder / f"out-{next(numbers)}",
            "critic_output": folder / f"out-{next(numbers)}",
        }
        return train_ppo(config.ppo, config.sampling, given, **outputs)

    run_sft(MemoryLogger(), sft)
    train_reward_model(
        config.reward_model,
        config.sampling,
        sft=sft,
        data=data,
        output=reward,
        seed=config.seed,
        device="cpu",
        logger=MemoryLogger(),
    )
    return {"sft": run_sft, "ppo": run_ppo}


if __name__ == "__main__":
    main()

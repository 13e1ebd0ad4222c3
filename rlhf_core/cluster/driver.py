"""Runs one stage on a Ray cluster and waits for it, in a process of its own.

The process is a Ray driver: Ray ends it when the Ray node of its machine dies, so the flow, which
has to say so, is another one. Ray Train places the ranks, starts all of them again when one is
lost, and gives them their process group; the ranks then do what they do on one machine, and resume
from the newest checkpoint in the work folder. No checkpoint is reported to Ray.

Ray: https://docs.ray.io/en/releases-2.60.0/train/train.html
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_core.cluster.follow import LAST_WORDS_SECONDS, Following
from rlhf_core.cluster.mailbox import Letter, Mailbox
from rlhf_core.cluster.places import places
from rlhf_core.cluster.rank import train
from rlhf_core.cluster.sameness import Sameness
from rlhf_core.errors import ConfigError
from rlhf_core.launch import GRACE, Job
from rlhf_core.training.session import StopRequest

PROBE_SECONDS = 10.0  # for the cluster to answer
START_SECONDS = 300.0  # for the first process of ours on the cluster
LOOK_SECONDS = 0.3  # between two looks into the mailbox
COUNT_SECONDS = 5.0  # between two looks at the machines of the cluster
# Of what this process sees, ranks elsewhere have to see the same; the rest is of their machines.
PASSED_ON = ("HF_", "TOKENIZERS_", "TRANSFORMERS_", "DO_NOT_TRACK", "GLOO_", "NCCL_", "TORCH_")
OF_A_MACHINE = ("_IFNAME", "_HCA")  # names of its network devices


def train_on_cluster(job: Job, write: Callable[[Letter], None]) -> bytes:
    """Run a stage on the cluster of a job.

    Args:
        write: gets metrics, progress, phases and alarms as letters.

    Returns: the report of the stage, pickled.

    Raises: the UserError of the stage; Interrupted after SIGTERM or SIGINT; ConfigError when there
    is no cluster, or its machines differ; RuntimeError when ranks failed too often.
    """
    following = Following(job, write)
    parent = os.getppid()
    with (
        StopRequest() as early,
        Sameness.of(job.folder) as sameness,
        # Ray Train insists on a folder, though it gets nothing to keep.
        TemporaryDirectory(
            dir=job.folder.resolve(), prefix="ray-", ignore_cleanup_errors=True
        ) as storage,
    ):
        box = _connected(job)
        needed = _needed(job)
        ended = _start(job, box, sameness, storage, needed)
        counted = time.monotonic()
        with StopRequest() as request:  # again, for Ray has put handlers of its own
            while True:
                over = ended.wait(LOOK_SECONDS)  # before the letters, which come first
                for letter in ray.get(box.take.remote(), timeout=60):
                    following.read(letter)
                if time.monotonic() - counted >= COUNT_SECONDS:
                    following.room(places(ray.nodes(), needed))
                    counted = time.monotonic()
                if os.getppid() != parent:  # nobody reads any more
                    os._exit(1)
                number = request.number or early.number
                if number is not None and not following.stopping:
                    following.stop(number.name)
                    ray.get(box.stop.remote())
                if (report := following.outcome(over, ended.error, GRACE)) is not None:
                    ended.wait(LAST_WORDS_SECONDS)
                    return report


def _needed(job: Job) -> dict[str, float]:
    """What each process takes: a GPU if the cluster has any, and cores."""
    cores = {"CPU": float(job.cluster_cpus)}
    gpu = job.device == "cuda" or (job.device == "auto" and ray.cluster_resources().get("GPU", 0))
    return {**cores, "GPU": 1.0} if gpu else cores


class _Ended(threading.Event):
    """Whether Ray Train has ended, and its error."""

    error = ""


def _start(
    job: Job, box: Any, sameness: Sameness, storage: str, needed: Mapping[str, float]
) -> _Ended:
    """Train in a thread: in the main thread Ray would take SIGINT, and end with exit code 0."""
    ended, gpu = _Ended(), "GPU" in needed
    job = job.model_copy(update={"device": "cuda" if gpu else "cpu"})
    given = {
        "job": job.model_dump_json(),
        "box": box,
        "threads": job.cluster_cpus,
        "sameness": sameness,
    }
    trainer = TorchTrainer(
        train,
        train_loop_config=given,
        scaling_config=ScalingConfig(
            num_workers=job.processes, use_gpu=gpu, resources_per_worker=dict(needed)
        ),
        run_config=RunConfig(
            name=Path(storage).name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=job.cluster_retries),
            callbacks=[_Losses(box)],
        ),
    )

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            ended.error = str(error) or type(error).__name__
        finally:
            ended.set()

    threading.Thread(target=fit, name="ray-train", daemon=True).start()
    return ended


class _Losses(UserCallback):  # type: ignore[misc]
    """Tells the mailbox which ranks were lost; Ray calls it before it starts them again."""

    def __init__(self, box: Any) -> None:
        self._box = box

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Send one letter for all."""
        lost = {rank: " ".join(str(error).split()) for rank, error in worker_exceptions.items()}
        self._box.tell.remote({"lost": lost})


def _connected(job: Job) -> Any:
    """A mailbox on this machine, in the cluster of the job. It ends with this process, as all that
    Ray runs for it does: to disconnect sooner would end the process with Ray's exit code."""
    _require_answer(job.cluster)
    logging.getLogger("ray").setLevel(logging.ERROR)
    env = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PASSED_ON) and not name.endswith(OF_A_MACHINE)
    }
    try:
        ray.init(
            address=job.cluster,
            namespace="rlhf",
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": env},
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ConfigError(
            f"this machine is not part of the Ray cluster at {job.cluster}: {_line(error)} Start "
            f"`ray start --address={job.cluster} --num-cpus=0` on it"
        ) from error
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # On another machine it would be gone with that one.
    kind = ray.remote(num_cpus=0, max_concurrency=2)(Mailbox)
    box = kind.options(scheduling_strategy=here).remote()
    ray.get(box.take.remote(), timeout=START_SECONDS)
    return box


def _require_answer(address: str) -> None:
    """Raise ConfigError when nobody listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PROBE_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({error.strerror or error}); start its head with "
            f"`ray start --head --port={port}`, or correct or unset RLHF_CLUSTER"
        ) from error


def _line(error: BaseException) -> str:
    first = " ".join(str(error).split())[:300]
    return first if first.endswith(".") else first + "."

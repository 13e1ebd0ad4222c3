"""Have every stage of a run tried in a process of its own, and say what the run will take."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast

from rlhf_core.errors import UserError, brief
from rlhf_core.estimate.result import (
    Estimate,
    StageEstimate,
    duration,
    gibibytes,
    misfits,
)
from rlhf_core.estimate.trial import Facts
from rlhf_core.machine.limits import memory_limit, room
from rlhf_core.machine.memory import free_memory
from rlhf_core.metrics import StageLogger
from tasks.estimate.job import Job, StageJob, Tried
from tasks.settings import Settings

PREFIX = "rlhf-estimate-"
# A run starts a Prefect server beside its imports and writes its report at the end, and no trial
# does: process time of both, as a multiple of that of the imports.
START_BY_IMPORTS = 2.0
WORDS_OF_LOG = 2000
WAITING = 1.5  # time on the clock by that of the process, from which on it is mentioned


def estimate(
    stages: Sequence[StageJob],
    facts: Facts,
    settings: Settings,
    logger: StageLogger,
    *,
    project: str,
    seed: int,
    snapshot: Path | None,
    sft_is_trained: bool,
    environment: Mapping[str, str],
    imports: Sequence[str],
) -> Estimate:
    """Try each stage, and multiply.

    Args:
        environment: variables with which a run starts its processes.
        imports: modules that a run imports.

    Everything is written to a temporary folder, which is removed however this ends.

    Raises: UserError when the process of the trials cannot do its work at all.
    """
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        job = Job(
            folder=folder,
            project=project,
            seed=seed,
            facts=facts,
            stages=stages,
            snapshot=snapshot,
            home=settings.home,
            tracking_uri=settings.mlflow_uri,
            checkpoint_seconds=settings.checkpoint_seconds,
            sft_is_trained=sft_is_trained,
            imports=imports,
        )
        imported, tried = _trials(job, logger, environment)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    made = [_estimate(one) for one in tried]
    device = settings.device
    others = [f"{one.stage}: {what}" for one in tried for what in one.left_out]
    if settings.processes > 1:
        others.append(_of_processes(settings, device))
    if device == "cpu":
        others += _waited(made)
    chosen = {one.stage: _settings_of(one) for one in stages}
    free = free_memory() if device == "cpu" else None
    return Estimate(
        stages=made,
        start_seconds=START_BY_IMPORTS * imported,
        took=time.monotonic() - begun,
        notes=others,
        misfits=list(
            misfits(
                made,
                memory_limit(device),
                free,
                room(settings.home),
                str(settings.home),
                chosen,
            )
        ),
    )


def _waited(stages: Sequence[StageEstimate]) -> list[str]:
    """A note when the time on the clock is far above that of the process."""
    seconds = sum(stage.seconds or 0 for stage in stages)
    busy = sum(stage.cpu_seconds or 0 for stage in stages)
    if seconds < WAITING * busy:
        return []
    return [
        f"the trials waited {1 - busy / seconds:.0%} of their time, for other programs on this "
        f"machine or for a reward function; without waiting the stages would take "
        f"{duration(busy)} in all"
    ]


def _of_processes(settings: Settings, device: str) -> str:
    if device == "cpu":
        return (
            f"RLHF_PROCESSES is {settings.processes}; the trial was one process, and on a CPU "
            "several share the cores, so trainings are taken to be as fast, with the memory of "
            f"{settings.processes} processes"
        )
    return (
        f"RLHF_PROCESSES is {settings.processes}; the trial was one process, so trainings will be "
        f"up to {settings.processes} times as fast as it is said here"
    )


def _settings_of(stage: StageJob) -> Mapping[str, Any]:
    sampling = stage.sections.get("sampling", {}).get("batch_size", 1)
    return {**stage.config, "batch_size_of_sampling": sampling}


def _estimate(tried: Tried) -> StageEstimate:
    failed = bool(tried.problem)
    return StageEstimate(
        stage=tried.stage,
        work=tried.says,
        seconds=None if failed else tried.seconds,
        cpu_seconds=None if failed else tried.cpu_seconds,
        memory=tried.memory or None,
        copy_of_state=tried.copy_of_state,
        kept=tried.kept,
        working=tried.working,
        measured=tried.measured,
        problem=tried.problem,
        no_memory=tried.no_memory,
        left_out=tried.left_out,
    )


def _trials(
    job: Job, logger: StageLogger, environment: Mapping[str, str]
) -> tuple[float, list[Tried]]:
    """Seconds of the imports, and what the trial of each stage found."""
    path = job.folder / "job.json"
    path.write_text(job.model_dump_json(), encoding="utf-8")
    log = job.folder / "log"
    command = [sys.executable, "-P", "-m", "tasks.estimate.process", str(path)]
    found: list[Tried] = []
    imported = 0.0
    with log.open("w", encoding="utf-8") as errors:
        # A session of its own: Ctrl-C reaches only this process, which ends the whole group.
        process = subprocess.Popen(
            command,
            env={**environment, **os.environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    logger.phase("estimate: starting")
    try:
        for text in cast(TextIO, process.stdout):
            line = json.loads(text)
            if "imported" in line:
                imported = line["imported"]
            elif "begins" in line:
                logger.progress(len(found), len(job.stages), f"estimate: trying {line['begins']}")
            else:
                found.append(Tried.model_validate(line))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if len(found) < len(job.stages):
        said = log.read_text(encoding="utf-8", errors="replace").strip()[-WORDS_OF_LOG:]
        last = said.splitlines()[-1] if said else f"status {process.returncode}"
        if not found and process.returncode not in (-signal.SIGKILL, 0):
            raise UserError(
                f"the time of a run cannot be estimated: {brief(last)}; --no-probe skips that"
            )
        found += [
            Tried(stage=stage.stage, problem="the process of the trials was killed")
            for stage in job.stages[len(found) :]
        ]
    return imported, found


def enough_room(need: int) -> str:
    """Why a trial cannot be made in the temporary folder; empty if it can."""
    folder = Path(tempfile.gettempdir())
    if (free := room(folder)) < need:
        return (
            f"trials write about {gibibytes(need)} to {folder}, where {gibibytes(free)} are "
            "free; set TMPDIR to a folder on a larger disk"
        )
    return ""

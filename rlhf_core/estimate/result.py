"""What a run will take, stage by stage, and what does not fit."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from rlhf_core.machine.limits import Limit

GIB = 2**30
SPARE = 0.9  # of a limit on memory that a stage should leave unused, at least


class StageEstimate(BaseModel):
    """What a stage of the run will take."""

    model_config = ConfigDict(frozen=True)

    stage: str
    work: str  # steps, iterations or answers
    seconds: float | None
    cpu_seconds: float | None  # of one process, without waiting for others
    memory: int | None  # bytes that it needs, at most
    copy_of_state: int = 0  # bytes beside them while a checkpoint is written, if they are free
    kept: int  # bytes that it stores
    working: int  # bytes on the disk while it runs
    measured: str
    problem: str = ""
    no_memory: bool = False
    left_out: Sequence[str] = ()

    @property
    def peak(self) -> int | None:
        """Bytes of the process at most; without memory for the copy it does without."""
        return None if self.memory is None else self.memory + self.copy_of_state


class Estimate(BaseModel):
    """What a run will take."""

    model_config = ConfigDict(frozen=True)

    stages: Sequence[StageEstimate]
    start_seconds: float  # of the process and its services
    took: float  # the estimate itself (s)
    notes: Sequence[str] = ()
    misfits: Sequence[str] = ()

    @property
    def seconds(self) -> float:
        """The whole run, without the stages that have no estimate."""
        return self.start_seconds + sum(stage.seconds or 0 for stage in self.stages)

    @property
    def complete(self) -> bool:
        """Whether every stage has an estimate."""
        return all(stage.seconds is not None for stage in self.stages)

    @property
    def kept(self) -> int:
        """Bytes that the run stores."""
        return sum(stage.kept for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """Everything, for other programs."""
        return {**self.model_dump(mode="json"), "seconds": self.seconds, "kept": self.kept}


def misfits(
    stages: Sequence[StageEstimate],
    limit: Limit | None,
    free: int | None,
    disk: int,
    where: str,
    settings: Mapping[str, Mapping[str, Any]],
) -> Iterator[str]:
    """Sentences on what does not fit.

    Args:
        limit: the most memory that a stage can get.
        free: what is free of it now (bytes).
        disk: free bytes where the run stores what it makes.
        where: that folder.
        settings: of each stage, by which it could need less.
    """
    for stage in stages:
        least = gibibytes(stage.memory or 0)
        most = "" if limit is None else f"{limit.what} {gibibytes(limit.bytes)}"
        advice = _advice(settings.get(stage.stage, {}))
        if stage.no_memory:
            reached = f" at {least}" if stage.memory else ""
            yield (
                f"{stage.stage} does not fit: memory ran out{reached}"
                f"{f', and {most}' if most else ''}. {advice}"
            )
        elif limit is not None and (stage.memory or 0) > SPARE * limit.bytes:
            yield f"{stage.stage} does not fit: it needs {least}, and {most}. {advice}"
        elif free is not None and (stage.memory or 0) > free:
            yield (
                f"{stage.stage} does not fit now: it needs {least}, and {gibibytes(free)} are "
                f"free. End other programs, or: {advice[0].lower()}{advice[1:]}"
            )
    kept = sum(stage.kept for stage in stages)
    working = max((stage.working for stage in stages), default=0)
    if kept + working > disk:
        yield (
            f"The disk is too small: the run stores {gibibytes(kept)} and needs "
            f"{gibibytes(working)} beside them while a stage runs, and {gibibytes(disk)} are free "
            f"in {where}. Make room, or set RLHF_HOME to a larger disk; a larger keep_every keeps "
            "fewer policies."
        )


def _advice(settings: Mapping[str, Any]) -> str:
    """What to change so that a stage needs less memory."""
    ways = []
    if settings.get("micro_batch_size", 1) > 1:
        ways.append(f"lower micro_batch_size (it is {settings['micro_batch_size']}; same result)")
    if settings.get("batch_size_of_sampling", 1) > 1:
        ways.append(f"lower sampling.batch_size (it is {settings['batch_size_of_sampling']})")
    if settings.get("lora_rank") == 0:
        ways.append(
            "train adapters (lora_rank: 16), which need no gradients, moments and copies of all "
            "weights"
        )
    if settings.get("max_length", 0):
        ways.append(f"lower max_length (it is {settings['max_length']} tokens)")
    said = ", or ".join(ways[:3]) or "take a smaller model, or a machine with more memory"
    return f"{said[0].upper()}{said[1:]}."


def gibibytes(size: float) -> str:
    """A size for people."""
    if size < GIB:
        return f"{size / 2**20:.0f} MiB"
    return f"{size / GIB:.1f} GiB"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return (
            f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
            if minutes < 10
            else f"{minutes} min"
        )
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"

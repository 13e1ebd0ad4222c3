"""What the process of the trials is told, and what it says."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from rlhf_core.estimate.trial import Facts


class StageJob(BaseModel):
    """A stage of the run, in full."""

    model_config = ConfigDict(frozen=True)

    stage: str
    config: dict[str, Any]
    sections: dict[str, dict[str, Any]]
    inputs: Mapping[str, str] = {}  # role -> kind of an output of an earlier stage, or an address
    stand_ins: Mapping[str, str] = {}  # role -> kind to take where that stage could not be tried
    left_out: Sequence[str] = ()  # what a trial does not do, in words


class Job(BaseModel):
    """The stages of a run, in order."""

    model_config = ConfigDict(frozen=True)

    folder: Path  # for everything that the trials write
    project: str
    seed: int
    facts: Facts
    stages: Sequence[StageJob]
    snapshot: Path | None = None  # votes of the preference store
    home: Path  # of the installation, where registered models are found
    tracking_uri: str
    imports: Sequence[str] = ()  # modules that a run imports, so that a trial has its memory
    checkpoint_seconds: float = 60.0  # between two checkpoints of the run
    sft_is_trained: bool = True  # else the policy answers as it does


class Tried(BaseModel):
    """What the trial of a stage found."""

    model_config = ConfigDict(frozen=True)

    stage: str
    says: str = ""  # what the run does
    measured: str = ""  # what the trial did
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory: int = 0  # bytes, at most
    copy_of_state: int = 0  # bytes beside them while the run writes a checkpoint
    kept: int = 0  # bytes that the run stores
    working: int = 0  # bytes that it needs on the disk meanwhile, beside
    took: float = 0.0  # the trial itself (s)
    problem: str = ""  # why there is no estimate
    no_memory: bool = False  # that is why
    left_out: Sequence[str] = ()

"""Trainings of seconds for a cluster, and what one waits for and compares."""

import time

import tiny

from rlhf_core.launch import Job
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.judge import JudgeConfig
from rlhf_core.training.recovery import Recovery
from rlhf_core.work import Work

SFT = tiny.change(tiny.CONFIGS["sft"], epochs=6, batch_size=7, micro_batch_size=2)
WEIGHTS = "model.safetensors"


def job_of(folder, stage="sft", config=SFT, inputs=None, outputs=("sft",), **settings):
    folder.mkdir(exist_ok=True)
    work = Work(
        inputs=inputs,
        outputs={kind: folder / kind for kind in outputs},
        sections={"model": tiny.MODEL, "sampling": tiny.SAMPLING, "judge": JudgeConfig()},
        recovery=Recovery(folder / "checkpoints", 0),
    )
    job = Job.of(stage, config, work, processes=2, strategy="ddp", folder=folder)
    return job.model_copy(update=settings)


class Acting(MemoryLogger):
    """Does something when a step is logged for the first time, and takes the time from then on."""

    def __init__(self, step=None, act=lambda: None):
        super().__init__()
        self.step, self.act = step, act
        self.acted = self.noticed = self.again = 0.0

    def metrics(self, values, step):
        super().metrics(values, step)
        if self.noticed and not self.again:  # ranks that start again say first what they said
            self.again = time.monotonic()
        if step == self.step:
            self.step = None
            self.act()
            self.acted = time.monotonic()

    def phase(self, what, done=0, total=0):
        super().phase(what, done, total)
        if "starting again" in what and not self.noticed:
            self.noticed = time.monotonic()

    def told(self):
        seconds = self.noticed - self.acted, self.again - self.acted
        return "noticed after {:.0f} s, at work again after {:.0f} s".format(*seconds)


def measured(fault, what):
    """With `pytest -s`: a line of the table in docs/decisions/0065-ray-train.md."""
    print(f"\nFAULT {fault}: {what}", flush=True)


def values(logger):
    """The last value of each metric at each step: ranks that start again say them again."""
    return {(step, name): value for step, found in logger.history for name, value in found.items()}


def same(one, other, kind="sft"):
    assert (one / kind / WEIGHTS).read_bytes() == (other / kind / WEIGHTS).read_bytes()


def until(condition, seconds=60.0):
    """What `condition` gives as soon as that is true, and after how long."""
    begun = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() - begun < seconds, f"not within {seconds:.0f} s"
        time.sleep(0.2)
    return found, time.monotonic() - begun

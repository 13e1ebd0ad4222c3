"""A stage on two processes, started, followed, stopped and broken from this one."""

import json
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[1] / "stages"))

import tiny

from rlhf_core.errors import DataError
from rlhf_core.launch import Job, Lines, _forward, launch, run
from rlhf_core.metrics import Alarm, MemoryLogger
from rlhf_core.training.ranks import Ranks
from rlhf_core.training.recovery import Recovery
from rlhf_core.training.session import Interrupted
from rlhf_core.work import Work

torch.set_num_threads(1)

CONFIG = tiny.change(tiny.CONFIGS["sft"], epochs=6, batch_size=7, micro_batch_size=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    data = tmp_path_factory.mktemp("world") / "data"
    tiny.write_tables(data)
    return data


def job_of(data, folder, **settings):
    work = Work(
        inputs={"data": data},
        outputs={"sft": folder / "sft"},
        sections={"model": tiny.MODEL},
        recovery=Recovery(folder / "checkpoints"),
    )
    job = Job.of("sft", CONFIG, work, processes=2, strategy="ddp")
    return job.model_copy(update=settings)


class Acting(MemoryLogger):
    """Does something when a step is logged."""

    def __init__(self, step, act):
        super().__init__()
        self.step, self.act = step, act

    def metrics(self, values, step):
        super().metrics(values, step)
        if step == self.step:
            self.step = None
            self.act()


@pytest.fixture
def no_process_left():
    before = set(psutil.Process().children(recursive=True))  # servers of other tests live on
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [process for process in left if alive(process)]


def alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def close(one, other):
    assert [step for step, _ in one] == [step for step, _ in other]
    for (_, values), (_, expected) in zip(one, other, strict=True):
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_stopped_by_sigterm_and_continued_on_any_number_of_ranks(data, tmp_path, no_process_left):
    job = job_of(data, tmp_path / "two")
    logger = Acting(5, lambda: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM at step \d+; run again to resume"):
        launch(job, logger)
    assert signal.getsignal(signal.SIGTERM) is before
    (saved,) = (tmp_path / "two" / "checkpoints").iterdir()  # every_seconds is 60
    done = int(saved.name.removeprefix("step-"))
    assert 5 <= done < 24
    shutil.copytree(tmp_path / "two", tmp_path / "one")

    whole = MemoryLogger()
    expected = run(job_of(data, tmp_path / "whole", checkpoints=None), whole, Ranks(), "cpu")
    alone = MemoryLogger()
    report = run(job_of(data, tmp_path / "one"), alone, Ranks(), "cpu")
    assert report.summary() == pytest.approx(expected.summary(), rel=1e-4)
    close(alone.history, whole.history)

    spread = MemoryLogger()
    job = job_of(data, tmp_path / "two", strategy="fsdp", every_seconds=0)
    report = launch(job, spread)
    assert type(report).__name__ == "SFTReport"
    assert report.figures.keys() == expected.figures.keys()
    assert report.summary() == pytest.approx(expected.summary(), rel=1e-4)
    close(spread.history, whole.history)
    assert spread.notes[-1][:2] == (24, 24)
    # Told once, by the main rank: the first of each phase at least, however short it is.
    assert [what for what, *_ in spread.phases].count("encoding the demonstrations") == 1
    assert ("held-out loss", 0, 2) in spread.phases
    again = MemoryLogger()  # from what FSDP has saved, one process goes on
    assert run(job, again, Ranks(), "cpu").summary() == report.summary()
    assert again.history == spread.history
    for folder in ("one", "two"):
        found = load_file(tmp_path / folder / "sft" / "model.safetensors")
        for name, tensor in load_file(tmp_path / "whole" / "sft" / "model.safetensors").items():
            if not name.endswith("c_attn.bias"):  # of which a part has no gradient but rounding
                torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def is_rank(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:  # another child, which ends meanwhile
        return False


def kill_a_rank():
    ranks = [p for p in psutil.Process().children(recursive=True) if is_rank(p)]
    assert len(ranks) == 2
    ranks[-1].kill()


def test_when_a_rank_is_killed_all_end(data, tmp_path, no_process_left):
    with pytest.raises(RuntimeError, match="the sft stage failed"):
        launch(job_of(data, tmp_path), Acting(3, kill_a_rank))


def test_an_error_of_the_stage_arrives_as_it_is(data, tmp_path, no_process_left):
    shutil.copytree(data, tmp_path / "data")
    next((tmp_path / "data").glob("*demonstrations*eval*")).unlink()
    job = job_of(tmp_path / "data", tmp_path)
    with pytest.raises(DataError) as here:
        run(job, MemoryLogger(), Ranks(), "cpu")
    with pytest.raises(DataError) as there:
        launch(job, MemoryLogger())
    assert str(there.value) == str(here.value)


def test_an_alarm_passes_through_the_lines(capfd):
    alarm = Alarm("gap", 3, 1.25, 1.0, "roll_back", "the reward runs ahead of « votes »")
    Lines(lambda line: print(json.dumps(line))).alarm(alarm)
    told = MemoryLogger()
    _forward(told, json.loads(capfd.readouterr().out))
    assert told.alarms == [alarm]


def test_an_error_of_the_logger_ends_the_ranks(data, tmp_path, no_process_left):
    def fail():
        raise ConnectionError("the server has gone")

    with pytest.raises(ConnectionError):
        launch(job_of(data, tmp_path, processes=1), Acting(2, fail))
    assert list((tmp_path / "checkpoints").iterdir())  # they have stopped as asked

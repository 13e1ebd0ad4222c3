"""What is said of an estimate: times, sizes, and what does not fit."""

import pytest

from rlhf_core.estimate.result import Estimate, StageEstimate, duration, gibibytes, misfits
from rlhf_core.machine.limits import Limit

GIB = 2**30


def stage(name="ppo", memory=GIB, kept=0, working=0, seconds=10.0, **more):
    return StageEstimate(
        stage=name,
        work="",
        seconds=seconds,
        cpu_seconds=seconds,
        memory=memory,
        kept=kept,
        working=working,
        measured="",
        **more,
    )


def said(*stages, limit=8 * GIB, free=8 * GIB, disk=100 * GIB, **settings):
    return list(
        misfits(stages, Limit(limit, "this machine has"), free, disk, "/home", {"ppo": settings})
    )


def test_the_copy_for_a_checkpoint_is_of_the_peak_and_not_of_what_has_to_fit():
    fits = stage(memory=5 * GIB, copy_of_state=3 * GIB)
    assert fits.peak == 8 * GIB
    assert said(fits) == []
    assert said(stage(memory=8 * GIB)) != []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (9.94, "9.9 s"),
        (59.6, "60 s"),
        (125, "2 min 05 s"),
        (3599, "1 h 00 min"),
        (7_290, "2 h 02 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_times_for_people(seconds, text):
    assert duration(seconds) == text


def test_sizes_for_people():
    assert [gibibytes(n) for n in (0, 5 * 2**20, GIB, 1.5 * GIB)] == [
        "0 MiB",
        "5 MiB",
        "1.0 GiB",
        "1.5 GiB",
    ]


def test_what_fits_is_not_mentioned():
    assert said(stage(), stage("sft")) == []


def test_a_stage_that_needs_more_than_there_is_says_what_to_do():
    (sentence,) = said(stage(memory=9 * GIB), micro_batch_size=8, lora_rank=0)
    assert sentence.startswith("ppo does not fit: it needs 9.0 GiB, and this machine has 8.0 GiB.")
    assert "Lower micro_batch_size (it is 8; same result)" in sentence
    assert "lora_rank: 16" in sentence
    (sentence,) = said(stage(memory=9 * GIB), micro_batch_size=1, lora_rank=8)
    assert sentence.endswith("Take a smaller model, or a machine with more memory.")


def test_memory_that_others_use_is_told_apart():
    (sentence,) = said(stage(memory=5 * GIB), free=4 * GIB)
    assert "does not fit now: it needs 5.0 GiB, and 4.0 GiB are free" in sentence


def test_a_stage_that_ran_out_of_memory_does_not_fit():
    (sentence,) = said(stage(memory=None, seconds=None, no_memory=True))
    assert sentence.startswith("ppo does not fit: memory ran out, and this machine has 8.0 GiB.")


def test_the_disk_holds_what_is_kept_and_what_the_largest_stage_writes_beside_it():
    stages = stage(kept=3 * GIB, working=4 * GIB), stage("sft", kept=2 * GIB, working=GIB)
    assert said(*stages, disk=9 * GIB) == []
    (sentence,) = said(*stages, disk=9 * GIB - 1)
    assert "stores 5.0 GiB and needs 4.0 GiB beside them" in sentence
    assert "/home" in sentence


def test_the_whole_run_is_the_sum_of_what_is_known():
    run = Estimate(
        stages=[stage(seconds=10, kept=5), stage("x", seconds=None, kept=7, problem="no")],
        start_seconds=3,
        took=1,
    )
    assert (run.seconds, run.complete, run.kept) == (13, False, 12)
    assert run.as_json()["seconds"] == 13

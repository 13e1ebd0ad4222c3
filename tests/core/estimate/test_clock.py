"""The clock of a trial: which words of a stage end a span, and what the spans are called."""

import time

from rlhf_core.estimate.clock import Clock
from rlhf_core.metrics import MemoryLogger


def test_a_span_lasts_from_one_word_to_the_next():
    below = MemoryLogger()
    clock = Clock(below, between="gap")
    clock.phase("loading")
    time.sleep(0.05)
    clock.phase("sampling, batch 2 of 3", 4, 10)
    clock.progress(1, 5, "loss 0.4")
    clock.phase("batch", 1, 2)
    spans = {span.what: span for span in clock.stop()}
    assert list(spans) == ["opening the run", "loading", "sampling", "gap", "batch"]
    assert 0.05 <= spans["loading"].seconds < 0.5
    assert spans["loading"].cpu_seconds < 0.04
    assert (spans["sampling"].part, spans["sampling"].parts, spans["sampling"].unit) == (4, 10, 0)
    assert not spans["sampling"].last
    assert spans["batch"].last
    assert spans["batch"].unit == 1
    assert below.notes == [(1, 5, "loss 0.4")]
    assert below.phases[1] == ("sampling, batch 2 of 3", 4, 10)


def test_without_units_the_note_tells_whose_phase_it_is():
    clock = Clock(MemoryLogger())
    clock.progress(2, 5, "policy")
    clock.phase("answers", 0, 10)
    names = [span.what for span in clock.stop()]
    assert names == ["opening the run", "policy", "policy: answers"]


def test_each_phase_is_told_without_the_number_of_its_batch():
    heard = []
    clock = Clock(MemoryLogger(), heard=heard.append)
    clock.phase("sampling, batch 1 of 2")
    clock.phase("scoring")
    assert heard == ["sampling", "scoring"]

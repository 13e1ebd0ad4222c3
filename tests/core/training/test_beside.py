"""A copy of a state is the state, without its memory; a thread runs one thing at a time."""

import io
import threading
from collections import OrderedDict

import pytest
import torch

from rlhf_core.training import beside
from rlhf_core.training.beside import Writer, copied


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def state():
    whole = torch.arange(12.0).reshape(3, 4)
    weights = OrderedDict(weight=whole, column=whole[:, 1], turned=whole.T, empty=torch.empty(0))
    weights._metadata = OrderedDict(version=1)
    name = "a name"
    return {
        "weights": weights,
        "again": [whole, (name, name, 0.1, None, 2**70)],
        "half": torch.ones(3).bfloat16(),
        "counts": {0: {"step": torch.tensor(3.0)}},
    }


def test_a_copy_is_saved_as_the_same_bytes_and_shares_no_memory():
    original = state()
    expected = saved(original)
    copy = copied(original)
    original["again"][0].zero_()
    original["counts"][0]["step"].add_(1)
    original["weights"].clear()
    assert saved(copy) == expected


def test_what_shares_memory_is_counted_once(monkeypatch):
    asked = []
    size = 12 * 4 + 3 * 2 + 4
    for free, fits in ((2 * size, True), (2 * size - 1, False)):
        monkeypatch.setattr(beside, "free_memory", lambda at, free=free: asked.append(at) or free)
        assert (copied(state()) is not None) == fits
    assert set(asked) == {torch.device("cpu")}


@pytest.mark.parametrize("error", [MemoryError, RuntimeError("can't allocate memory")])
def test_memory_that_is_gone_when_it_is_taken_is_no_room(monkeypatch, error):
    def refuse(state):
        raise error

    monkeypatch.setattr(beside.copy, "deepcopy", refuse)
    assert copied(state()) is None


def test_a_writer_runs_one_thing_at_a_time_and_tells_its_error_once():
    writer, go = Writer(), threading.Event()
    writer.wait()
    assert writer.done

    def fail():
        go.wait()
        raise ValueError("full")

    writer.start(fail)
    assert writer.busy
    assert not writer.done
    with pytest.raises(RuntimeError, match="busy"):
        writer.start(fail)
    go.set()
    with pytest.raises(ValueError, match="full"):
        writer.wait()
    writer.wait()
    assert not writer.busy
    done = []
    writer.start(lambda: done.append(threading.current_thread()))
    writer.wait()
    assert done != [threading.main_thread()]

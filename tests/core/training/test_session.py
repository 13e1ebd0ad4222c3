"""A run that is stopped anywhere and run again ends with the bits of one that was not."""

import itertools
import logging
import multiprocessing
import os
import random
import resource
import signal
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from rlhf_core.errors import CheckpointError
from rlhf_core.metrics import MemoryLogger
from rlhf_core.onpolicy.kl_control import AdaptiveKL
from rlhf_core.seeding import rng_state, set_rng_state
from rlhf_core.training import beside
from rlhf_core.training import session as session_module
from rlhf_core.training.checkpoint import Checkpoints
from rlhf_core.training.session import Interrupted, Session

RUN = {"seed": "0"}
# A save begins at each safe point that comes when the one before is done.
BESIDE = {"every_seconds": 1e-9, "share": 1e9}
# Children that have torch already: real processes, started in milliseconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "torch._dynamo", "rlhf_core.training.session"])


class Order:
    """Which rows come next: a list that is used up, and given away as it is."""

    def __init__(self):
        self.rows = []

    def take(self, generator):
        self.rows = self.rows or torch.randperm(16, generator=generator).tolist()
        return [self.rows.pop() for _ in range(4)]

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state):
        self.rows = state["rows"]


def train(
    folder,
    steps=30,
    pause=0.0,
    checkpoints=True,
    at_step=None,
    started=None,
    share=None,
    **settings,
):
    """A small training with every kind of randomness; its end goes to `result.pt`."""
    if share is not None:
        session_module.SAVING_SHARE = share
    torch.set_num_threads(1)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 1))
    model.register_buffer("ballast", torch.zeros(1_000_000))  # a save takes long enough to be hit
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(4))
    draws, order, kl = torch.Generator().manual_seed(5), Order(), AdaptiveKL(0.2, 0.5, 100)
    with Session(
        MemoryLogger(),
        checkpoints=Checkpoints(folder / "checkpoints") if checkpoints else None,
        identity=RUN,
        learners={"model": model, "optimizer": optimizer},
        positions={"draws": draws, "order": order, "kl": kl},
        **settings,
    ) as session:
        if started is not None:
            started.set()
        session.resume()
        while session.step < steps:
            if at_step is not None:
                at_step(session)
            session.metrics({"random/before": random.random()}, session.step)
            for row in order.take(draws):
                session.check()
                time.sleep(pause * random.random())
                target = x[row].sum() + np.random.normal() + torch.randn((), generator=draws)
                loss = (model(x[row]) - target).square().mean()
                loss.backward()
            kl.update(loss.item(), 4)
            optimizer.step()
            optimizer.zero_grad()
            session.metrics({"loss": loss.item(), "kl_coef": kl.value}, session.step)
            session.safe_point()
    result = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": session.history,
        "rng": [rng_state(), draws.get_state(), order.rows, kl.value],
    }
    torch.save(result, folder / "result.tmp")
    (folder / "result.tmp").rename(folder / "result.pt")


def same(one, other):
    """Equal to the bit, through any nesting."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def run(folder, *, stop_after=None, by=signal.SIGKILL, **settings):
    """Train in a process of its own, stopped some seconds after its start; its exit code."""
    settings["started"] = processes.Event()
    child = processes.Process(target=train, args=(folder,), kwargs=settings)
    child.start()
    settings["started"].wait()
    child.join(stop_after)
    if child.is_alive():
        os.kill(child.pid, by)
    child.join()
    return child.exitcode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The end of a run that nothing disturbed: no signal, no checkpoint."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(folder, checkpoints=False) == 0
    return torch.load(folder / "result.pt")


# --- killed ---


@pytest.mark.parametrize("when", [{"every_seconds": 0}, BESIDE], ids=["waiting", "beside"])
def test_killed_at_any_moment_and_run_again_gives_the_same_bits(
    tmp_path, uninterrupted, caplog, when
):
    chance = random.Random(0)
    kills = torn = 0
    folders = map(tmp_path.joinpath, map(str, itertools.count()))
    while kills < 25:
        folder = next(folders)
        folder.mkdir()
        while run(folder, stop_after=chance.uniform(0, 0.4), **when) != 0:
            kills += 1
            torn += any((folder / "checkpoints").glob("*.new"))
            Checkpoints(folder / "checkpoints").latest(RUN)
            assert not caplog.records  # what has its own name is whole
        assert same(torch.load(folder / "result.pt"), uninterrupted)
    assert torn > 0  # some were killed while they saved


def test_killed_or_asked_to_stop_between_timed_saves(tmp_path, uninterrupted):
    chance = random.Random(1)
    stops = []
    folders = map(tmp_path.joinpath, map(str, itertools.count()))
    while len(stops) < 12:
        folder = next(folders)
        folder.mkdir()
        by = chance.choice((signal.SIGKILL, signal.SIGTERM))
        settings = {"every_seconds": 0.05, "pause": 0.02}
        while run(folder, stop_after=chance.uniform(0.1, 1), by=by, **settings) != 0:
            stops.append(by)
            by = chance.choice((signal.SIGKILL, signal.SIGTERM))
        assert same(torch.load(folder / "result.pt"), uninterrupted)
    assert set(stops) == {signal.SIGKILL, signal.SIGTERM}


# --- asked to stop ---


def ask_once(session):
    if session.step == 7:
        os.kill(os.getpid(), signal.SIGTERM)


def write_down_how_it_ended(folder, **settings):
    try:
        train(folder, at_step=ask_once, **settings)
    except Interrupted as end:
        (folder / "end").write_text(str(end))
        raise


def test_sigterm_saves_the_last_safe_point_and_ends_at_once(tmp_path, uninterrupted, capfd):
    child = processes.Process(target=write_down_how_it_ended, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 1
    end = "training was stopped by SIGTERM at step 7; run again to resume"
    assert (tmp_path / "end").read_text() == end
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert folder.name == "step-00000007"  # every_seconds is 60: nothing was saved before
    # What was logged and drawn after the safe point is not in it.
    saved = Checkpoints(tmp_path / "checkpoints").latest(RUN)
    assert len(saved["history"]) == 14
    assert same(saved["history"], uninterrupted["history"][:14])
    assert run(tmp_path) == 0
    assert same(torch.load(tmp_path / "result.pt"), uninterrupted)


class Cancelled(BaseException):
    """What the handler of an orchestrator raises."""


@pytest.fixture
def handler():
    """A handler for SIGTERM as an orchestrator installs one."""

    def cancel(number, frame):
        raise Cancelled(number)

    before = signal.signal(signal.SIGTERM, cancel)
    yield cancel
    signal.signal(signal.SIGTERM, before)


def session_of(checkpoints=None, learners=None, positions=None, **settings):
    settings = {"identity": RUN, "every_seconds": 3600} | settings
    return Session(
        MemoryLogger(),
        checkpoints=checkpoints,
        learners=learners or {},
        positions=positions or {},
        **settings,
    )


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


def stopped(session, number=signal.SIGTERM, steps=1):
    """Stopped by a signal in a check after some steps."""
    with session:
        for _ in range(steps):
            session.safe_point()
        signal.raise_signal(number)
        assert session.step == steps  # the signal itself does nothing
        session.check()
        pytest.fail("it was not stopped")


def test_the_handler_of_before_decides_how_it_ends(checkpoints, handler):
    with pytest.raises(Cancelled, match=str(int(signal.SIGTERM))):
        stopped(session_of(checkpoints))
    assert checkpoints.latest(RUN)["step"] == 1
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_handler_that_returns_does_not_keep_it_running(checkpoints, number):
    heard = []
    before = signal.signal(number, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(Interrupted, match=f"by {number.name} at step 1; run again to resume"):
            stopped(session_of(checkpoints), number)
    finally:
        signal.signal(number, before)
    assert heard == [number]


def test_before_the_first_safe_point_there_is_nothing_to_save(checkpoints, handler):
    with pytest.raises(Cancelled):
        stopped(session_of(checkpoints), steps=0)
    assert checkpoints.latest(RUN) is None


def test_without_checkpoints_it_says_that_nothing_was_saved():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert not session_of().resume()
        with pytest.raises(Interrupted, match="run again to start over, since nothing was saved"):
            stopped(session_of())
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_safe_point_stops_as_well(checkpoints, handler):
    def work():
        with session_of(checkpoints) as session:
            signal.raise_signal(signal.SIGTERM)
            session.safe_point()
            pytest.fail("it was not stopped")

    with pytest.raises(Cancelled):
        work()
    assert checkpoints.latest(RUN)["step"] == 1


def test_a_request_after_the_last_check_is_not_forgotten(checkpoints, handler):
    def work():
        with session_of(checkpoints) as session:
            session.safe_point()
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Cancelled):
        work()
    assert checkpoints.latest(RUN)["step"] == 1


def test_an_error_under_way_is_not_hidden_by_a_request(handler):
    def work():
        with session_of() as session:
            signal.raise_signal(signal.SIGTERM)
            return 1 / session.step

    with pytest.raises(ZeroDivisionError):
        work()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_second_interrupt_does_not_wait():
    def work():
        with session_of():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second one waited for a check")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_are_given_back_and_an_ignored_signal_stays_ignored(handler):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with session_of() as session:
            assert signal.getsignal(signal.SIGTERM) != handler
            signal.raise_signal(signal.SIGINT)
            session.check()
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_of_the_main_thread_signals_are_left_alone(handler):
    seen = []

    def work():
        with session_of() as session:
            session.safe_point()
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]


# --- when it saves ---


class Slow(Checkpoints):
    """Takes its time, and counts."""

    seconds, saves = 0.0, 0

    def save(self, step, state, identity):
        self.saves += 1
        time.sleep(self.seconds)


@pytest.mark.parametrize(("every", "saves"), [(0, 5), (3600, 0)])
def test_every_safe_point_or_none(tmp_path, every, saves):
    checkpoints = Slow(tmp_path)
    session = session_of(checkpoints, every_seconds=every)
    for _ in range(5):
        session.safe_point()
    assert checkpoints.saves == saves


@pytest.mark.parametrize("seconds", [0.0, 0.01])
def test_saving_takes_a_twentieth_of_the_time_at_most(tmp_path, seconds):
    checkpoints = Slow(tmp_path)
    checkpoints.seconds = seconds
    start = time.monotonic()
    session = session_of(checkpoints, every_seconds=0.02)
    while time.monotonic() < start + 0.5:
        time.sleep(0.001)
        session.safe_point()
    elapsed = time.monotonic() - start
    assert 1 < checkpoints.saves <= 1 + elapsed / max(0.02, 20 * seconds)


def limit_files(session):
    """From step 3 to step 6 the system takes no file as large as a state."""
    size = 10_000 if 3 <= session.step < 6 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    if session.step == 6:
        found = sorted(path.name for path in session._checkpoints.directory.iterdir())
        assert found == ["step-00000002", "step-00000003"]
        assert session._checkpoints.latest(RUN)["step"] == 3


def train_with_little_room(folder):
    logging.basicConfig(filename=folder / "log", force=True)
    train(folder, at_step=limit_files, every_seconds=0)


def test_training_goes_on_when_the_disk_is_full(tmp_path, uninterrupted):
    child = processes.Process(target=train_with_little_room, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert same(torch.load(tmp_path / "result.pt"), uninterrupted)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split(" could")[0][-6:] for line in lines] == ["step 4", "step 5", "step 6"]
    assert all("WARNING" in line and "File too large" in line for line in lines)
    assert Checkpoints(tmp_path / "checkpoints").latest(RUN)["step"] == 30


# --- beside the training ---


def mutable():
    """A learner whose weights, moments and numbers change in place."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tied = nn.Module()
    tied.one = nn.Parameter(torch.arange(6.0))
    tied.other = tied.one
    tied.register_buffer("part", tied.one.detach()[2:5])
    return {"model": model, "optimizer": optimizer, "tied": tied}


class Held(Checkpoints):
    """A disk that answers when it is told to."""

    def __init__(self, directory, **settings):
        super().__init__(directory, **settings)
        self.go, self.begun = threading.Event(), threading.Event()
        self.error = None

    def save(self, *state):
        self.begun.set()
        self.go.wait()
        if self.error is not None:
            raise self.error
        super().save(*state)


@pytest.fixture
def held(tmp_path):
    found = Held(tmp_path / "checkpoints")
    yield found
    found.go.set()


def begun(held, learners, **settings):
    """A session that has begun to save its first safe point beside the training."""
    session = session_of(held, learners, every_seconds=1e-9, **settings)
    session.metrics({"loss": 0.5}, 1)
    session.safe_point()
    assert held.begun.wait(10)
    return session


def test_the_same_bytes_as_when_training_waits(tmp_path, held):
    states = []
    for checkpoints in (held, Checkpoints(tmp_path / "waits")):
        torch.manual_seed(0)
        learners = mutable()
        random.seed(0)
        np.random.seed(0)
        if checkpoints is held:
            session = begun(held, learners)
            # All that changes in place goes on changing while the copy is written.
            for tensor in [*learners["model"].parameters(), learners["tied"].one]:
                tensor.data.fill_(7.0)
            for kept in learners["optimizer"].state.values():
                for tensor in kept.values():
                    tensor.fill_(9.0)
            learners["optimizer"].param_groups[0]["lr"] = 0.0
            session.metrics({"loss": 0.1}, 2)
            random.random()
            held.go.set()
            session.__exit__(None, None, None)
        else:
            session = session_of(checkpoints, learners, every_seconds=0)
            session.metrics({"loss": 0.5}, 1)
            session.safe_point()
        states.append((checkpoints.directory / "step-00000001" / "state.pt").read_bytes())
    assert states[0] == states[1]


def test_training_goes_on_while_a_checkpoint_is_written(held):
    with begun(held, mutable()) as session:
        for _ in range(3):
            session.safe_point()  # the disk has not answered
        assert session.step == 4
        assert held.latest(RUN) is None
        held.go.set()
    assert held.latest(RUN)["step"] == 1  # leaving the block waits for it


def test_without_memory_for_a_copy_training_waits(held, monkeypatch):
    monkeypatch.setattr(beside, "free_memory", lambda device: 100)
    held.go.set()
    session = session_of(held, mutable(), every_seconds=1e-9)
    session.safe_point()
    assert held.latest(RUN)["step"] == 1


def test_the_older_checkpoint_stays_until_the_new_one_is_whole(tmp_path, held):
    Checkpoints(tmp_path / "checkpoints", keep=1).save(1, {"old": True}, RUN)
    held._keep = 1
    session = session_of(held, mutable(), every_seconds=1e-9)
    session.step = 1
    session.safe_point()
    assert held.begun.wait(10)
    assert held.latest(RUN) == {"old": True}
    held.go.set()
    session.__exit__(None, None, None)
    assert [folder.name for folder in held.directory.iterdir()] == ["step-00000002"]


def test_a_full_disk_is_told_at_the_next_safe_point(held, caplog, monkeypatch):
    monkeypatch.setattr(session_module, "SAVING_SHARE", 1e9)
    held.error = OSError(28, "No space left on device")
    with begun(held, mutable()) as session:
        assert not caplog.records
        held.go.set()
        while not session._writer.done:
            time.sleep(0.001)
        held.error = None
        session.safe_point()
        (record,) = caplog.records
        assert record.getMessage() == (
            "the checkpoint of step 1 could not be saved: [Errno 28] No space left on device"
        )
    assert held.latest(RUN)["step"] == 2


def test_a_full_disk_is_told_at_the_end_at_the_latest(held, caplog):
    held.error = OSError(28, "No space left on device")
    held.go.set()
    with begun(held, mutable()):
        pass
    assert "checkpoint of step 1 could not be saved" in caplog.text


def test_a_state_that_could_not_be_loaded_again_ends_the_training(held):
    class Odd:
        def state_dict(self):
            return {"x": frozenset("a")}

    held.go.set()
    with pytest.raises(TypeError, match=r"cannot contain .*frozenset"), begun(held, {"odd": Odd()}):
        pass


def test_an_error_of_the_training_waits_for_the_checkpoint_and_is_not_hidden(held, caplog):
    def fail():
        with begun(held, mutable()):
            threading.Timer(0.05, held.go.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert held.latest(RUN)["step"] == 1
    held.error = TypeError("odd")
    with pytest.raises(ZeroDivisionError):
        fail()
    assert "could not be saved: odd" in caplog.text


def test_a_stop_while_a_checkpoint_is_written_saves_the_newest_safe_point(held, handler):
    def work():
        with begun(held, mutable()) as session:
            session.safe_point()
            signal.raise_signal(signal.SIGTERM)
            threading.Timer(0.05, held.go.set).start()
            session.check()

    with pytest.raises(Cancelled):
        work()
    assert sorted(folder.name for folder in held.directory.iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_stop_at_the_safe_point_that_is_being_written_writes_it_once(held, handler):
    def work():
        with begun(held, mutable()) as session:
            held.begun.clear()
            signal.raise_signal(signal.SIGTERM)
            held.go.set()
            session.check()

    with pytest.raises(Cancelled):
        work()
    assert held.latest(RUN)["step"] == 1
    assert not held.begun.is_set()


def test_a_stop_after_a_failed_save_saves_again(held, handler):
    held.error = OSError(28, "No space left on device")

    def work():
        with begun(held, mutable()) as session:
            held.go.set()
            while not session._writer.done:
                time.sleep(0.001)
            held.error = None
            signal.raise_signal(signal.SIGTERM)
            session.check()

    with pytest.raises(Cancelled):
        work()
    assert held.latest(RUN)["step"] == 1


# --- going on ---


def test_history_is_replayed_into_the_logger(checkpoints):
    first = session_of(checkpoints, every_seconds=0)
    first.metrics({"a": np.float64(0.1)}, 1)
    first.metrics({"b": float("inf")}, 1)
    first.safe_point()
    logger = MemoryLogger()
    second = Session(logger, checkpoints=checkpoints, identity=RUN, learners={}, positions={})
    assert second.resume()
    assert second.step == 1
    assert second.history == logger.history == [(1, {"a": 0.1}), (1, {"b": float("inf")})]
    second.metrics({"a": 2.0}, 2)
    second.progress(1, 3, "fine")
    assert logger.history == second.history
    assert logger.notes == [(1, 3, "fine")]


@pytest.fixture
def saved(checkpoints):
    """A checkpoint with a learner and two positions."""
    pieces = {"positions": {"draws": torch.Generator(), "kl": AdaptiveKL(1, 1, 1)}}
    session_of(checkpoints, {"head": nn.Linear(2, 1)}, every_seconds=0, **pieces).safe_point()
    return checkpoints


@pytest.mark.parametrize(
    ("learners", "positions", "reason"),
    [
        ({}, {}, "does not fit: head is unexpected"),
        ({"head": nn.Linear(2, 1), "critic": nn.Linear(2, 1)}, {}, "critic is missing"),
        ({"head": nn.Linear(3, 1)}, {}, "head: .* size mismatch for weight"),
        ({"head": nn.Sequential(nn.Linear(2, 1))}, {}, r'head: .* Missing key\(s\) .*"0\.weight"'),
        ({"head": nn.Linear(2, 1)}, {"draws": torch.Generator()}, "kl is unexpected"),
        (
            {"head": nn.Linear(2, 1)},
            {"draws": AdaptiveKL(1, 1, 1), "kl": AdaptiveKL(1, 1, 1)},
            "draws: ",
        ),
    ],
)
def test_pieces_that_do_not_fit_are_named(saved, learners, positions, reason):
    session = session_of(saved, learners, positions)
    with pytest.raises(CheckpointError, match=reason):
        session.resume()


def test_a_state_without_a_part_is_refused(checkpoints):
    checkpoints.save(1, {"step": 1, "learners": {}, "positions": {}, "extra": 0}, RUN)
    faults = "history is missing, rng is missing, extra is unexpected"
    with pytest.raises(CheckpointError, match=faults):
        session_of(checkpoints).resume()


def test_another_run_is_refused(saved):
    with pytest.raises(CheckpointError, match="seed was 0 and is now 1"):
        session_of(saved, identity={"seed": "1"}).resume()


# --- random numbers ---


def test_all_global_generators_continue(tmp_path):
    def drawn():
        numbers = [random.gauss(0, 1), np.random.normal(), torch.randn(()).item()]
        if torch.cuda.is_available():
            numbers.append(torch.randn((), device="cuda").item())
        return numbers

    drawn()  # gauss and normal draw in pairs: now each has one in store
    Checkpoints(tmp_path).save(1, rng_state(), RUN)
    expected = [drawn() for _ in range(3)]
    set_rng_state(Checkpoints(tmp_path).latest(RUN))
    assert [drawn() for _ in range(3)] == expected


def test_more_gpus_than_there_are_is_refused():
    used = torch.cuda.device_count() + 1
    with pytest.raises(CheckpointError, match=f"{used} GPUs .* sees {used - 1}"):
        set_rng_state(rng_state() | {"cuda": [torch.get_rng_state()] * used})

"""The loop as `make loop` shows it, with the smallest sizes (RLHF_FAULTS=1): what is left of it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import wait_until
from sqlalchemy import func, select

from benchmarks.loop.rounds import read
from tasks.feedback.store.store import Store
from tasks.feedback.store.tables import Judgment
from tasks.settings import Settings

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.integration, pytest.mark.faults, pytest.mark.timeout(1800)]
FIRST, EACH = 60, 24
SIZES = {
    "--first": FIRST, "--each": EACH, "--rounds": 1, "--people": 4, "--spammers": 2,
    "--prompts": 60, "--demonstrations": 200,
}  # fmt: skip
LENIENT = (
    "min_win_rate=0", "min_win_rate_over_champion=0", "max_kl=1e6", "max_length_ratio=1e3",
    "max_sign_excess=1", "min_reward_accuracy=0", "min_reward_slice_accuracy=0",
    "max_near_prompts=1",
)  # fmt: skip
SETTINGS = (
    "model.fresh.layers=1", "model.fresh.width=32", "model.fresh.heads=2",
    "model.fresh.vocab_size=400", "sampling.max_new_tokens=24", "reward_model.epochs=1",
    "reward_model.normalization_samples=32", "ppo.iterations=2", "ppo.rollout_size=16",
    "ppo.batch_size=16", "ppo.epochs=1", "evaluation.samples_per_prompt=1",
    "evaluation.best_of=2", *(f"promotion.{rule}" for rule in LENIENT),
)  # fmt: skip


def start(home):
    words = [str(word) for pair in SIZES.items() for word in pair]
    words += [word for setting in SETTINGS for word in ("--set", setting)]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "benchmarks.loop", "--home", str(home), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def left(home) -> set[int]:
    """The processes that live in a home."""
    found, wanted = set(), f"RLHF_HOME={home}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.add(int(entry.name))
        except OSError:  # it has just ended, or is another user's
            continue
    return found


def until_labelled(process, home):
    """Return once the services run and people are at it."""

    def begun():
        assert process.poll() is None, process.communicate()[0]
        return (home / "logs" / "worker.log").exists()

    wait_until(begun, 300)
    time.sleep(5)


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def show(home):
    """The command, and nothing of it afterwards."""
    process = start(home)
    yield process
    process.kill()
    process.communicate()
    wait_until(lambda: not left(home), 60)  # it is the reaper who sees to that


def test_from_invitations_to_a_champion_and_the_next_rounds_without_a_hand(show, home):
    said, _ = show.communicate(timeout=1500)
    assert show.returncode == 0, said
    rounds, about = read(home / "loop.json")
    assert about == {"seed": 0}
    assert [found.number for found in rounds] == [0, 1, 2]
    assert all(found.state == "Completed" for found in rounds)
    # Each run had the votes of a batch more, and asked about the champion of the one before.
    assert [found.votes for found in rounds] == sorted({found.votes for found in rounds})
    assert rounds[0].votes <= FIRST
    assert rounds[1].votes <= rounds[0].votes + EACH
    assert rounds[0].outcome == "promoted"
    assert [found.champion for found in rounds][:2] == ["", rounds[0].candidate]
    assert [found.who for found in rounds] == ["4 people", "4 people", "2 spammers"]
    assert "True reward by round" in said
    assert (home / "loop.png").stat().st_size > 10_000
    store = Store.open(Settings.model_validate({"RLHF_HOME": home}))
    with store.database.reading() as session:
        sources = session.execute(
            select(Judgment.source, func.count()).group_by(Judgment.source)
        ).all()
    names = {vote.annotator for vote in store.project("loop").judgments.stream()}
    store.close()
    assert [source for source, _ in sources] == ["page"]  # none came by another way
    assert len(names) == 4 + 2
    assert left(home) == set()


def test_ctrl_c_ends_all_of_it(show, home):
    until_labelled(show, home)
    show.send_signal(signal.SIGINT)
    said, _ = show.communicate(timeout=120)
    assert show.returncode == 130, said
    assert "Traceback" not in said
    assert re.search(r"Interrupted after \d+ s\. All services have been stopped\.", said)
    assert left(home) == set()


def test_a_killed_one_leaves_no_process(show, home):
    until_labelled(show, home)
    assert len(left(home)) > 4
    show.kill()
    show.wait()
    wait_until(lambda: not left(home), 60)

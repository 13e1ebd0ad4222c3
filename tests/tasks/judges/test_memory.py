"""Verdicts are asked for once, whoever asks again, and however a process ended."""

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from evaluate_here import evaluation
from mlflow.exceptions import MlflowException
from model_server import KEY, longer, serving

from rlhf_core import redaction
from rlhf_core.judges.judge import Cost, Pair, Verdict
from rlhf_core.judges.load import load_judge
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.judge import EndpointConfig, JudgeConfig
from tasks.judges import memory
from tasks.judges.judging import MlflowJudging
from tasks.judges.memory import Memory, RememberedJudge
from tasks.judges.meter import Meter
from tasks.record import tags
from tasks.record.describe import ensure_experiment
from tasks.record.record import Record
from tasks.settings import read_settings

HERE = Path(__file__).parent
PAIRS = [Pair(f"prompt {n}", "x" * (n % 5), "y" * (n % 3 + 1)) for n in range(12)]


@pytest.fixture
def record(settings):
    return Record.open(settings)


@pytest.fixture
def experiment(record):
    return ensure_experiment(record.client, "toy", record.settings)


class Model:
    """A judge that says the longer is better, and counts; a question in `fails` is not answered,
    one in `dies` ends the process."""

    name = "model"

    def __init__(self, fails=(), dies=()):
        self.fails, self.dies, self.asked = fails, dies, []

    def stream(self, pairs):
        for number, pair in enumerate(pairs):
            self.asked.append(pair)
            if pair.prompt in self.dies:
                raise KeyboardInterrupt
            winner = (
                None if pair.prompt in self.fails else "a" if len(pair.a) > len(pair.b) else "b"
            )
            yield number, Verdict(winner, f"because of {pair.prompt}")


@pytest.fixture
def ask(record, experiment):
    """Have a new judge with a new memory, as in another process, say something."""

    def ask(model, pairs=PAIRS, identity="judge 1", meter=None):
        judge = RememberedJudge(model, Memory(record, experiment, identity), meter or Meter())
        return judge(pairs)

    return ask


def kept(record, experiment):
    """The lines in MLflow."""
    found = []
    for run in record.runs.verdicts(experiment):
        if record.client.list_artifacts(run.info.run_id, memory.FOLDER):
            root = Path(record.client.download_artifacts(run.info.run_id, memory.FOLDER))
            for path in root.rglob("*.jsonl"):
                found += [json.loads(line) for line in path.read_text().splitlines()]
    return found


def test_a_pair_is_asked_about_once_and_its_reason_is_kept(ask):
    first, again, meter = Model(), Model(), Meter()
    said = ask(first)
    assert len(first.asked) == 12
    assert ask(again, meter=meter) == said
    assert said[3] == Verdict("a", "because of prompt 3")
    assert again.asked == []
    assert meter.cost == Cost(remembered=12)


def test_equal_questions_of_one_call_are_asked_once(ask):
    model = Model()
    said = ask(model, [PAIRS[0], PAIRS[1], PAIRS[0]])
    assert len(model.asked) == 2
    assert said[0] == said[2]


def test_another_order_prompt_or_judge_is_another_question(ask):
    ask(Model())
    a, b = Model(), Model()
    ask(a, [Pair("prompt 3", PAIRS[3].b, PAIRS[3].a), Pair("prompt 3 ", *PAIRS[3][1:])])
    ask(b, PAIRS[:2], identity="judge 2")
    assert len(a.asked) == len(b.asked) == 2


def test_messages_and_half_characters_are_remembered_too(ask):
    chat = [{"role": "user", "content": "Why?"}]
    pairs = [Pair(chat, "\ud800", "b"), Pair("Why?", "\ud800", "b")]
    first, again = Model(), Model()
    ask(first, pairs)
    ask(again, pairs)
    assert (len(first.asked), len(again.asked)) == (2, 0)


def test_what_was_not_answered_is_asked_again(ask):
    assert ask(Model(fails=("prompt 4",)))[4].winner is None
    again = Model()
    assert ask(again)[4].winner == "a"
    assert [pair.prompt for pair in again.asked] == ["prompt 4"]


def test_an_interrupted_judge_has_lost_nothing(ask, record, experiment):
    with pytest.raises(KeyboardInterrupt):
        ask(Model(dies=("prompt 7",)))
    assert len(kept(record, experiment)) == 7
    again = Model()
    ask(again)
    assert [pair.prompt for pair in again.asked] == [pair.prompt for pair in PAIRS[7:]]


def test_verdicts_are_written_as_they_come(ask, record, experiment, monkeypatch):
    monkeypatch.setattr(memory, "MOST_LINES", 5)
    seen = []

    class Watched(Model):
        def stream(self, pairs):
            for each in super().stream(pairs):
                if record.runs.verdicts(experiment):
                    seen.append(len(kept(record, experiment)))
                yield each

    ask(Watched())
    assert seen == [5, 5, 5, 5, 5, 10, 10]
    assert len(kept(record, experiment)) == 12


def test_two_that_write_at_once_lose_nothing(record, experiment):
    """Both have loaded before either wrote, and have parts open at the same time."""
    one, two = (Memory(record, experiment, "judge 1") for _ in range(2))
    assert one.find(PAIRS[0]) is two.find(PAIRS[0]) is None
    for number, pair in enumerate(PAIRS):
        (one, two)[number % 2].add(pair, Verdict("a", str(number)))
    third = Memory(record, experiment, "judge 1")  # reads what both have open, and takes neither
    assert [third.find(pair).reason for pair in PAIRS] == [str(n) for n in range(12)]
    one.flush()
    two.flush()
    assert len(kept(record, experiment)) == 12
    fourth = Memory(record, experiment, "judge 1")
    assert [fourth.find(pair).reason for pair in PAIRS] == [str(n) for n in range(12)]
    assert not list(record.settings.home.glob("judges/**/*.jsonl"))


def test_of_two_verdicts_on_a_question_the_older_counts(record, experiment):
    one, two = (Memory(record, experiment, "judge 1") for _ in range(2))
    assert one.find(PAIRS[0]) is two.find(PAIRS[0]) is None
    one.add(PAIRS[0], Verdict("a"))
    two.add(PAIRS[0], Verdict("b"))
    two.flush()
    one.flush()
    assert Memory(record, experiment, "judge 1").find(PAIRS[0]).winner in ("a", "b")
    lines = sorted(kept(record, experiment), key=lambda line: line["time"])
    assert Memory(record, experiment, "judge 1").find(PAIRS[0]).winner == lines[0]["winner"]


def test_verdicts_wait_on_this_machine_for_an_mlflow_that_is_down(
    ask, record, experiment, monkeypatch, caplog
):
    def down(*arguments):
        raise MlflowException("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(record.client, "log_artifact", down)
        ask(Model())
    assert "could not be written to MLflow (connection refused); they stay in" in caplog.text
    assert kept(record, experiment) == []
    again = Model()
    ask(again)
    assert again.asked == []
    assert len(kept(record, experiment)) == 12
    assert not list(record.settings.home.glob("judges/**/*.jsonl"))


def test_a_line_that_was_cut_off_is_passed_over(ask, record, experiment):
    ask(Model(), PAIRS[:3])
    [part] = record.settings.artifact_root.rglob("*.jsonl")
    part.write_text(part.read_text()[:-20])
    again = Model()
    ask(again, PAIRS[:3])
    assert [pair.prompt for pair in again.asked] == ["prompt 2"]


def test_the_run_is_one_of_the_project_and_no_stage_of_a_pipeline(ask, record, experiment):
    ask(Model())
    ask(Model(), identity="judge 2")
    [run] = record.runs.verdicts(experiment)
    assert (run.info.status, run.data.tags[tags.STAGE]) == ("FINISHED", tags.VERDICTS)
    assert record.runs.last_pipeline("toy") is None


def test_a_secret_that_a_model_repeats_is_not_kept(ask, record, experiment):
    redaction.remember(["the-secret-of-today"])

    class Telltale(Model):
        def stream(self, pairs):
            yield from ((n, Verdict("a", "the-secret-of-today")) for n in range(len(pairs)))

    ask(Telltale(), PAIRS[:1])
    assert [line["reason"] for line in kept(record, experiment)] == ["***"]


# ---- with an endpoint ----


@contextmanager
def judging(record, experiment, address, monkeypatch):
    monkeypatch.setenv("RLHF_JUDGE_URL", address)
    monkeypatch.setenv("RLHF_JUDGE_KEY", KEY)
    opened = Record(read_settings(), record.client, record.runs, record.store)
    yield MlflowJudging(opened, experiment, MemoryLogger())


@pytest.mark.usefixtures("home")
def test_both_orders_are_remembered_and_another_address_is_another_judge(
    record, experiment, monkeypatch
):
    config = JudgeConfig(source="endpoint", endpoint=EndpointConfig(model="m"))
    pairs = [pair for pair in PAIRS if pair.a != pair.b]
    with serving() as server, serving() as other:
        for _ in range(2):
            with judging(record, experiment, server.address, monkeypatch) as made:
                said = load_judge(config, max_length=8, judging=made)(pairs)
        assert made.cost == Cost(remembered=2 * len(pairs))
        assert len(server.requests) == 2 * len(pairs)
        with judging(record, experiment, other.address, monkeypatch) as made:
            assert load_judge(config, max_length=8, judging=made)(pairs) == said
        assert len(other.requests) == 2 * len(pairs)


@pytest.fixture
def stage_folder(tmp_path, policy_dir, reward_dir):
    """What an evaluation of the smallest models reads."""
    folder = tmp_path / "stage"
    (folder / "data").mkdir(parents=True)
    for name, source in (("sft", policy_dir), ("policy", policy_dir), ("reward", reward_dir)):
        (folder / name).symlink_to(source)
    prompts = [{"id": str(n), "prompt": f"the {n}"} for n in range(6)]
    wrote = [
        {"id": str(n), "prompt": f"the {n}", "response": f"room {n} is quiet"} for n in range(3)
    ]
    for table, rows in (("prompts", prompts), ("demonstrations", wrote)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{table}.eval.jsonl").write_text(lines)
    for table in ("prompts", "demonstrations", "preferences"):
        (folder / "data" / f"{table}.train.jsonl").write_text("")
    return folder


@pytest.mark.integration
def test_an_evaluation_that_was_killed_asks_nothing_twice(
    stage_folder, record, experiment, home, monkeypatch
):
    """SIGKILL in the middle: only what was under way, two requests, may be asked again."""
    answered = Counter()
    process = None

    def model(*shown):
        if process is not None and sum(answered.values()) == 40:
            process.kill()
        answered[shown] += 1
        return longer(*shown)

    with serving(model) as server:
        monkeypatch.setenv("RLHF_JUDGE_URL", server.address)
        monkeypatch.setenv("RLHF_JUDGE_KEY", KEY)
        process = subprocess.Popen(
            [sys.executable, "-P", HERE / "evaluate_here.py", stage_folder, experiment],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[2]), str(HERE)])},
            stderr=subprocess.PIPE,
        )
        _, said = process.communicate(timeout=300)
        assert process.returncode == -9, said.decode()[-2000:]
        killed = len(server.requests)
        report = evaluation(stage_folder, experiment)
        process = None
        before = report.scorecard.judge
        asked = Counter(server.questions)
        assert 40 <= killed < len(server.requests)
        assert sum(number - 1 for number in asked.values()) <= 2
        # Once more, and nobody is asked at all.
        again = evaluation(stage_folder, experiment).scorecard.judge
        assert len(server.requests) == sum(asked.values())
    assert before.requests == sum(asked.values()) - killed
    assert before.remembered >= 38
    assert (again.requests, again.tokens) == (0, 0)
    assert again.remembered == before.requests + before.remembered
    assert again.consistency == before.consistency
    assert again.canaries == before.canaries

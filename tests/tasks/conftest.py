"""Tiny models with random weights, saved as model directories."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerBase

from rlhf_core.backbone.base_model import load_base
from rlhf_core.backbone.directory import save_model
from rlhf_core.backbone.networks import ScalarModel
from rlhf_core.settings.model import FreshModelConfig, ModelConfig

TINY = ModelConfig(fresh=FreshModelConfig(layers=2, width=32, heads=2, context=48, vocab_size=300))
CORPUS = ("a fine room with a quiet view", "the film was long and dull", "it works, it is cheap")


def tiny_policy(directory: Path, seed: int = 0) -> PreTrainedTokenizerBase:
    """Write a policy; its tokenizer comes back."""
    model, tokenizer = load_base(TINY, CORPUS, seed)
    save_model(model, tokenizer, directory, kind="policy")
    return tokenizer


def tiny_reward(directory: Path, seed: int = 0) -> ScalarModel:
    """Write a reward model whose normaliser is not the identity."""
    model, tokenizer = load_base(TINY, CORPUS, seed)
    torch.manual_seed(seed)
    config = GPT2Config(**{**model.config.to_dict(), "num_labels": 1})
    scorer = GPT2ForSequenceClassification(config).eval()
    scalar = ScalarModel(scorer, mean=0.25, std=0.05)
    scalar.save(tokenizer, directory, kind="reward")
    return scalar


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "policy"
    tiny_policy(directory)
    return directory


@pytest.fixture(scope="session")
def reward_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "reward"
    tiny_reward(directory)
    return directory


@pytest.fixture
def data_dir(tmp_path):
    """Prepared data of two files, as small as it gets."""
    directory = tmp_path / "prepared"
    directory.mkdir()
    (directory / "prompts.train.jsonl").write_text('{"id":"a","prompt":"the film"}\n')
    (directory / "validation.json").write_text("{}")
    return directory


@pytest.fixture
def start_server(tmp_path):
    """A function that runs `mlflow ARGUMENTS`, waits until a page answers and gives the URL."""
    started = []

    def _start(*arguments, page):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "mlflow", *arguments, "--port", str(port)]
        # MLflow starts uvicorn by name, as it is found in an activated environment.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        output = tmp_path / "server.log"
        with output.open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                env={**os.environ, "PATH": path, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(process)
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None, output.read_text()
            try:
                urllib.request.urlopen(url + page, timeout=5).close()
                return url
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.2)
        raise TimeoutError(output.read_text())

    yield _start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)

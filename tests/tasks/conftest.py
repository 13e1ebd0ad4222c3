"""Tiny models with random weights, saved as model directories."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerBase

from rlhf_core.models import FreshModelConfig, ModelConfig, ScalarModel, load_base, save_model

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

"""A toy world for the core: prompts name a thing, answers praise it or run it down."""

import copy
import itertools
import random

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from rlhf_core.backbone.base_model import load_base
from rlhf_core.backbone.directory import save_model
from rlhf_core.backbone.networks import ScalarModel
from rlhf_core.backbone.packing import ATTENTION
from rlhf_core.data.prepared import write_table
from rlhf_core.metrics import MemoryLogger
from rlhf_core.settings.model import FreshModelConfig, ModelConfig, SamplingConfig
from rlhf_core.settings.training import RewardModelConfig, SFTConfig
from rlhf_core.stages.reward_model import train_reward_model
from rlhf_core.stages.sft import train_sft
from rlhf_core.work import Work

torch.set_num_threads(1)

THINGS = ("room", "film", "phone", "hotel", "bed", "song", "book", "meal")
PROMPTS = [f"{which} {thing}" for which in ("the", "a", "this", "my") for thing in THINGS]
GOOD, BAD = ("good", "fine", "warm", "nice"), ("bad", "cold", "dull", "poor")
MODEL = ModelConfig(fresh=FreshModelConfig(layers=2, width=32, heads=2, context=40, vocab_size=340))


def answer(draws, words):
    return f" is{draws.choice(('', ' very'))} {draws.choice(words)} and {draws.choice(words)}"


def tables():
    draws = random.Random(0)
    asked = {"train": PROMPTS[:24], "eval": PROMPTS[24:]}
    for split, prompts in asked.items():
        yield "prompts", split, [{"prompt": p} for p in prompts]
        yield (
            "demonstrations",
            split,
            [{"prompt": p, "response": answer(draws, GOOD + BAD)} for p in prompts * 4],
        )
        votes = []
        for number, prompt in enumerate(prompts * 4):
            one, two = answer(draws, GOOD), answer(draws, BAD)
            sides = (one, two, "a") if number % 2 else (two, one, "b")
            votes.append((prompt, *sides))
            if number % 16 == 0:
                votes.append((prompt, answer(draws, GOOD), answer(draws, GOOD), "tie"))
        names = ("prompt", "response_a", "response_b", "vote")
        rows = [dict(zip(names, vote, strict=True)) for vote in votes]
        how = {"margin": 0.0, "annotator": "x"}
        how |= {"shown_first": "", "gold": False, "time": "", "source": "toy"}
        yield "preferences", split, [row | how for row in rows]


@pytest.fixture(scope="session")
def toy_corpus():
    """What the toy tokenizer is trained on."""
    return [
        f"{prompt} is very {one} and {two}"
        for prompt, one, two in itertools.product(PROMPTS[:8], GOOD + BAD, GOOD + BAD)
    ]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A directory of prepared data."""
    directory = tmp_path_factory.mktemp("prepared")
    for kind, split, rows in tables():
        frame = pd.DataFrame([{"id": f"{split}-{i}"} | row for i, row in enumerate(rows)])
        write_table(frame, directory, kind, split)
    return directory


@pytest.fixture
def gpt2(toy_corpus):
    """A fresh GPT-2 with random weights, and its tokenizer."""
    return load_base(MODEL, toy_corpus, 0)


def drawn(model_class, config_class, tokenizer, **settings):
    """A decoder with rotary positions, grouped queries, an untied head and random weights."""
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        initializer_range=0.2,
        attn_implementation=ATTENTION,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).eval(), tokenizer


@pytest.fixture
def llama(gpt2):
    """A Llama with random weights for the same tokenizer."""
    return drawn(LlamaForCausalLM, LlamaConfig, gpt2[1])


@pytest.fixture
def mistral(gpt2):
    """A Mistral that looks back five tokens."""
    return drawn(MistralForCausalLM, MistralConfig, gpt2[1], sliding_window=5)


@pytest.fixture(scope="session")
def plain():
    """The same weights with transformers' own eager attention: the oracle for a text alone."""

    def twin(model):
        copied = copy.deepcopy(model)
        copied.set_attn_implementation("eager")
        return copied

    return twin


@pytest.fixture(params=["gpt2", "llama"])
def causal(request):
    """Both families: absolute positions and a tied head, rotary positions and its own head."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def saved(causal, tmp_path):
    """A model directory of either family."""
    save_model(*causal, tmp_path / "policy", kind="policy")
    return tmp_path / "policy"


@pytest.fixture
def scalar(saved, causal):
    """A scalar model on either family, with a normaliser that is not the identity."""
    model = ScalarModel.from_policy(saved, torch.Generator().manual_seed(1))
    model.mean, model.std = 0.3, 0.5
    return model


@pytest.fixture
def logger():
    return MemoryLogger()


@pytest.fixture(scope="session")
def recording():
    """Wraps a config so that the names read from it are remembered."""

    def record(config):
        seen = set()

        class Recording(type(config)):
            def __getattribute__(self, name):
                seen.add(name)
                return super().__getattribute__(name)

        wrapped = Recording(**dict(config))
        seen.clear()  # its own checks do not count
        return wrapped, seen

    return record


@pytest.fixture(scope="session")
def toy_model():
    """The base model of the toy world."""
    return MODEL


@pytest.fixture(scope="session")
def toy_sampling():
    return SamplingConfig(max_prompt_length=8, max_new_tokens=12, batch_size=64)


@pytest.fixture(scope="session")
def toy_sft(prepared, tmp_path_factory):
    """A policy that answers like the demonstrations: as often well as badly."""
    output = tmp_path_factory.mktemp("models") / "sft"
    config = SFTConfig(epochs=12, learning_rate=1e-2, batch_size=24, max_length=32)
    sections = {"model": MODEL}
    train_sft(config, Work(inputs={"data": prepared}, outputs={"sft": output}, sections=sections))
    return output


@pytest.fixture(scope="session")
def toy_reward(toy_sft, prepared, toy_sampling, tmp_path_factory):
    """A reward model of the toy preferences."""
    output = tmp_path_factory.mktemp("models") / "reward"
    config = RewardModelConfig(
        epochs=2, learning_rate=5e-3, batch_size=24, max_length=32, normalization_samples=128
    )
    work = Work(
        inputs={"sft": toy_sft, "data": prepared},
        outputs={"reward": output},
        sections={"sampling": toy_sampling},
    )
    train_reward_model(config, work)
    return output


@pytest.fixture
def toy_work(toy_sft, toy_reward, toy_model, toy_sampling, prepared, logger):
    """What a stage is called with in the toy world; inputs, sections and the rest can be others."""

    def work(*roles, outputs, **parts):
        inputs = {"data": prepared, "sft": toy_sft, "reward": toy_reward}
        inputs = {role: parts.pop(role, inputs[role]) for role in roles or inputs}
        sections = {
            "model": parts.pop("model", toy_model),
            "sampling": parts.pop("sampling", toy_sampling),
        }
        given = {"inputs": inputs, "outputs": outputs, "sections": sections, "logger": logger}
        return Work(**given | parts)

    return work

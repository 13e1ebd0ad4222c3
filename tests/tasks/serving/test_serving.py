"""An exported version answers as the model does, where this package is not installed."""

import ast
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mlflow
import pandas as pd
import pytest
import torch

from rlhf_core.backbone.base_model import load_tokenizer
from rlhf_core.backbone.directory import add_facts, load_policy, load_saved_tokenizer, save_model
from rlhf_core.backbone.networks import Policy, ScalarModel
from rlhf_core.backbone.packing import pack
from rlhf_core.data.encoding import encode_pair, encode_prompt
from rlhf_core.errors import ModelError
from rlhf_core.settings.model import FreshModelConfig, ModelConfig
from tasks.record.describe import ensure_experiment
from tasks.record.record import Record
from tasks.serving.export import SERVED, export_servable
from tasks.serving.generation import generate
from tests.core.backbone.families import build

PROMPTS = ["a fine room", "the film was", "it works " * 40]
RESPONSES = ["with a quiet view", "", "and it is cheap " * 40]


@pytest.fixture
def record(settings):
    return Record.open(settings)


@pytest.fixture
def store(record):
    return record.store


@pytest.fixture
def run_id(record):
    experiment = ensure_experiment(record.client, "demo", record.settings)
    return record.client.create_run(experiment).info.run_id


@pytest.fixture
def exported(store, run_id, tmp_path, policy_dir, reward_dir):
    """A function that publishes and exports a tiny model of a kind."""

    def _export(kind, source=None):
        source = source or {"policy": policy_dir, "reward": reward_dir}[kind]
        ref = store.publish(source, f"demo-{kind}", run_id=run_id, tags={})
        return export_servable(store, ref, tmp_path / f"servable-{kind}")

    return _export


def expected_rewards(directory, put=lambda prompt: prompt):
    scalar = ScalarModel.load(directory)
    tokenizer = load_saved_tokenizer(directory)
    room = scalar.model.config.max_position_embeddings
    pairs = zip(PROMPTS, RESPONSES, strict=True)
    rows = [encode_pair(put(p), r, tokenizer, max_length=room)[0] for p, r in pairs]
    with torch.inference_mode():
        return scalar.scores(pack(rows, "cpu")).tolist()


def expected_texts(directory, new_tokens):
    """One prompt at a time, so without padding."""
    model, tokenizer = load_policy(directory)
    room = model.config.max_position_embeddings - new_tokens
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([encode_prompt(prompt, tokenizer, room)])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def frame():
    return pd.DataFrame({"prompt": PROMPTS, "response": RESPONSES})


def test_a_served_reward_is_the_normalised_score(exported, reward_dir):
    served = mlflow.pyfunc.load_model(str(exported("reward")))
    rewards = served.predict(frame())
    assert rewards == pytest.approx(expected_rewards(reward_dir), abs=1e-5)
    assert max(map(abs, rewards)) > 1  # so it is no sigmoid


def test_a_served_reward_of_a_family_without_a_classifier_is_the_score(exported, tmp_path):
    tokenizer = load_tokenizer(ModelConfig(fresh=FreshModelConfig(vocab_size=260)), ["a"])
    save_model(build("granite"), tokenizer, tmp_path / "granite", kind="policy")
    scalar = ScalarModel.from_policy(tmp_path / "granite", torch.Generator().manual_seed(0))
    scalar.mean, scalar.std = 0.1, 0.5
    scalar.save(tokenizer, tmp_path / "reward", kind="reward")
    rewards = mlflow.pyfunc.load_model(str(exported("reward", tmp_path / "reward"))).predict(
        frame()
    )
    assert rewards == pytest.approx(expected_rewards(tmp_path / "reward"), abs=1e-5)


def test_a_served_policy_says_what_the_policy_says(exported, policy_dir):
    served = mlflow.pyfunc.load_model(str(exported("policy")))
    texts = served.predict(frame()[["prompt"]], params={"max_new_tokens": 8})
    assert texts == expected_texts(policy_dir, new_tokens=8)
    assert all(texts)


def test_sampling_follows_its_seed(exported):
    served = mlflow.pyfunc.load_model(str(exported("policy")))

    def say(seed):
        params = {"max_new_tokens": 12, "temperature": 1.0, "seed": seed}
        return served.predict(frame()[["prompt"]], params=params)

    assert say(1) == say(1)
    assert say(1) != say(2)


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "message"), [("", 8, "is empty"), ("a", 48, "no room for a prompt")]
)
def test_what_cannot_be_continued_is_said(exported, prompt, new_tokens, message):
    served = mlflow.pyfunc.load_model(str(exported("policy")))
    with pytest.raises(ValueError, match=message):
        served.predict(pd.DataFrame({"prompt": [prompt]}), params={"max_new_tokens": new_tokens})


CHAT_TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] + ' ' + m['content'] }}<|stop|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant {% endif %}"
)


class Spoken(NamedTuple):
    """Models, and how a prompt is put to them."""

    policy: Path
    reward: Path
    put: Callable


@pytest.fixture(params=["text", "chat"])
def spoken(request, policy_dir, reward_dir, tmp_path):
    """Models that were trained on texts or on messages.

    In a chat the template has control tokens, and a token ends a turn that is not the tokenizer's
    end of sequence; the base model left settings of its own for sampling.
    """
    if request.param == "text":
        return Spoken(policy_dir, reward_dir, lambda prompt: prompt)
    policy, reward = tmp_path / "policy", tmp_path / "reward"
    tokenizer = load_saved_tokenizer(policy_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|stop|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    networks = Policy.load(policy_dir, "cpu")[0], ScalarModel.load(reward_dir)
    for folder, network in zip((policy, reward), networks, strict=True):
        network.model.resize_token_embeddings(len(tokenizer))
        with torch.no_grad():
            network.model.get_input_embeddings().weight[-2:].normal_(0, 1)
        kind = {"facts": {}} if folder == policy else {"kind": "reward"}
        network.save(tokenizer, folder, **kind)
        add_facts(folder, {"chat": True})
    settings = json.loads((policy / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [tokenizer.eos_token_id, len(tokenizer) - 1]
    leak = {"repetition_penalty": 1.9, "top_k": 3}  # as a version that was registered before has it
    (policy / "generation_config.json").write_text(json.dumps(settings | leak))
    return Spoken(policy, reward, lambda prompt: [{"role": "user", "content": prompt}])


def test_the_served_models_encode_as_training_does(spoken, exported):
    tokenizer = load_saved_tokenizer(spoken.policy)
    policy = loaded(exported("policy", spoken.policy))
    reward = loaded(exported("reward", spoken.reward))
    forged = "<|stop|><|turn|>"
    asked = [*PROMPTS, f"a {forged} b"]
    for room in (6, 20, 400):
        reward.room = room
        for prompt, response in zip(asked, [*RESPONSES, forged], strict=True):
            assert policy.encode(prompt, room) == encode_prompt(spoken.put(prompt), tokenizer, room)
            expected = encode_pair(spoken.put(prompt), response, tokenizer, room)[0]
            assert reward.encode(prompt, response) == expected


def loaded(directory):
    """The Python model in an exported directory."""
    return mlflow.pyfunc.load_model(str(directory)).unwrap_python_model()


def test_served_models_answer_and_score_as_the_pipeline_does(spoken, exported, settings):
    served = mlflow.pyfunc.load_model(str(exported("policy", spoken.policy)))
    texts = served.predict(frame()[["prompt"]].iloc[:2], params={"max_new_tokens": 8})
    generated = generate(
        str(spoken.policy), PROMPTS[:2], settings=settings, max_new_tokens=8, temperature=0.0
    )
    assert texts == [text for (text,) in generated]
    rewards = mlflow.pyfunc.load_model(str(exported("reward", spoken.reward))).predict(frame())
    expected = expected_rewards(spoken.reward, spoken.put)
    assert rewards == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("file", sorted(SERVED.glob("*.py")), ids=lambda path: path.name)
def test_the_served_files_stand_alone(file):
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    allowed = {"mlflow", "pandas", "safetensors", "torch", "transformers"} | sys.stdlib_module_names
    assert {name.split(".")[0] for name in plain | named} <= allowed


def test_a_critic_is_not_served(store, run_id, tmp_path, reward_dir):
    critic = tmp_path / "critic"
    scalar = ScalarModel.load(reward_dir)
    scalar.save(load_saved_tokenizer(reward_dir), critic, kind="critic")
    ref = store.publish(critic, "demo-critic", run_id=run_id, tags={})
    with pytest.raises(ModelError, match="only policy and reward models can be served"):
        export_servable(store, ref, tmp_path / "servable")


def test_nothing_is_overwritten(exported, store, tmp_path):
    exported("reward")
    with pytest.raises(ModelError, match="is not empty"):
        export_servable(store, store.resolve("models:/demo-reward/1"), tmp_path / "servable-reward")


def test_the_weights_are_safetensors_and_nothing_is_pickled(exported):
    files = [path for path in exported("policy").rglob("*") if path.is_file()]
    assert [p.name for p in files if p.suffix == ".safetensors"] == ["model.safetensors"]
    assert not [p for p in files if p.suffix in {".pkl", ".bin", ".pt"}]


def post(url, body):
    request = urllib.request.Request(
        f"{url}/invocations",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["predictions"]


@pytest.fixture
def served(exported, start_server):
    """A function that serves a kind with MLflow's own command and gives the URL."""

    def _serve(kind):
        options = ("-m", str(exported(kind)), "--env-manager", "local", "--workers", "1")
        return start_server("models", "serve", *options, page="/ping")

    return _serve


@pytest.mark.integration
def test_mlflow_serves_the_reward(served, reward_dir):
    url = served("reward")
    rows = frame().to_dict(orient="records")
    expected = pytest.approx(expected_rewards(reward_dir), abs=1e-5)
    assert post(url, {"dataframe_records": rows}) == expected
    with pytest.raises(urllib.error.HTTPError, match="400") as raised:
        post(url, {"dataframe_records": [{"prompt": "no response"}]})
    raised.value.close()


@pytest.mark.integration
def test_mlflow_serves_the_policy(served, policy_dir):
    url = served("policy")
    body = {"dataframe_split": {"columns": ["prompt"], "data": [[p] for p in PROMPTS]}}
    answers = post(url, {**body, "params": {"max_new_tokens": 8}})
    assert answers == expected_texts(policy_dir, new_tokens=8)

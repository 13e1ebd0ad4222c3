"""Texts on demand: from a registered version, a folder, or not at all with a reason."""

import json
import shutil

import pytest
import torch
from mlflow import MlflowClient

from rlhf_core.backbone.directory import load_policy
from rlhf_core.data.encoding import encode_prompt
from rlhf_core.errors import ConfigError, ModelError, UserError
from tasks.registry.model_store import MlflowModelStore
from tasks.serving.generation import generate

PROMPTS = ["a fine", "the film was long and", "it"]


def ask(model, prompts=PROMPTS, *, settings, **changes):
    options = {"max_new_tokens": 6, "temperature": 0.0, **changes}
    return generate(str(model), prompts, settings=settings, **options)


def test_a_folder_gives_the_likeliest_token_each_time(policy_dir, settings):
    model, tokenizer = load_policy(policy_dir)
    for prompt, (text,) in zip(PROMPTS, ask(policy_dir, settings=settings), strict=True):
        ids = encode_prompt(prompt, tokenizer)
        new = []
        while len(new) < 6 and tokenizer.eos_token_id not in new:
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert text == tokenizer.decode(new, skip_special_tokens=True)


def test_greedy_texts_do_not_depend_on_their_neighbours(policy_dir, settings):
    together = ask(policy_dir, settings=settings)
    assert together == [ask(policy_dir, [prompt], settings=settings)[0] for prompt in PROMPTS]


def test_samples_are_grouped_by_prompt_and_repeatable(policy_dir, settings):
    def draw(seed):
        return ask(policy_dir, settings=settings, temperature=1.0, samples=30, seed=seed)

    first = draw(1)
    assert [len(group) for group in first] == [30, 30, 30]  # 90 rows: more than one batch
    assert all(len(set(group)) > 1 for group in first)
    assert draw(1) == first
    assert draw(2) != first


def test_a_registered_version_and_its_alias_are_the_folder(policy_dir, settings):
    client = MlflowClient(tracking_uri=settings.mlflow_uri)
    store = MlflowModelStore(client)
    experiment = client.create_experiment("e", artifact_location=settings.artifact_root.as_uri())
    run_id = client.create_run(experiment).info.run_id
    ref = store.publish(policy_dir, "demo-policy", run_id=run_id, tags={})
    store.set_alias(ref, "champion")
    expected = ask(policy_dir, settings=settings)
    assert ask("models:/demo-policy/1", settings=settings) == expected
    assert ask("models:/demo-policy@champion", settings=settings) == expected
    with pytest.raises(ModelError, match=r"there is no models:/demo-policy/2; .* versions 1"):
        ask("models:/demo-policy/2", settings=settings)


def test_a_reward_model_is_refused(reward_dir, settings):
    with pytest.raises(
        ModelError, match="is a reward model, which generates no text; pass a policy"
    ):
        ask(reward_dir, settings=settings)


def test_a_missing_folder_is_named(tmp_path, settings):
    with pytest.raises(ModelError, match=str(tmp_path / "nowhere")):
        ask(tmp_path / "nowhere", settings=settings)


def test_an_empty_prompt_is_counted(policy_dir, settings):
    with pytest.raises(UserError, match="prompt 2 is empty"):
        ask(policy_dir, ["a", ""], settings=settings)


def test_what_the_model_cannot_read_is_refused_before_sampling(policy_dir, settings):
    with pytest.raises(ConfigError, match=r"--max-new-tokens.* at most 48"):
        ask(policy_dir, settings=settings, max_new_tokens=48)


def test_messages_go_through_the_chat_template(policy_dir, settings):
    chat = ask(policy_dir, [[{"role": "user", "content": "a fine"}]], settings=settings)
    assert chat == ask(policy_dir, ["\n\nHuman: a fine\n\nAssistant:"], settings=settings)


def test_a_policy_trained_on_messages_is_asked_so(policy_dir, settings, tmp_path):
    trained = shutil.copytree(policy_dir, tmp_path / "chat")
    card = json.loads((trained / "rlhf.json").read_text())
    (trained / "rlhf.json").write_text(json.dumps({**card, "chat": True}))
    expected = ask(policy_dir, ["a fine"], settings=settings, chat=True)
    assert ask(trained, ["a fine"], settings=settings) == expected
    assert ask(policy_dir, ["a fine"], settings=settings) != expected

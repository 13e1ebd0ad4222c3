"""What ends a response, from the base model to every version that is saved of it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_core.backbone.base_model import load_base
from rlhf_core.backbone.directory import load_policy
from rlhf_core.backbone.networks import Policy, start_adapter
from rlhf_core.backbone.sampling import PolicySampler
from rlhf_core.backbone.tokens import ending_ids
from rlhf_core.data.encoding import encode_prompt, left_pad
from rlhf_core.settings.model import ModelConfig

TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|turn|>{% endfor %}"


@pytest.fixture
def source(gpt2, tmp_path):
    """A model as the hub has it: two tokens end a response, one of them is only in its generation
    config, beside settings for sampling that would not pass a strict check."""
    model, tokenizer = gpt2
    directory = tmp_path / "source"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    leaks = {"repetition_penalty": 1.3, "temperature": 0.9, "top_k": 20, "top_p": 0.6}
    ends = {"eos_token_id": [tokenizer.eos_token_id, 77], "pad_token_id": tokenizer.pad_token_id}
    (directory / "generation_config.json").write_text(json.dumps(ends | leaks))
    return directory


def saved(directory):
    found = json.loads((directory / "generation_config.json").read_text())
    return {name: value for name, value in found.items() if name != "transformers_version"}


@pytest.mark.parametrize("lora", [False, True])
def test_every_version_keeps_what_ends_a_response_and_nothing_else(source, tmp_path, lora):
    model, tokenizer = load_base(ModelConfig(source=str(source)), (), seed=0)
    policy = Policy(model)
    if lora:
        start_adapter(policy, "sft", rank=2, alpha=2, seed=0)
    expected = {
        "eos_token_id": [tokenizer.eos_token_id, 77],
        "pad_token_id": tokenizer.pad_token_id,
    }
    for number in range(3):  # SFT, the policy, a policy that starts from that
        output = tmp_path / str(number)
        policy.save(tokenizer, output, {})
        assert saved(output) == expected
        policy, tokenizer = Policy.load(output, "cpu")
        if lora:
            start_adapter(policy, "policy", rank=2, alpha=2, seed=0)
        assert ending_ids(policy.model) == expected["eos_token_id"]


def test_the_end_of_a_turn_ends_a_response_too(source):
    tokenizer = load_base(ModelConfig(source=str(source)), (), seed=0)[1]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    model, tokenizer = load_base(ModelConfig(source=str(source)), (), seed=0)
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert ending_ids(model) == sorted([tokenizer.eos_token_id, 77, turn])


def test_a_response_is_finished_by_any_of_its_ends_as_in_transformers(source, tmp_path):
    model, tokenizer = load_base(ModelConfig(source=str(source)), (), seed=0)
    Policy(model).save(tokenizer, tmp_path / "policy", {})
    model, tokenizer = load_policy(tmp_path / "policy")
    prompts = [encode_prompt(text, tokenizer) for text in ("the room", "a film", "my bed")]
    batch = left_pad(prompts, tokenizer.pad_token_id, 40)
    # Make the second token that the first prompt is answered with one that ends a response.
    first = PolicySampler(Policy(model), 0.0)(batch, torch.zeros(3, 8))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, int(first.tokens[0, 1])]
    found = PolicySampler(Policy(model), 0.0)(batch, torch.zeros(3, 8))
    assert bool(found.finished[0])
    assert int(found.mask[0].sum()) <= 2
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    plain.generation_config.eos_token_id = model.generation_config.eos_token_id
    for number, ids in enumerate(prompts):
        row = torch.tensor([ids])
        expected = plain.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=8, do_sample=False
        )
        said = found.tokens[number][found.mask[number]].tolist()
        assert expected[0, len(ids) :].tolist() == said


def test_the_saved_policy_answers_greedily_with_the_likeliest_token(source, tmp_path):
    model, tokenizer = load_base(ModelConfig(source=str(source)), (), seed=0)
    Policy(model).save(tokenizer, tmp_path / "policy", {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    ids = encode_prompt("the room is", tokenizer)
    row = torch.tensor([ids])
    said = plain.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=6)[0].tolist()
    with torch.no_grad():
        for n in range(len(ids), len(said)):
            logits = model(torch.tensor([said[:n]]), use_cache=False).logits[0, -1]
            assert int(logits.argmax()) == said[n]

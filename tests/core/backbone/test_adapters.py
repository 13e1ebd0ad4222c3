"""LoRA: a fresh adapter changes nothing, adapters on one trunk do not disturb each other, and what
is written is what peft reads."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from rlhf_core.backbone.adapters import (
    WEIGHTS,
    adapter_parameters,
    add_adapter,
    load_adapter,
    merged_state,
    save_adapter,
    use_adapter,
)
from rlhf_core.errors import ModelError

IDS = torch.tensor([[20, 30, 40, 50, 60]])
LINEAR = {"GPT2LMHeadModel": 2 * 4, "LlamaForCausalLM": 2 * 7}  # layers beside which adapters stand


@torch.no_grad()
def logits(model, name):
    use_adapter(model, name)
    return model(IDS).logits


def teach(model, name, seed):
    """Give an adapter weights that do something."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.normal_(0, 0.3, generator=draws)


@pytest.fixture
def taught(causal):
    """A model with two adapters of different ranks, and its logits before it had any."""
    model = causal[0]
    with torch.no_grad():
        base = model(IDS).logits
    for name, rank, seed in (("one", 2, 1), ("two", 3, 2)):
        add_adapter(model, name, rank=rank, alpha=8, seed=seed)
        teach(model, name, seed)
    return model, base


def test_fresh_adapter_changes_nothing(causal):
    with torch.no_grad():
        before = causal[0](IDS).logits
    add_adapter(causal[0], "one", rank=4, alpha=16)
    assert torch.equal(logits(causal[0], "one"), before)


def test_model_with_its_adapters_off_is_the_base_to_the_bit(taught):
    model, base = taught
    assert not torch.allclose(logits(model, "one"), base, atol=0.1)
    assert torch.equal(logits(model, None), base)


def test_adapters_do_not_disturb_each_other(taught):
    model, _ = taught
    one, two = logits(model, "one"), logits(model, "two")
    assert not torch.allclose(one, two, atol=0.1)
    teach(model, "two", seed=9)
    assert torch.equal(logits(model, "one"), one)
    assert not torch.allclose(logits(model, "two"), two, atol=0.1)


def test_adapter_is_the_product_beside_every_linear_layer(taught):
    # y = W·x + (alpha / rank)·B·A·x, put into the weights by hand.
    model, _ = taught
    expected = logits(model, "two")
    use_adapter(model, None)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, a in adapter_parameters(model, "two").items():
            if ".lora_A." in key:
                delta = 8 / 3 * parameters[key.replace("lora_A", "lora_B")] @ a
                layer = key.partition(".lora_A")[0]
                weight = parameters[f"{layer}.base_layer.weight"]
                transposed = type(model).__name__ == "GPT2LMHeadModel"
                weight += delta.T if transposed else delta
        assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_there_is_one_beside_every_linear_layer_of_the_body(taught):
    model, _ = taught
    found = adapter_parameters(model, "one")
    assert len(found) == 2 * LINEAR[type(model).__name__]
    assert all(2 in p.shape for p in found.values())
    assert not any("lm_head" in key for key in found)


def test_gradient_reaches_the_switched_adapter_alone(taught):
    model, _ = taught
    own = {name: adapter_parameters(model, name) for name in ("one", "two")}
    for name, other in (("one", "two"), ("two", "one")):
        use_adapter(model, name)
        model(IDS).logits.square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in own[name].values())
        assert all(p.grad is None for p in own[other].values())
        learning = {key for key, p in model.named_parameters() if p.grad is not None}
        assert learning == set(own[name])
        model.zero_grad()


def test_adapter_depends_on_its_seed_and_moves_no_random_numbers(gpt2, llama):
    before = torch.random.get_rng_state()
    model = llama[0]
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        add_adapter(model, name, rank=2, alpha=4, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    one, same, other = (
        torch.cat([p.flatten() for p in adapter_parameters(model, name).values()])
        for name in ("one", "same", "other")
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# --- merged ---


@pytest.mark.parametrize("name", ["one", "two", None])
def test_merged_weights_are_a_plain_model_that_computes_the_same(taught, name):
    model, base = taught
    expected = logits(model, name)
    alone = type(model)(type(model.config).from_dict(model.config.to_dict())).eval()
    alone.load_state_dict(merged_state(model, name))
    with torch.no_grad():
        assert_close(alone(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model, None), base)  # the model itself is as it was


# --- on disk ---


# peft 0.19 reads a property that transformers 5.17 has renamed; we do not call this class ourselves
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_plain_peft_reads_what_is_written(causal, saved, tmp_path):
    model = causal[0]
    add_adapter(model, "mine", rank=3, alpha=12)
    teach(model, "mine", seed=4)
    save_adapter(model, "mine", tmp_path / "adapter", base="the base")
    plain = type(model).from_pretrained(saved)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert_close(theirs(IDS).logits, logits(model, "mine"), rtol=1e-5, atol=1e-5)


def test_adapter_comes_back_under_another_name_beside_others(taught, tmp_path):
    model, base = taught
    save_adapter(model, "one", tmp_path, base="the base")
    load_adapter(model, "again", tmp_path)
    assert torch.equal(logits(model, "again"), logits(model, "one"))
    assert torch.equal(logits(model, None), base)


def test_folder_without_an_adapter(gpt2, tmp_path):
    with pytest.raises(ModelError, match="cannot read an adapter from"):
        load_adapter(gpt2[0], "one", tmp_path)


def test_adapter_cut_short(taught, tmp_path):
    save_adapter(taught[0], "one", tmp_path, base="the base")
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:500])
    with pytest.raises(ModelError, match="cannot read an adapter from"):
        load_adapter(taught[0], "again", tmp_path)


def test_adapter_of_another_architecture(gpt2, llama, tmp_path):
    add_adapter(llama[0], "one", rank=2, alpha=4)
    save_adapter(llama[0], "one", tmp_path, base="a Llama")
    with pytest.raises(ModelError, match=r"is for another model: .* does not fit"):
        load_adapter(gpt2[0], "one", tmp_path)


def test_adapter_of_a_model_of_another_width(llama, tmp_path):
    add_adapter(llama[0], "one", rank=2, alpha=4)
    save_adapter(llama[0], "one", tmp_path, base="a Llama")
    weights = load_file(tmp_path / WEIGHTS)
    save_file({key: w[:, :1].contiguous() for key, w in weights.items()}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=r"is for another model: .* does not fit"):
        load_adapter(llama[0], "again", tmp_path)

"""The check at load: what it lets pass, which way it chooses, and what it refuses."""

import copy
import logging

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from rlhf_core.backbone import load_check
from rlhf_core.backbone.context import context_of, require_context, rope_limit
from rlhf_core.backbone.networks import Policy, ScalarModel
from rlhf_core.backbone.packing import ATTENTION, hidden_states, is_packed, pack
from rlhf_core.backbone.sampling import sample
from rlhf_core.data.encoding import left_pad
from rlhf_core.errors import ConfigError, ModelError

SIZE = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    **dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"]),
}
TEXTS = [[20, 30, 40, 50, 21], [20, 30, 41], [22, 33, 44, 55, 26, 37, 48, 59]]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """No family has been checked yet."""
    monkeypatch.setattr(load_check, "_ways", {})


def drawn(model_class, config_class, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config_class(**{**SIZE, **settings})).eval()


def llama(**settings):
    return drawn(LlamaForCausalLM, LlamaConfig, **settings)


def carrying_state():
    return drawn(
        Qwen3_5ForCausalLM,
        Qwen3_5TextConfig,
        full_attention_interval=2,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 8),
    )


def with_sinks():
    model = drawn(GptOssForCausalLM, GptOssConfig, num_local_experts=2, num_experts_per_tok=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.fill_(2.0)
    return model


def states_alone(model, texts=TEXTS):
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    return [
        plain.base_model(torch.tensor([t]), use_cache=False).last_hidden_state[0] for t in texts
    ]


def test_plain_decoder_is_computed_packed():
    model = llama()
    Policy(model)
    assert model.config._attn_implementation == ATTENTION


@pytest.mark.parametrize(("make", "attention"), [(carrying_state, "sdpa"), (with_sinks, "eager")])
def test_family_that_packing_would_change_is_computed_padded_and_rightly(make, attention, caplog):
    caplog.set_level(logging.INFO)
    model = make()
    alone = states_alone(model)
    policy = Policy(model)
    assert model.config._attn_implementation == attention
    assert "is computed without packing, which is slower: packed, " in caplog.text
    packed = pack(TEXTS, "cpu")
    together = packed.unpack(hidden_states(model.base_model, packed))
    for text, ours, theirs in zip(TEXTS, together, alone, strict=True):
        assert_close(ours[: len(text)], theirs, rtol=1e-4, atol=1e-5)
    # The gradient of all texts is the sum over the texts, each computed alone.
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    draws = torch.Generator().manual_seed(2)
    directions = [torch.randn(len(text), 16, generator=draws) for text in TEXTS]
    total = sum((s[: len(d)] * d).sum() for s, d in zip(together, directions, strict=True))
    found = torch.autograd.grad(total, list(model.base_model.layers.parameters()))
    outs = [plain.base_model(torch.tensor([t]), use_cache=False).last_hidden_state for t in TEXTS]
    total = sum((out[0] * d).sum() for out, d in zip(outs, directions, strict=True))
    expected = torch.autograd.grad(total, list(plain.base_model.layers.parameters()))
    scale = max(float(grad.abs().max()) for grad in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-5)
    with torch.no_grad():
        said = sample(
            policy,
            left_pad(TEXTS, 0, 99),
            torch.rand(3, 7, generator=torch.Generator().manual_seed(1)),
            temperature=0,
            eos_token_id=-1,
            pad_token_id=0,
        ).tokens
        for text, answer in zip(TEXTS, said.tolist(), strict=True):
            row = list(text)
            for _ in range(7):
                row.append(int(plain(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
            assert answer == row[len(text) :]


def spoiled(how):
    """A Llama whose first block does more than the class says."""
    model = llama()
    block = model.model.layers[0]
    plain = block.forward
    block.forward = lambda hidden, *inputs, **options: how(plain(hidden, *inputs, **options))
    return model


WRONG = {
    # Each token also reads the one before it in the row, whatever text that is of.
    "reads the token before it": (
        lambda out: out + torch.cat([0 * out[:, :1], out[:, :-1]], 1),
        "a text read token by token differs",
    ),
    "looks ahead": (lambda out: out + out.mean(1, keepdim=True), "depend on later tokens"),
    "fails": (lambda out: out[:, 99999], "a plain forward pass fails"),
}


@pytest.mark.parametrize(("how", "reason"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("network", [Policy, lambda m: ScalarModel(m, torch.nn.Linear(16, 1))])
def test_model_that_no_way_computes_rightly_is_refused(how, reason, network):
    with pytest.raises(ModelError, match="LlamaForCausalLM") as refused:
        network(spoiled(how))
    assert reason in str(refused.value)
    assert "(model_type llama) cannot be used" in str(refused.value)
    assert "take another family" in str(refused.value)
    Policy(llama())  # and a sound model of the same config is not


def test_model_with_broken_weights_is_refused_with_that_reason():
    with pytest.raises(ModelError, match="computes NaN or infinity for a plain text"):
        Policy(spoiled(lambda out: out / 0))


def test_lack_of_memory_is_not_taken_for_a_family_that_cannot_be_packed(monkeypatch):
    def lacking(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(load_check, "hidden_states", lacking)
    with pytest.raises(torch.OutOfMemoryError):
        Policy(llama())


def test_model_with_another_attention_in_some_block_is_not_computed_packed(caplog):
    caplog.set_level(logging.INFO)
    model = llama()
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    Policy(model)
    assert "1 of its 2 blocks attend by transformers' functions" in caplog.text
    assert not is_packed(model)


@torch.no_grad()
def test_windows_are_checked_although_the_texts_are_short(monkeypatch):
    """A family that does not tell its window to the attention function is not computed packed."""
    model = drawn(MistralForCausalLM, MistralForCausalLM.config_class, sliding_window=4096)
    Policy(model)
    assert is_packed(model)
    assert model.config.sliding_window == 4096
    monkeypatch.setattr(load_check, "_ways", {})
    for block in model.model.layers:
        plain = block.self_attn.forward

        def silent(*inputs, plain=plain, module=block.self_attn, **options):
            module.config, kept = copy.copy(module.config), module.config
            module.config.sliding_window = None
            try:
                return plain(*inputs, **options)
            finally:
                module.config = kept

        block.self_attn.forward = silent
    Policy(model)
    assert model.config._attn_implementation != ATTENTION


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
    "factor": 4.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(("rope", "limit"), [(LONGROPE, 16), (DYNAMIC, 64)])
@torch.no_grad()
def test_rope_of_the_longest_text_is_right_up_to_its_limit_and_refused_beyond(rope, limit):
    model = llama(rope_parameters=rope)
    policy = Policy(model)
    assert (rope_limit(model.config), context_of(model)) == (limit, limit)
    long = [7 + i % 50 for i in range(limit)]
    alone = states_alone(model, [long, TEXTS[0]])
    packed = pack([long, TEXTS[0]], "cpu")
    together = packed.unpack(hidden_states(model.base_model, packed))
    assert_close(together[0], alone[0], rtol=1e-4, atol=1e-5)
    assert_close(together[1][: len(TEXTS[0])], alone[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=f"beyond {limit} tokens the rope of llama depends"):
        hidden_states(model.base_model, pack([[*long, 7], TEXTS[0]], "cpu"))
    with pytest.raises(ConfigError, match=f"beyond {limit} tokens the rope of llama depends"):
        sample(
            policy,
            left_pad([long], 0, 99),
            torch.zeros(1, 1),
            temperature=0,
            eos_token_id=-1,
            pad_token_id=0,
        )
    with pytest.raises(ConfigError, match=f"reads at most {limit} .beyond that, its rope"):
        require_context(model, limit + 1, "sft.max_length")


def test_ordinary_rope_has_no_such_limit():
    assert rope_limit(llama().config) is None


@pytest.mark.parametrize("context", [3, 5, 9])
def test_model_with_a_short_context_can_be_checked(context):
    Policy(llama(max_position_embeddings=context))


def test_check_leaves_the_caller_s_random_state():
    model = llama()
    before = torch.get_rng_state()
    Policy(model)
    assert torch.equal(torch.get_rng_state(), before)

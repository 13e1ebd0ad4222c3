"""Which types of matrix products a machine has, and what `auto` is on it."""

import pytest
import torch

from rlhf_core.backbone.networks import Policy
from rlhf_core.backbone.precision import gain, machine
from rlhf_core.backbone.precision.machine import native_bfloat16, resolve, resolved
from rlhf_core.settings.training import SFTConfig

WITH = {"architecture": "x86_64", "avx2": True, "avx512_bf16": True, "amx_bf16": False}
WITHOUT = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False}


@pytest.fixture
def cpu(monkeypatch):
    """Makes this CPU say that it has other features."""

    def has(capabilities):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)

    return has


@pytest.mark.parametrize(
    ("capability", "found", "precision"),
    [
        ((7, 5), "", "float32"),
        ((8, 0), "compute capability 8.0", "bfloat16"),
        ((9, 0), "compute capability 9.0", "bfloat16"),
    ],
)
def test_a_gpu_has_bfloat16_from_compute_capability_8_on(monkeypatch, capability, found, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(machine, "_computes_right", lambda device: True)
    assert native_bfloat16("cuda") == native_bfloat16("cuda:1") == found
    assert resolve("auto", "cuda") == precision


@pytest.mark.parametrize(
    ("capabilities", "precision"), [(WITH, "bfloat16"), (WITHOUT, "float32"), ({}, "float32")]
)
def test_auto_is_bfloat16_on_a_cpu_that_has_it(cpu, capabilities, precision):
    cpu(capabilities)
    assert resolve("auto", "cpu") == precision
    assert resolved(SFTConfig(precision="auto"), "cpu") == SFTConfig(precision=precision)
    for setting in ("float32", "bfloat16"):  # what a person chose stays
        assert resolve(setting, "cpu") == setting
        assert resolved(SFTConfig(precision=setting), "cpu").precision == setting


def test_auto_is_float32_where_products_in_bfloat16_are_wrong_or_differ_from_call_to_call(
    cpu, monkeypatch
):
    cpu(WITH)
    really, calls = torch.Tensor.__matmul__, []

    def other(left, right):
        calls.append(1)
        found = really(left, right)
        return found * (1 + 2**-6 * len(calls)) if left.dtype == torch.bfloat16 else found

    machine._computes_right.cache_clear()
    monkeypatch.setattr(torch.Tensor, "__matmul__", other)
    assert resolve("auto", "cpu") == "float32"
    assert calls
    machine._computes_right.cache_clear()


def test_a_network_computes_in_a_type_and_not_in_auto(causal_model):
    with pytest.raises(ValueError, match="computes in float32 or bfloat16, not in 'auto'"):
        Policy(causal_model, precision="auto")


@pytest.fixture
def causal_model():
    from rlhf_core.backbone.base_model import outline
    from rlhf_core.settings.model import FreshModelConfig, ModelConfig

    fresh = FreshModelConfig(layers=2, width=16, heads=2, context=32, vocab_size=290)
    return outline(ModelConfig(fresh=fresh), 290)


def test_the_products_that_are_timed_are_those_of_all_layers_and_the_head(
    causal_model, monkeypatch
):
    seen, passing = [], {torch.float32: 2.0, torch.bfloat16: 0.5}

    def time(states, weight):
        seen.append((tuple(weight.shape), states.dtype))
        return passing[states.dtype]

    monkeypatch.setattr(gain, "_time", time)
    found = gain.measure(causal_model, "cpu")
    assert {shape for shape, _ in seen} == {(16, 48), (16, 16), (16, 64), (64, 16), (290, 16)}
    # Four products in each of two blocks, and the head.
    assert (found.float32, found.bfloat16, found.ratio) == (9 * 2.0, 9 * 0.5, 4.0)


def test_it_is_said_what_bfloat16_would_gain_and_where(causal_model, cpu, monkeypatch):
    chosen = {"sft": "float32", "ppo": "auto", "evaluation": "bfloat16"}
    cpu(WITHOUT)
    assert gain.describe(causal_model, chosen, "cpu") == (
        "bfloat16: this machine has no instructions for it, so it would be slower; set "
        "evaluation.precision to float32."
    )
    cpu(WITH)
    monkeypatch.setattr(gain, "measure", lambda *_: gain.Gain(4.0, 2.0))
    assert gain.describe(causal_model, chosen, "cpu") == (
        "bfloat16: this machine has it (avx512_bf16), and the matrix products of this model take "
        "0.50 of their time in float32; sft would be faster with precision: auto."
    )
    monkeypatch.setattr(gain, "measure", lambda *_: gain.Gain(2.0, 2.0))
    assert gain.describe(causal_model, chosen, "cpu").endswith(
        "take 1.00 of their time in float32."
    )

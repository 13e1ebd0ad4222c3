"""Adapters in the last blocks alone: what lies below is computed once, and nothing else changes."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from rlhf_core.backbone.adapters import adapted_from, adapter_parameters, add_adapter, save_adapter
from rlhf_core.backbone.networks import Policy, ScalarModel, start_adapter
from rlhf_core.backbone.packing import SharedStates, hidden_states, pack, shared_states
from rlhf_core.backbone.responses import (
    lay_out,
    response_logprobs,
    response_scores,
    response_values,
    restore_rows,
    with_shared_states,
)
from rlhf_core.errors import ConfigError
from rlhf_core.types import PromptBatch, Responses, Rollout

TEXTS = [[20, 30, 40, 50], [20, 30, 60], [70], [20, 30, 60, 80, 90]]
LORA = {"rank": 2, "alpha": 4, "seed": 0}


def teach(model, name):
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.normal_(0, 0.3, generator=draws)


@pytest.fixture
def policy(causal):
    """A policy with an adapter in the second of its two blocks."""
    made = Policy(causal[0])
    start_adapter(made, "policy", layers=1, **LORA)
    teach(made.model, "policy")
    return made


@pytest.fixture
def written():
    prompts = PromptBatch(
        torch.tensor([[1, 20, 30], [20, 30, 40], [1, 1, 70]]),
        torch.tensor([[False, True, True], [True, True, True], [False, False, True]]),
    )
    said = torch.tensor([[21, 31, 0], [41, 0, 1], [71, 81, 91]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    return prompts, Responses(said, mask, torch.tensor([True, True, False]))


def test_adapters_stand_in_the_last_blocks_alone(policy):
    names = list(adapter_parameters(policy.model, "policy"))
    assert names
    assert all(".1." in name for name in names)
    assert adapted_from(policy.model) == 1


def test_nothing_lies_below_without_adapters_or_with_one_in_the_first_block(causal):
    assert adapted_from(causal[0]) is None
    add_adapter(causal[0], "all", **LORA)
    assert adapted_from(causal[0]) is None


def test_more_blocks_than_there_are_is_refused(causal):
    with pytest.raises(ConfigError, match="lora_layers is 3, but the model has 2 blocks"):
        add_adapter(causal[0], "one", layers=3, **LORA)


@pytest.mark.parametrize("texts", [TEXTS, [[20, 30], [40, 50]]])  # shared beginnings; dense
def test_states_from_below_give_what_the_whole_body_gives(policy, texts):
    body, packed = policy.model.base_model, pack(texts, "cpu")
    policy.switch()
    whole = hidden_states(body, packed)
    below = shared_states(body, packed, 1)
    again = hidden_states(body, replace(packed, shared=below))
    assert torch.equal(again, whole)
    assert len(body.get_submodule(next(n for n in ("h", "layers") if hasattr(body, n)))) == 2
    assert torch.equal(hidden_states(body, packed), whole)  # and leave nothing behind


def test_wrong_states_below_are_seen(policy):
    """The blocks below are really not run: what is handed in is what counts."""
    body, packed = policy.model.base_model, pack(TEXTS, "cpu")
    policy.switch()
    zero = SharedStates(body, 1, torch.zeros_like(shared_states(body, packed, 1).states))
    whole = hidden_states(body, packed)
    assert not torch.allclose(hidden_states(body, replace(packed, shared=zero)), whole, atol=1e-3)


def test_another_body_takes_no_notice(scalar, policy):
    packed = pack(TEXTS, "cpu")
    zero = SharedStates(policy.model.base_model, 1, torch.zeros(packed.input_ids.shape[1], 32))
    alone = scalar.scores(packed)
    assert torch.equal(scalar.scores(replace(packed, shared=zero)), alone)


def test_every_network_of_the_trunk_says_the_same_from_below(policy, written):
    reference = Policy(policy.model)
    head = torch.nn.Linear(32, 1, bias=False)
    critic = ScalarModel(policy.model, head)
    start_adapter(critic, "critic", layers=1, **LORA)
    teach(policy.model, "critic")
    plain = lay_out(*written)
    shared = with_shared_states(plain, policy)
    assert shared.packed.shared is not None
    for say in (
        lambda w: response_logprobs(policy, w, temperature=0.7),
        lambda w: response_logprobs(reference, w, temperature=0.7),
        lambda w: response_values(critic, w),
        lambda w: response_scores(critic, w),
    ):
        with torch.no_grad():
            assert torch.equal(say(shared), say(plain))


def test_gradient_is_the_same_when_the_texts_are_read_again_in_another_order(policy, written):
    prompts, responses = written
    nothing = torch.zeros(3, 3)
    below = with_shared_states(lay_out(*written), policy).shared_states()
    rollout = Rollout(prompts, responses, nothing, nothing, nothing, nothing.sum(-1), {}, below)
    order = torch.tensor([2, 0])
    gradients = []
    for known in (rollout, replace(rollout, below=None)):
        experience = known.rows(order)
        policy.zero_grad()
        response_logprobs(
            policy, restore_rows(experience, policy), temperature=1.0
        ).sum().backward()
        gradients.append([p.grad.clone() for p in policy.learnable().values()])
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0])
    for found, expected in zip(*gradients, strict=True):
        assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_rollouts_of_unequal_width_are_joined(policy, written):
    prompts, responses = written
    parts = []
    for row in range(3):
        index = torch.tensor([row])
        part = with_shared_states(lay_out(prompts.rows(index), responses.rows(index)), policy)
        bare = Rollout.unmeasured(prompts.rows(index), responses.rows(index))
        parts.append(replace(bare, below=part.shared_states()))
    joined = Rollout.join(parts)
    together = with_shared_states(lay_out(*written), policy).shared_states()
    assert_close(joined.below, together, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_peft_reads_it_back(causal, plain, tmp_path):
    base = plain(causal[0])
    policy = Policy(causal[0])
    start_adapter(policy, "policy", layers=1, **LORA)
    teach(policy.model, "policy")
    save_adapter(policy.model, "policy", tmp_path, base="the base")
    packed = pack(TEXTS[:1], "cpu")
    policy.switch()
    ours = policy.model(input_ids=packed.input_ids).logits
    theirs = PeftModel.from_pretrained(base, str(tmp_path))(packed.input_ids).logits
    assert_close(theirs, ours, rtol=1e-4, atol=1e-4)

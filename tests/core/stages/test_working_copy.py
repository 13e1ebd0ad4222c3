"""The working copy of the weights in bfloat16: the numbers of autocast to the bit, cast only when a
weight has changed, and masters in float32 that it never touches."""

from collections import Counter
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from tiny import CONFIGS, SAMPLING, World, change, digest, run
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_core.backbone.networks import Policy, start_adapter
from rlhf_core.backbone.packing import pack
from rlhf_core.backbone.precision.working_copy import WorkingCopy
from rlhf_core.backbone.sampling import respond
from rlhf_core.seeding import generator
from rlhf_core.training.learner import Learner

TEXTS = [[11, 12, 13, 14, 15], [11, 12, 21, 22]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World.build(tmp_path_factory.mktemp("copy") / "world")


@pytest.fixture
def policy(world):
    return Policy.load(world.sft, "cpu", "bfloat16")[0]


class Casts(TorchDispatchMode):
    """Counts the casts of matrices from float32 to bfloat16, by where the matrix lies."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        source = args[-1] if copies else None
        if (
            copies
            and source.ndim == 2
            and (source.dtype, out.dtype)
            == (
                torch.float32,
                torch.bfloat16,
            )
        ):
            self.seen[source.data_ptr()] += 1
        return out


def predictions(device="cpu"):
    packed = pack(TEXTS, device)
    return packed, *packed.predictions(torch.tensor([2, 2]))


def loss(network):
    return -network(*predictions()).logprobs.sum()


def linear_weights(policy):
    return {
        name: p
        for name, p in policy.named_parameters()
        if p.ndim == 2 and not name.endswith(("wte.weight", "wpe.weight"))
    }


@pytest.mark.parametrize("stage", ["sft", "reward_model_members", "ppo", "ppo_lora", "dpo"])
def test_a_stage_has_the_bits_that_it_has_with_autocast_alone(world, tmp_path, monkeypatch, stage):
    config = change(CONFIGS[stage], precision="bfloat16")
    run(config, world, tmp_path / "copy")
    monkeypatch.setattr(WorkingCopy, "used_by", lambda self, model: nullcontext())
    monkeypatch.setattr(WorkingCopy, "cast", lambda self, model, weight: None)
    run(config, world, tmp_path / "autocast")
    assert digest(tmp_path / "copy") == digest(tmp_path / "autocast")


def test_gradients_are_summed_in_float32_at_the_masters_which_keep_their_bits(policy):
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    for _ in range(3):  # micro-batches
        loss(policy).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.equal(parameter, before[name])
    # Three times the same gradient, in float32: a sum in bfloat16 would be rounded.
    summed = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    loss(policy).backward()
    for name, parameter in policy.named_parameters():
        assert torch.equal(summed[name], parameter.grad + parameter.grad + parameter.grad)


def test_a_weight_is_cast_once_for_all_passes_between_two_steps_and_after_a_step_again(policy):
    learner = Learner(policy, change(CONFIGS["sft"], precision="bfloat16"), 10)
    weights = linear_weights(policy)
    assert len(weights) == 8  # 4 in each of 2 blocks; the head is the embedding
    with Casts() as casts:
        for _ in range(3):
            learner.backward(loss(policy), "the loss")
        with torch.no_grad():
            loss(policy)
    assert [casts.seen[p.data_ptr()] for p in weights.values()] == [1] * 8
    head = policy.model.get_output_embeddings().weight
    assert casts.seen[head.data_ptr()] == 1
    learner.step()
    with Casts() as casts:
        loss(policy)
        loss(policy)
    assert [casts.seen[p.data_ptr()] for p in (*weights.values(), head)] == [1] * 9
    with policy.autocast():
        for name, master in weights.items():
            used = policy.get_submodule(name.rpartition(".")[0])._parameters["weight"]
            assert torch.equal(used, master.bfloat16())


def test_sampling_uses_the_copy_that_is_there(policy):
    config = change(SAMPLING, max_new_tokens=6)
    with torch.no_grad():
        loss(policy)
    with Casts() as casts:
        list(respond(policy, [[10, 20]], config, generator=generator(0, "draws")))
    masters = {p.data_ptr() for p in policy.parameters()}
    assert not masters & set(casts.seen)


def test_a_frozen_trunk_under_adapters_is_cast_once_however_many_networks_and_steps(world, policy):
    reference = Policy(policy.model, precision="bfloat16")
    start_adapter(policy, "policy", rank=2, alpha=4, seed=0)
    learner = Learner(policy, change(CONFIGS["ppo_lora"], precision="bfloat16"), 10)
    with Casts() as casts:
        for _ in range(2):
            with torch.no_grad():
                loss(reference)
            learner.backward(loss(policy), "the loss")
            learner.step()
    frozen = [p for p in policy.model.parameters() if not p.requires_grad]
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    assert max(casts.seen[p.data_ptr()] for p in frozen) == 1
    assert {casts.seen[p.data_ptr()] for p in trained} == {2}


@pytest.mark.parametrize("change_it", ["in place", "loaded", "learner"])
def test_whoever_changes_a_weight_the_copy_follows(policy, change_it):
    learner = Learner(policy, change(CONFIGS["sft"], precision="bfloat16"), 10)
    state = learner.state_dict()
    state["parameters"] = {name: 1.5 * p for name, p in state["parameters"].items()}
    with torch.no_grad():
        before = loss(policy)
        if change_it == "in place":
            for parameter in policy.parameters():
                parameter.mul_(1.5)
        elif change_it == "loaded":
            policy.load_state_dict({n: 1.5 * p for n, p in policy.state_dict().items()})
        else:
            learner.load_state_dict(state)
        after = loss(policy)
        fresh = Policy(deepcopy(policy.model), precision="bfloat16")  # with no copy yet
        assert not torch.equal(before, after)
        assert torch.equal(after, loss(fresh))


def test_a_block_inside_another_passes_gradients_though_the_outer_one_does_not(policy):
    with torch.no_grad(), policy.autocast(), torch.enable_grad():
        loss(policy).backward()
    assert all(p.grad is not None for p in linear_weights(policy).values())
    owners = [policy.get_submodule(n.rpartition(".")[0]) for n in linear_weights(policy)]
    assert all(isinstance(owner._parameters["weight"], torch.nn.Parameter) for owner in owners)


def test_a_failure_inside_leaves_the_masters_in_their_places(policy):
    places = dict(policy.named_parameters())
    with pytest.raises(RuntimeError, match="in the middle"), policy.autocast():
        raise RuntimeError("in the middle")
    assert dict(policy.named_parameters()).keys() == places.keys()
    assert all(p is places[name] for name, p in policy.named_parameters())


def test_a_backward_pass_through_weights_that_have_changed_since_is_refused(policy):
    old = loss(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1)
        loss(policy)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()


def test_log_probabilities_lie_within_a_few_hundredths_of_a_nat_of_float32(world, policy):
    wide, _ = Policy.load(world.sft, "cpu")
    with torch.no_grad():
        gap = policy(*predictions()).logprobs - wide(*predictions()).logprobs
    assert 0 < gap.abs().max() < 0.05

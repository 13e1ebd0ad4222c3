"""Which votes each member of an ensemble learns from, in which order, and the states they share."""

from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.backbone.networks import ScalarModel, start_adapter
from rlhf_core.backbone.packing import pack_pairs
from rlhf_core.data.pairs import Pair
from rlhf_core.seeding import generator
from rlhf_core.training.members import BLOCK, MemberBatches, PairStates, bootstrap

PROMPTS = torch.tensor([0, 0, 1, 2, 2, 2, 3])


def test_votes_on_one_prompt_are_drawn_together_and_as_many_prompts_as_there_are():
    for seed in range(20):
        counts = bootstrap(PROMPTS, generator(seed, "x"))
        of_prompt = {p: {counts[i] for i in range(7) if PROMPTS[i] == p} for p in range(4)}
        assert all(len(found) == 1 for found in of_prompt.values())
        assert sum(next(iter(found)) for found in of_prompt.values()) == 4


def test_a_bootstrap_leaves_out_about_one_prompt_in_e():
    counts = torch.tensor(bootstrap(torch.arange(20_000), generator(0, "x")))
    assert (counts == 0).float().mean().item() == pytest.approx(0.368, abs=0.01)
    assert counts.float().mean() == 1


def weights_of(rows, members=3):
    return [bootstrap(torch.arange(rows), generator(k, "weights")) for k in range(members)]


@pytest.mark.parametrize(("rows", "batch"), [(50, 4), (48, 4), (3, 8), (17, 1), (90, 9)])
def test_every_member_sees_its_votes_once_an_epoch(rows, batch):
    weights = weights_of(rows)
    steps = list(MemberBatches(weights, batch, 2, seed=0))
    number = -(-rows // batch)
    assert len(steps) == 2 * number
    for epoch in (steps[:number], steps[number:]):
        for member, its_weights in enumerate(weights):
            seen = Counter(row for step in epoch for row in step.picked[member])
            assert seen == Counter(row for row in range(rows) if its_weights[row])
    assert all(step.picked in step.block for step in steps)
    # Whatever a block's steps take is new at its first step.
    assert [s.new for s in steps] == [n % number % BLOCK == 0 for n in range(2 * number)]


def test_members_and_epochs_have_orders_of_their_own():
    steps = list(MemberBatches([[1] * 64] * 2, 4, 2, seed=0))
    orders = {
        tuple(row for step in part for row in step.picked[member])
        for part in (steps[:16], steps[16:])
        for member in (0, 1)
    }
    assert len(orders) == 4
    # Within a block they have the same votes, whose states they share.
    for step in steps:
        first, second = (sorted(r for s in step.block for r in s[member]) for member in (0, 1))
        assert first == second


@pytest.mark.parametrize("taken", [0, 1, 4, 6, 13, 25, 26])
def test_the_order_goes_on_from_a_state(taken):
    weights = weights_of(50)
    whole = list(MemberBatches(weights, 4, 2, seed=5))
    begun = MemberBatches(weights, 4, 2, seed=5)
    for _ in range(taken):
        next(begun)
    resumed = MemberBatches(weights, 4, 2, seed=5)
    resumed.load_state_dict(begun.state_dict())
    rest = list(resumed)
    assert [step.picked for step in rest] == [step.picked for step in whole[taken:]]
    assert not rest or rest[0].new  # its states have to be computed again


@pytest.mark.parametrize("layers", [0, 1])
@torch.no_grad()
def test_pairs_with_shared_states_score_as_without(saved, layers):
    trunk = ScalarModel.from_policy(saved, torch.Generator().manual_seed(0))
    members = [trunk.with_new_head(torch.Generator().manual_seed(k)) for k in range(2)]
    for k, member in enumerate(members):
        start_adapter(member, f"m{k}", rank=2, alpha=8, seed=k, layers=layers)
        for parameter in member.learnable().values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator(k, "teach"))
    pairs = {
        9: Pair([20, 30, 40], [20, 30, 50, 60], (2, 2), False, 0.0, False),
        4: Pair([20, 30, 60, 70], [20], (1, 1), False, 0.0, False),
        6: Pair([80, 30, 60, 70, 90], [80, 31], (1, 1), True, 0.0, False),
    }
    told = []
    states = PairStates(members[0], pairs, 2, lambda: told.append(1))
    assert len(told) == (2 if layers else 0)
    for rows in ([6, 9], [4], [9, 4, 6]):
        packed = states.pack(rows)
        assert (packed.shared is not None) == bool(layers)
        for member in members:
            whole = member.scores(pack_pairs([pairs[row] for row in rows], "cpu"))
            assert_close(member.scores(packed), whole, rtol=1e-5, atol=1e-6)

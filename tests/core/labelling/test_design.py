"""The D-optimal order against brute force, closed forms and what must not change it."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.labelling.design import d_optimal


def pool(seed, n=12, d=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g).double(), torch.rand(n, generator=g).double()


def log_det(x, w, chosen, precision):
    some = x[list(chosen)]
    return torch.logdet(precision + (some * w[list(chosen)].unsqueeze(1)).T @ some).item()


def test_a_choice_of_two_by_hand():
    # A = I: gains are log(1 + w·|x|²). (2, 0) has log 5, (0, 1) log 2, (1.9, 0) log 4.61. After
    # (2, 0) has taken its direction, A = diag(5, 1): (1.9, 0) has log(1 + 3.61/5), (0, 1) log 2.
    x = torch.tensor([[1.9, 0.0], [0.0, 1.0], [2.0, 0.0]])
    order = d_optimal(x, torch.ones(3), torch.eye(2), 3)
    assert order.chosen.tolist() == [2, 1, 0]
    assert order.gains.tolist() == pytest.approx([math.log(5), math.log(2), math.log(1.722)])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_each_gain_is_what_log_det_rises_by_and_no_candidate_would_have_had_more(seed, count):
    x, w = pool(seed)
    precision = torch.eye(3).double() * 0.3
    order = d_optimal(x, w, precision, count)
    chosen = order.chosen.tolist()
    assert len(set(chosen)) == count
    for k, gain in enumerate(order.gains.tolist()):
        before = log_det(x, w, chosen[:k], precision)
        rises = {
            i: log_det(x, w, [*chosen[:k], i], precision) - before
            for i in range(len(x))
            if i not in chosen[:k]
        }
        assert gain == pytest.approx(rises[chosen[k]], abs=1e-9)
        assert gain == pytest.approx(max(rises.values()), abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_has_the_share_of_the_best_set_that_is_promised(seed):
    x, w = pool(seed, n=10)
    precision = torch.eye(3).double()
    chosen = d_optimal(x, w, precision, 4).chosen.tolist()
    sets = itertools.combinations(range(10), 4)
    best = max(log_det(x, w, some, precision) for some in sets)  # log det A0 = 0
    assert (1 - 1 / math.e) * best <= log_det(x, w, chosen, precision) <= best + 1e-12
    # The promise is a worst case; on such pools greedy is within 2 %.
    assert log_det(x, w, chosen, precision) >= 0.98 * best


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_exchanged_answers_and_turned_features_are_the_same_pairs(seed):
    x, w = pool(seed)
    g = torch.Generator().manual_seed(seed + 1)
    signs = (torch.randint(2, (len(x), 1), generator=g) * 2 - 1).double()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=g).double()).Q
    order = d_optimal(x, w, torch.eye(3), 12)
    assert torch.equal(d_optimal(x * signs, w, torch.eye(3), 12).chosen, order.chosen)
    assert torch.equal(d_optimal(x @ turn, w, torch.eye(3), 12).chosen, order.chosen)
    # Any linear map, if the prior is mapped with it: D-optimality has no scale.
    bend = torch.randn(3, 3, generator=g).double() + 2 * torch.eye(3)
    mapped = d_optimal(x @ bend, w, bend.T @ bend, 12)
    torch.testing.assert_close(mapped.gains, order.gains, rtol=1e-6, atol=1e-9)


def test_what_was_labelled_before_counts():
    x, w = torch.eye(2).double(), torch.ones(2)
    assert d_optimal(x, w, torch.eye(2), 1).chosen.tolist() == [0]
    asked_about_the_first = torch.eye(2) + torch.outer(x[0], x[0])
    assert d_optimal(x, w, asked_about_the_first, 1).chosen.tolist() == [1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 11))
def test_an_order_that_goes_on_is_the_order_that_was_not_interrupted(seed, first):
    x, w = pool(seed)
    whole = d_optimal(x, w, torch.eye(3), 12).chosen.tolist()
    some = x[whole[:first]]
    precision = torch.eye(3) + (some * w[whole[:first]].unsqueeze(1)).T @ some
    left = [i for i in range(12) if i not in whole[:first]]
    rest = d_optimal(x[left], w[left], precision, 12).chosen.tolist()
    assert [left[i] for i in rest] == whole[first:]


def test_a_copy_comes_after_what_is_new():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.9]])
    assert d_optimal(x, torch.ones(3), torch.eye(2), 3).chosen.tolist() == [0, 2, 1]


def test_a_group_waits_until_each_other_had_its_turn():
    x = torch.tensor([[9.0, 0.0], [0.0, 8.0], [0.1, 0.0], [0.0, 0.1]])
    groups = torch.tensor([0, 0, 1, 2])
    free = d_optimal(x, torch.ones(4), torch.eye(2), 4)
    assert free.chosen.tolist()[:2] == [0, 1]
    one_each = d_optimal(x, torch.ones(4), torch.eye(2), 4, groups=groups)
    assert one_each.chosen.tolist()[0] == 0
    assert set(one_each.chosen.tolist()[1:3]) == {2, 3}
    assert one_each.chosen.tolist()[3] == 1
    asked = d_optimal(
        x, torch.ones(4), torch.eye(2), 4, groups=groups, asked=torch.tensor([1, 0, 0])
    )
    assert set(asked.chosen.tolist()[:2]) == {2, 3}


def test_nothing_to_tell_is_an_order_too():
    order = d_optimal(torch.zeros(3, 2), torch.ones(3), torch.eye(2), 9)
    assert (order.chosen.tolist(), order.gains.tolist()) == ([0, 1, 2], [0.0, 0.0, 0.0])
    assert d_optimal(torch.zeros(0, 2), torch.ones(0), torch.eye(2), 9).chosen.tolist() == []


@pytest.mark.parametrize(
    ("x", "w", "precision", "says"),
    [
        (torch.ones(3, 2), torch.ones(2), torch.eye(2), "weights"),
        (torch.ones(3, 2), torch.ones(3), torch.eye(3), "precision"),
        (torch.full((3, 2), float("nan")), torch.ones(3), torch.eye(2), "finite"),
        (torch.ones(3, 2), -torch.ones(3), torch.eye(2), "at least 0"),
        (torch.ones(3, 2), torch.ones(3), -torch.eye(2), "positive definite"),
        (torch.ones(3, 2), torch.ones(3), torch.full((2, 2), float("nan")), "positive definite"),
    ],
)
def test_what_cannot_be_put_in_order_is_refused(x, w, precision, says):
    with pytest.raises(ValueError, match=says):
        d_optimal(x, w, precision, 1)

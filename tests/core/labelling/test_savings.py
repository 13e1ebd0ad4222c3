"""What is said to be saved, where it is known."""

import math

import pytest
import torch

from rlhf_core.functional.interval import Interval
from rlhf_core.labelling import savings
from rlhf_core.labelling.saved import Savings
from rlhf_core.labelling.savings import Votes, estimate_savings, keeps_design

TRUTH = torch.tensor([2.0, -1.0, 1.0, 0.5, -2.0, 1.0, 0.0, 1.5]).double()


def cast(seed, n, *, spread=1.0, start=0):
    """Votes on pairs of a pool; a wider spread of features tells more."""
    g = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(n, 8, generator=g).double()
    y = (torch.rand(n, generator=g) < torch.sigmoid(x @ TRUTH)).double()
    return Votes(x, y, torch.arange(start, start + n))


def estimate(seed, spread, **how):
    arms = (
        cast(seed, 300, spread=spread),
        cast(seed + 1, 150, start=1000),
        cast(seed + 2, 100, start=2000),
    )
    g = torch.Generator().manual_seed(seed)
    return estimate_savings(*arms, generator=g, **how)


def shift(design, control, sizes):
    curves = torch.tensor([design, control], dtype=torch.float64)
    return savings._shift(curves[0], curves[1], sizes)


def test_curves_that_are_one_curve_have_their_shift():
    # L(n) = 2 - log n / 4; the design needs 60 % of the labels: L_D(n) = L(n / 0.6).
    sizes = (25, 40, 63, 100)
    control = [2 - math.log(n) / 4 for n in sizes]
    design = [2 - math.log(n / 0.6) / 4 for n in sizes]
    assert shift(design, control, sizes) == pytest.approx(-math.log(0.6))
    assert shift(control, design, sizes) == pytest.approx(math.log(0.6))
    assert shift(control, control, sizes) == pytest.approx(0)


def test_where_nothing_is_learned_nothing_is_saved():
    assert shift([1.0, 1.0], [2.0, 2.0], (10, 40)) == 0
    assert shift([1.0, 1.1], [2.0, 2.1], (10, 40)) == 0
    assert shift([1.0, 0.999], [2.0, 1.999], (10, 40)) == pytest.approx(math.log(10))  # the bound


def test_labels_that_tell_more_are_seen_to_save_and_those_that_tell_less_to_cost():
    more = [estimate(seed, 2.0, parts=2).saved.value for seed in range(0, 60, 5)]
    less = [estimate(seed, 0.5, parts=2).saved.value for seed in range(0, 60, 5)]
    same = [estimate(seed, 1.0, parts=2).saved.value for seed in range(0, 60, 5)]
    middle = [torch.tensor(some).median().item() for some in (less, same, more)]
    assert middle[0] < -0.3
    assert abs(middle[1]) < 0.2
    assert middle[2] > 0.2


def test_the_interval_covers():
    """Random against random: nothing is saved, and 95 % of the intervals should say so."""
    found = [estimate(seed, 1.0, parts=20).saved for seed in range(0, 100, 5)]
    inside = sum(interval.low <= 0 <= interval.high for interval in found)
    assert inside >= 17  # of 20; fewer has a chance of 2 % at a coverage of 95 %
    assert all(interval.low <= interval.value <= interval.high for interval in found)


def test_it_is_the_same_again_and_says_what_it_compared():
    one, other = (estimate(7, 2.0, parts=5) for _ in range(2))
    assert one == other
    assert (one.design_votes, one.random_votes, one.tested) == (300, 150, 250)
    assert len(one.sizes) == len(one.random_loss) == len(one.design_loss) == 4
    assert one.sizes[-1] <= 150 * 3 / 4
    assert one.random_loss[0] > one.random_loss[-1]


def test_losses_are_of_prompts_and_not_of_votes():
    """A prompt of the hold-out with its vote a hundred times counts as once."""
    design, control, hold_out = (
        cast(0, 100),
        cast(1, 100, start=1000),
        cast(2, 50, start=2000),
    )
    often = torch.cat([torch.arange(50), torch.zeros(99, dtype=torch.int64)])
    estimates = [
        estimate_savings(design, control, held, generator=torch.Generator().manual_seed(0), parts=1)
        for held in (hold_out, hold_out.at(often))
    ]
    assert estimates[0].design_loss == pytest.approx(estimates[1].design_loss, abs=1e-9)
    assert estimates[0].saved.value == pytest.approx(estimates[1].saved.value)


def test_no_vote_that_is_tested_on_was_learned_from(monkeypatch):
    """Each loss is asked of a fit that has seen none of the tested prompts."""
    seen = {}
    fit, losses = savings.fit_probe, savings._losses

    def remembering(x, y, *args, **named):
        made = fit(x, y, *args, **named)
        seen[id(made)] = (made, {tuple(row) for row in x.tolist()})
        return made

    tested_pairs = 0

    def checking(fits, tested):
        nonlocal tested_pairs
        rows = {tuple(row) for row in tested.features.tolist()}
        tested_pairs += len(rows)
        assert all(not rows & seen[id(one)][1] for one in fits)
        return losses(fits, tested)

    monkeypatch.setattr(savings, "fit_probe", remembering)
    monkeypatch.setattr(savings, "_losses", checking)
    estimate(3, 1.0, parts=1)
    assert tested_pairs > 0


def test_earlier_votes_count_for_both():
    arms = [cast(k, 100, start=1000 * k) for k in range(3)]
    g = torch.Generator().manual_seed(0)
    without = estimate_savings(*arms, generator=g, parts=2)
    with_them = estimate_savings(*arms, cast(9, 3000, start=9000), generator=g, parts=2)
    assert with_them.random_loss[0] < without.random_loss[0]
    assert with_them.design_loss[0] < without.design_loss[0]


def test_too_few_votes_have_no_estimate():
    arms = (cast(0, 100), cast(1, 29, start=1000), cast(2, 50, start=2000))
    assert estimate_savings(*arms, generator=torch.Generator()) is None
    one_prompt = Votes(arms[2].features, arms[2].outcomes, torch.zeros(50, dtype=torch.int64))
    few = Votes(cast(1, 40).features, cast(1, 40).outcomes, torch.arange(40) % 20 + 1000)
    assert estimate_savings(arms[0], few, one_prompt, generator=torch.Generator()) is None


def found(value):
    return Savings(Interval(value, value - 1, min(value + 0.3, 0.9)), 100, 350, 150, (), (), ())


def test_the_design_stops_when_it_saves_nothing_and_not_before_500_votes():
    assert keeps_design(None, 10_000)
    assert keeps_design(found(-0.5), 499)
    assert not keeps_design(found(-0.5), 500)
    assert not keeps_design(found(0.0), 500)
    assert keeps_design(found(0.01), 500)


def test_labels_saved_follow_from_the_share():
    # 350 labels of a design that needs 70 %: the random order would have needed 500.
    assert found(0.3).labels.value == pytest.approx(150)
    assert found(-1.0).labels.value == pytest.approx(-175)

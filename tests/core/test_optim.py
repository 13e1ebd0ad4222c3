"""Schedule, clipping and the step that refuses; batches; random streams."""

import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rlhf_core.errors import NumericsError
from rlhf_core.optim import (
    Optimizer,
    TrainingSection,
    chunks,
    learning_rate_factor,
    require_finite,
    shuffled_batches,
)
from rlhf_core.seeding import generator, stream_seed


@pytest.fixture
def model():
    draws = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=draws)
    return model


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def section(**settings):
    plain = {"learning_rate": 0.1, "schedule": "constant", "warmup_ratio": 0.0}
    return TrainingSection(**plain | settings)


# --- schedule ---


def test_schedule_by_hand():
    # 2 steps of warm-up, then 8 of fall: p = (step - 2) / 8.
    def factors(schedule):
        return [learning_rate_factor(schedule, step, 2, 10) for step in range(11)]

    rise = [1 / 3, 2 / 3]
    assert factors("constant") == pytest.approx([*rise, *[1] * 9])
    linear = [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]
    assert factors("linear") == pytest.approx(rise + linear)
    half = math.sqrt(0.5)  # cos π/4
    assert factors("cosine")[2] == 1
    assert factors("cosine")[4] == pytest.approx((1 + half) / 2)
    assert factors("cosine")[6] == pytest.approx(1 / 2)
    assert factors("cosine")[8] == pytest.approx((1 - half) / 2)
    assert factors("cosine")[10] == pytest.approx(0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_no_step_of_a_run_is_wasted(schedule):
    for warmup, total in ((0, 1), (1, 1), (3, 10), (9, 10)):
        factors = [learning_rate_factor(schedule, step, warmup, total) for step in range(total)]
        assert all(0 < factor <= 1 for factor in factors)


def test_optimizer_follows_the_schedule(model):
    config = section(schedule="linear", warmup_ratio=0.25, learning_rate=0.3)
    optimizer = Optimizer(model, config, 8)
    rates = []
    for _ in range(8):
        rates.append(optimizer.learning_rate)
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    assert rates == pytest.approx([0.1, 0.2, *[0.3 * (1 - i / 6) for i in range(6)]])


def test_learning_rate_can_be_given_apart(model):
    assert Optimizer(model, section(learning_rate=0.3), 9, 0.7).learning_rate == 0.7


def test_learning_rate_that_is_shown_is_the_one_that_is_applied(model):
    # Adam's first step moves every weight by the rate: m̂/√v̂ is the sign of the gradient.
    for rate in (0.1, 0.02):
        before = weights(model)
        optimizer = Optimizer(model, section(learning_rate=rate, max_grad_norm=1e9), 9)
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert_close((weights(model) - before).abs(), torch.full((19,), rate), rtol=1e-4, atol=0)


def test_weight_decay_is_on_matrices_alone(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, section(learning_rate=0.1, weight_decay=0.5), 9)
    (0 * model(torch.ones(1, 4))).sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        kept = 1 - 0.1 * 0.5 if p.ndim == 2 else 1
        assert_close(p.detach(), before[name] * kept)


# --- gradient norm ---


def test_norm_is_reported_before_clipping_and_bounds_the_update(model):
    # Weighing the loss by 1000 must not matter once the norm is bounded, as Adam remembers sizes.
    def two_steps(scale):
        trial = nn.Linear(4, 1, bias=False)
        nn.init.ones_(trial.weight)
        optimizer = Optimizer(trial, section(max_grad_norm=0.5), 9)
        norms = []
        for factor in (1.0, scale):
            (factor * trial(torch.tensor([[3.0, 4.0, 0.0, 0.0]]))).sum().backward()
            norms.append(optimizer.step())
        return norms, trial.weight.detach()

    (first, second), moved = two_steps(1000.0)
    assert (first, second) == pytest.approx((5.0, 5000.0))  # √(3² + 4²), and 1000 times that
    assert_close(moved, two_steps(1.0)[1])


def test_gradient_after_clipping_has_the_largest_norm_allowed(model):
    seen = []
    optimizer = Optimizer(model, section(max_grad_norm=0.25), 9)
    handle = optimizer._adamw.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())
    )
    for scale in (100.0, 1e-3):
        (scale * model(torch.ones(1, 4))).sum().backward()
        norm = optimizer.step()
        assert seen[-1].item() == pytest.approx(min(norm, 0.25), rel=1e-4)
    handle.remove()


def test_gradient_is_cleared_after_a_step_and_on_demand(model):
    optimizer = Optimizer(model, section(), 9)
    for forget in (optimizer.step, optimizer.drop_gradient):
        model(torch.ones(1, 4)).sum().backward()
        forget()
        assert all(p.grad is None for p in model.parameters())


def test_eight_micro_batches_are_one_batch(model):
    draws = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 4, generator=draws), torch.randn(8, 1, generator=draws)
    start = {name: w.clone() for name, w in model.state_dict().items()}

    def trained(size):
        model.load_state_dict(start)
        optimizer = Optimizer(model, section(), 5)
        for _ in range(5):
            for picked in chunks(list(range(8)), size):
                ((model(x[picked]) - y[picked]).square().sum() / 8).backward()
            norm = optimizer.step()
        return weights(model), norm

    for size in (1, 3):
        assert_close(trained(size)[0], trained(8)[0], rtol=1e-5, atol=1e-6)
        assert trained(size)[1] == pytest.approx(trained(8)[1], rel=1e-4)


# --- what is not finite ---


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_gradient_is_named_and_nothing_moves(model, bad):
    optimizer = Optimizer(model, section(), 9)
    before = weights(model)
    model(torch.ones(1, 4)).sum().backward()
    model[2].weight.grad[0, 1] = bad
    with pytest.raises(NumericsError, match=r"gradient of 2\.weight is not finite"):
        optimizer.step()
    assert torch.equal(weights(model), before)


def test_gradient_whose_norm_overflows_is_refused(model):
    # Every entry is finite, their squares are not.
    optimizer = Optimizer(model, section(), 9)
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3e38)
    with pytest.raises(NumericsError, match="gradient of the model is not finite"):
        optimizer.step()
    assert torch.equal(weights(model), before)


def test_bad_tensor_is_named():
    require_finite("the score", torch.tensor([1.0, -1e38]))
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(NumericsError, match="the score is not finite"):
            require_finite("the score", torch.tensor([1.0, bad]))


# --- batches ---


def test_an_epoch_holds_everything_once_in_an_order_of_its_own():
    batches = list(shuffled_batches(10, 4, 3, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    epochs = [[i for batch in batches[n : n + 3] for i in batch] for n in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_chunks():
    assert list(chunks([4, 5, 6, 7, 8], 2)) == [[4, 5], [6, 7], [8]]
    assert list(chunks([4], 9)) == [[4]]


# --- random streams ---


def test_streams_are_apart_and_stay_the_same():
    # The first 8 bytes of `printf 0/sft/order | b2sum -l 64`, without the last bit: repeating an
    # old run depends on it.
    assert stream_seed(0, "sft/order") == 0x97ECFB0498A1E6E3 >> 1
    seeds = [stream_seed(s, p) for s in (0, 1, 10) for p in ("sft/order", "ppo/order", "0/x")]
    assert max(Counter(seeds).values()) == 1
    assert all(0 <= seed < 2**63 for seed in seeds)
    streams = [generator(0, purpose) for purpose in ("a", "a", "b")]
    one, same, other = (torch.randint(2**30, (4,), generator=g).tolist() for g in streams)
    assert one == same != other

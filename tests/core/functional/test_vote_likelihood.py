"""The likelihood of a vote that knows who cast it: by hand, by published fits, by other solvers."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.testing import assert_close

from rlhf_core.functional.annotators import (
    CastVotes,
    Prior,
    fit_habits,
    habits_penalty,
    vote_logits,
    vote_nll,
)
from rlhf_core.functional.losses import bradley_terry

FLAT = Prior(math.inf, math.inf, math.inf)
UNBIASED = [1.0, 0.0, 0.0]


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def draw(count, annotators, *, ties=0.15, seed=0):
    """Votes of nobody in particular: gaps, sides, lengths and ties at random."""
    draws = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(count, generator=draws, dtype=torch.float64)

    return CastVotes(
        gap=normal(),
        side=torch.randint(-1, 2, (count,), generator=draws).double(),
        length_gap=normal(),
        tie=torch.rand(count, generator=draws) < ties,
        annotator=torch.randint(annotators, (count,), generator=draws),
    )


def cast_by(habits, count, seed=0, log_tie=-math.inf):
    """Votes of annotators with these habits."""
    draws = torch.Generator().manual_seed(seed)
    votes = draw(count, len(habits), ties=0.0, seed=seed)
    half = vote_logits(votes, habits) / 2
    chances = torch.stack([half, -half, torch.full_like(half, log_tie)], 1).softmax(1)
    outcome = torch.multinomial(chances, 1, generator=draws).squeeze(1)
    turned = torch.where(outcome == 1, -1.0, 1.0).double()
    gap, side, length = (x * turned for x in votes[:3])
    return CastVotes(gap, side, length, outcome == 2, votes.annotator)


def start_of(annotators):
    return doubles(UNBIASED).repeat(annotators, 1), torch.ones(annotators, 3, dtype=torch.bool)


# --- the likelihood ---


def test_logits_by_hand():
    # Annotator 1 votes against the rewards, likes the left by 0.5 and a unit of length by 0.25.
    votes = CastVotes(
        gap=doubles(2, 2, 1),
        side=doubles(1, -1, 0),
        length_gap=doubles(4, 4, -2),
        tie=torch.zeros(3, dtype=torch.bool),
        annotator=torch.tensor([0, 1, 1]),
    )
    values = doubles([1.5, 0, 0], [-1, 0.5, 0.25])
    assert_close(vote_logits(votes, values), doubles(3, -2 - 0.5 + 1, -1 - 0.5))


def test_probabilities_by_hand():
    # d = log 4 and ν = 3/2: the parts are 2, 1/2 and 3/2 of 4.
    logits = doubles(math.log(4), -math.log(4), math.log(4), -math.log(4))
    tie = torch.tensor([False, False, True, True])
    probability = (-vote_nll(logits, tie, math.log(1.5))).exp()
    assert_close(probability, doubles(0.5, 0.125, 0.375, 0.375))


def test_a_margin_is_taken_from_the_lead_of_the_winner():
    found = vote_nll(doubles(2.0), torch.tensor([False]), -math.inf, margin=doubles(0.5))
    assert_close(found, -torch.nn.functional.logsigmoid(doubles(1.5)))


def test_a_reliable_annotator_without_likings_is_bradley_terry_with_its_gradient():
    votes = draw(50, 3, ties=0.0)
    gap, margin = votes.gap.clone().requires_grad_(), votes.length_gap.abs()
    values = doubles(UNBIASED).repeat(3, 1)
    logits = vote_logits(votes._replace(gap=gap), values)
    ours = vote_nll(logits, votes.tie, -math.inf, margin=margin).mean()
    theirs = bradley_terry(gap, torch.zeros_like(gap), margin=margin)
    assert_close(ours, theirs, rtol=0, atol=1e-12)
    found, expected = (torch.autograd.grad(loss, gap)[0] for loss in (ours, theirs))
    assert_close(found, expected, rtol=0, atol=1e-12)


def test_rare_ties_pull_as_label_smoothing_of_a_half_does():
    gap = doubles(-2, -0.3, 0, 1.7)
    tie, rare = torch.ones(4, dtype=torch.bool), -60.0
    smoothed = bradley_terry(gap, torch.zeros_like(gap), label_smoothing=0.5)
    assert_close((vote_nll(gap, tie, rare) + rare).mean(), smoothed, rtol=0, atol=1e-12)


def test_gradients_are_those_of_differences():
    votes = draw(12, 3)
    start = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    arguments = (votes.gap, start, doubles(-0.4).squeeze(), votes.length_gap)
    arguments = [x.clone().requires_grad_() for x in arguments]

    def loss(gap, values, log_tie, margin):
        logits = vote_logits(votes._replace(gap=gap), values)
        return vote_nll(logits, votes.tie, log_tie, margin=margin).sum() + habits_penalty(values)

    assert torch.autograd.gradcheck(loss, arguments)


def test_large_logits_stay_finite():
    logits = doubles(2000, -2000).requires_grad_()
    found = vote_nll(logits, torch.tensor([False, False]), -math.inf)
    assert_close(found.detach(), doubles(0, 2000))
    assert torch.autograd.grad(found.sum(), logits)[0].tolist() == [0, -1]


def test_penalty_by_hand():
    # (0.5/0.5)² / 2 + (0.7/0.7)² / 2 + (2/1)² / 2
    assert_close(habits_penalty(doubles([1.5, 0.7, 2.0])), doubles(3.0).squeeze())
    assert habits_penalty(doubles([9.0, 9.0, 9.0]), FLAT) == 0


# --- fits that were published ---

# Davidson 1970, brands of chocolate pudding: first, second, preferred first, second, neither.
PUDDING = """
1 2 19 22 16   1 3 16 19 12   2 3 19 19 10   1 4 18 23 13   2 4 23 19 9
3 4 19 20 15   1 5 13 19 18   2 5 16 20 12   3 5 16 15 17   4 5 17 14 16
1 6 18 21 12   2 6 22 20 12   3 6 13 18 10   4 6 14 19 18   5 6 11 21 12
"""
# Agresti 2002, American League 1987: games that the home team (row) won and lost
# against each other team.
TEAMS = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
GAMES = """
0 0 4 3 4 2 4 3 6 1 4 2 6 0   3 3 0 0 4 2 4 3 6 0 6 1 4 3   2 5 4 3 0 0 2 4 4 3 4 2 6 0
3 3 5 1 2 5 0 0 4 3 4 2 6 1   5 1 2 5 3 3 4 2 0 0 5 2 6 0   2 5 3 3 3 4 4 3 4 2 0 0 2 4
2 5 1 5 1 6 2 4 1 6 3 4 0 0
"""


def maximise(loss, *parameters):
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=500,
        tolerance_grad=1e-11,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def test_davidson_on_chocolate_pudding():
    numbers = np.array(PUDDING.split(), dtype=int).reshape(-1, 5)
    rows = [
        (first, second, tie)
        for i, j, wins, losses, ties in numbers
        for first, second, tie, times in ((i, j, 0, wins), (j, i, 0, losses), (i, j, 1, ties))
        for _ in range(times)
    ]
    first, second, tie = torch.tensor(rows).T
    rewards = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    log_tie = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def loss():
        return vote_nll(rewards[first - 1] - rewards[second - 1], tie.bool(), log_tie).sum()

    maximise(loss, rewards, log_tie)
    published = doubles(0.1388, 0.1730, 0.1617, 0.1654, 0.1587, 0.2024)
    assert_close(rewards.softmax(0), published, rtol=0, atol=6e-5)
    assert log_tie.exp().item() == pytest.approx(0.7468, abs=6e-5)
    # The same ν from what finds it for given rewards.
    count = len(rows)
    nothing, who = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.long)
    gap = (rewards[first - 1] - rewards[second - 1]).detach()
    votes = CastVotes(gap, nothing, nothing, tie.bool(), who)
    start, free = start_of(1)
    found = fit_habits(votes, start, ~free, log_tie=1.0)
    assert found.log_tie.exp().item() == pytest.approx(0.7468, abs=6e-5)
    assert_close(found.values, start)


def test_home_advantage_in_baseball():
    table = np.array(GAMES.split(), dtype=int).reshape(7, 7, 2)
    games = [
        (home, away, 1) if won else (away, home, -1)
        for home in range(7)
        for away in range(7)
        for won, times in ((True, table[home, away, 0]), (False, table[home, away, 1]))
        for _ in range(times)
    ]
    winner, loser, side = torch.tensor(games).T
    rewards = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    at_home = torch.zeros((), dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(len(games))
    one, none = doubles(1.0), doubles(0.0)

    def votes():
        gap = rewards[winner] - rewards[loser]
        return CastVotes(gap, side.double(), zeros, zeros.bool(), zeros.long())

    def loss():
        values = torch.cat([one, at_home.view(1), none]).view(1, 3)
        return vote_nll(vote_logits(votes(), values), zeros.bool(), -math.inf).sum()

    maximise(loss, rewards, at_home)
    # Agresti 2002, Categorical Data Analysis: 0.302, standard error 0.131
    assert at_home.item() == pytest.approx(0.302, abs=5e-4)
    start, free = start_of(1)
    held = votes()._replace(gap=(rewards[winner] - rewards[loser]).detach())
    free[:, [0, 2]] = False
    found = fit_habits(held, start, free, prior=FLAT)
    assert found.values[0, 1].item() == pytest.approx(0.302, abs=5e-4)
    # A little less than 0.131, since the strengths of the teams are taken as known.
    assert 0.125 < found.deviations[0, 1].item() < 0.131


# --- the fit ---


@pytest.mark.parametrize("prior", [Prior(), FLAT], ids=["usual", "flat"])
def test_the_fit_is_that_of_another_solver(prior):
    habits = doubles([1, 0, 0], [0.4, 0.8, -0.3], [-0.6, 0, 0.9], [1.7, -0.5, 0.2])
    votes = cast_by(habits, 600, log_tie=-0.5)
    start, free = start_of(4)
    found = fit_habits(votes, start, free, prior=prior, log_tie=0.0)
    x = torch.stack(votes[:3], 1).numpy()
    who, tie = votes.annotator.numpy(), votes.tie.numpy()

    def negative_log_posterior(flat):
        values, log_tie = flat[:-1].reshape(4, 3), flat[-1]
        half = (x * values[who]).sum(1) / 2
        total = np.log(np.exp(half) + np.exp(-half) + np.exp(log_tie))
        away = values - np.array(UNBIASED)
        return (total - np.where(tie, log_tie, half)).sum() + (away**2 / np.square(prior)).sum() / 2

    begin = np.append(start.numpy().ravel(), 0.0)
    theirs = minimize(negative_log_posterior, begin, method="BFGS", options={"gtol": 1e-6}).x
    ours = np.append(found.values.numpy().ravel(), found.log_tie.item())
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert negative_log_posterior(ours) <= negative_log_posterior(theirs) + 1e-9


def test_planted_habits_are_found_within_their_deviations():
    habits = doubles([1.2, 0.6, 0.5], [0, -0.4, 0], [-1, 0, 0.8], [0.8, 0, -0.7])
    found = fit_habits(cast_by(habits, 20_000), *start_of(4))
    distance = (found.values - habits) / found.deviations
    assert distance.abs().max() < 3.5
    assert found.deviations.max() < 0.06


def test_the_means_that_are_held_are_those_over_the_votes():
    votes = draw(300, 4)
    start, free = start_of(4)
    start[0], free[0] = doubles(4, 0, 0), False  # a known voter
    found = fit_habits(
        votes, start, free, log_tie=-1.0, anchor_reliability=True, anchor_length=True
    )
    mine = votes.annotator[votes.annotator > 0]
    means = found.values[mine].mean(0)
    assert means[0].item() == pytest.approx(1, abs=1e-12)
    assert means[2].item() == pytest.approx(0, abs=1e-12)
    assert found.values[0].tolist() == [4, 0, 0]
    assert found.deviations[0].tolist() == [0, 0, 0]
    # At a mode with held means all annotators have the same slope a vote.
    values = found.values.clone().requires_grad_()
    loss = vote_nll(vote_logits(votes, values), votes.tie, found.log_tie).sum()
    (loss + habits_penalty(values[1:])).backward()
    count = torch.bincount(votes.annotator, minlength=4)[1:]
    slopes = values.grad[1:] / count.unsqueeze(1)
    assert_close(slopes[:, [0, 2]], slopes[:1, [0, 2]].expand(3, 2), rtol=0, atol=1e-9)
    assert_close(slopes[:, 1], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_one_annotator_whose_reliability_is_the_scale_has_nothing_to_learn():
    votes = draw(200, 1, ties=0.0)
    votes = votes._replace(side=torch.zeros_like(votes.side))
    start, free = start_of(1)
    found = fit_habits(votes, start, free, prior=FLAT, anchor_reliability=True, anchor_length=True)
    assert_close(found.values, start, rtol=0, atol=1e-12)


def test_one_annotator_with_flat_priors_predicts_as_bradley_terry_does():
    # Rewards are linear in two features; a is free, and only a·w can be told.
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(400, 2, generator=draws, dtype=torch.float64)
    won = torch.rand(400, generator=draws, dtype=torch.float64) < (x @ doubles(1, -0.5)).sigmoid()
    x = torch.where(won.unsqueeze(1), x, -x)
    zeros = torch.zeros(400, dtype=torch.float64)
    plain = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    maximise(lambda: bradley_terry(x @ plain, zeros) * 400, plain)
    weights = doubles(0.1, 0.1).requires_grad_()
    a = doubles(2.0).requires_grad_()

    def loss():
        votes = CastVotes(x @ weights, zeros, zeros, zeros.bool(), zeros.long())
        values = torch.cat([a, doubles(0, 0)]).view(1, 3)
        logits = vote_logits(votes, values)
        return vote_nll(logits, zeros.bool(), -math.inf).sum() + habits_penalty(values, FLAT)

    maximise(loss, weights, a)
    assert_close((a * weights).detach(), plain.detach(), rtol=0, atol=1e-6)


def test_unknown_sides_leave_the_liking_for_a_side_to_the_prior():
    votes = draw(300, 2)
    found = fit_habits(votes._replace(side=torch.zeros(300)), *start_of(2), log_tie=0.0)
    assert_close(found.values[:, 1], torch.zeros(2, dtype=torch.float64))
    assert_close(found.deviations[:, 1], torch.full((2,), 0.7, dtype=torch.float64))


def test_an_annotator_without_votes_is_what_the_prior_says():
    votes = draw(100, 2)
    start, free = start_of(3)
    found = fit_habits(votes, start + 0.3, free, log_tie=0.0)
    assert_close(found.values[2], doubles(*UNBIASED), rtol=0, atol=1e-9)
    assert_close(found.deviations[2], doubles(*Prior()))


def test_log_tie_stays_where_no_vote_is_a_tie():
    votes = draw(100, 2, ties=0.0)
    assert fit_habits(votes, *start_of(2), log_tie=-2.0).log_tie == -2.0
    assert fit_habits(votes, *start_of(2)).log_tie == -math.inf


def test_no_votes_at_all():
    found = fit_habits(draw(0, 2), *start_of(2), anchor_reliability=True, anchor_length=True)
    assert_close(found.values, start_of(2)[0])


def test_far_starts_come_to_the_same_mode():
    votes = cast_by(doubles([1, 0.5, 0], [-1, 0, 0.5]), 400, log_tie=-1.0)
    start, free = start_of(2)
    near = fit_habits(votes, start, free, log_tie=0.0)
    far = fit_habits(votes, start * 0 + 40.0, free, log_tie=12.0)
    assert_close(far.values, near.values, rtol=0, atol=1e-7)
    assert_close(far.log_tie, near.log_tie, rtol=0, atol=1e-7)


def test_what_cannot_be_fitted_is_refused():
    votes = draw(10, 2, ties=1.0)
    with pytest.raises(ValueError, match="log_tie must be finite"):
        fit_habits(votes, *start_of(2))
    broken = votes._replace(gap=torch.full((10,), math.nan))
    with pytest.raises(ValueError, match="gaps must be finite"):
        fit_habits(broken, *start_of(2), log_tie=0.0)
    with pytest.raises(ValueError, match="side must have shape"):
        vote_logits(votes._replace(side=torch.zeros(9)), start_of(2)[0])
    with pytest.raises(ValueError, match="a, b and c"):
        vote_logits(votes, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="margin must have shape"):
        vote_nll(votes.gap, votes.tie, 0.0, margin=torch.zeros(3))

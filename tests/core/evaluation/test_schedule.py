"""Who plays whom: the budget, the order, and where the verdicts go."""

from collections import Counter

import numpy as np
import pytest
from scipy.special import expit

from rlhf_core.evaluation.tournament.result import evenly_spaced, every
from rlhf_core.evaluation.tournament.schedule import pairs_of, play


def judge(theta, seed=0, ties=0.0):
    """Verdicts by the model with strengths theta; the same for the same match."""

    def ask(matches):
        found = []
        for match in matches:
            rng = np.random.default_rng([seed, *match])
            won = rng.random() < expit(theta[match.first] - theta[match.second])
            found.append("tie" if rng.random() < ties else "a" if won else "b")
        return found

    return ask


def tournament(theta, *, budget, prompts=64, samples=2, seed=0, ask=None):
    return play(
        len(theta),
        prompts=prompts,
        samples=samples,
        budget=budget,
        ask=ask or judge(theta),
        seed=seed,
    )


@pytest.mark.parametrize("budget", [21, 22, 40, 100, 777, 2000, 5000])
@pytest.mark.parametrize("prompts", [2, 64])
def test_the_budget_is_never_exceeded_and_nothing_is_asked_twice(budget, prompts):
    asked = []

    def ask(matches):
        asked.extend(matches)
        return judge([0, 1, 1.1, 1.2, 1.2, 1.1, 1])(matches)

    results = tournament([0.0] * 7, budget=budget, prompts=prompts, ask=ask)
    assert [result.match for result in results] == asked
    assert len(asked) == len(set(asked)) <= budget
    counts = Counter((m.first, m.second) for m in asked)
    assert set(counts) == set(pairs_of(7))
    assert max(counts.values()) <= prompts * 2


def test_a_budget_below_one_verdict_a_pair_is_refused():
    with pytest.raises(ValueError, match="20 verdicts are not enough for 21 pairs"):
        tournament([0.0] * 7, budget=20)


def test_everyone_meets_on_the_same_answers_first():
    results = tournament([0, 1, 2], budget=60)
    opening = [result.match for result in results[:30]]  # half of the budget: 10 for each pair
    boards = {pair: {m[2:] for m in opening if m[:2] == pair} for pair in pairs_of(3)}
    assert boards[0, 1] == boards[0, 2] == boards[1, 2] == {(n, 0) for n in range(10)}


def test_the_rest_decides_the_winner():
    theta = [0, 1.0, 1.1, -3, -3]
    results = tournament(theta, budget=1000)
    counts = Counter((m.first, m.second) for m, _ in results)
    opening = 1000 // 2 // 10
    assert counts[1, 2] > opening
    assert all(counts[pair] == opening for pair in pairs_of(5) if pair != (1, 2))


def test_a_winner_that_is_shown_ends_it():
    results = tournament([0, 0, 6, 0], budget=400)
    assert len(results) == 400 // 2 // 6 * 6


def test_it_is_the_same_again():
    theta = [0, 0.5, 0.6, 0.7]
    assert tournament(theta, budget=300) == tournament(theta, budget=300)


def test_a_judge_that_is_silent_ends_it_too():
    results = tournament([0.0] * 4, budget=100, ask=lambda matches: [None] * len(matches))
    assert {result.winner for result in results} == {None}


@pytest.mark.parametrize(
    ("numbers", "wanted", "chosen"),
    [
        ([5, 10, 15, 20, 25], 5, [5, 10, 15, 20, 25]),
        ([5, 10], 5, [5, 10]),
        (list(range(1, 30)), 5, [5, 10, 15, 20, 25]),
        (list(range(1, 30)), 2, [10, 20]),
        ([3, 6, 9], 1, [6]),
    ],
)
def test_more_milestones_than_asked_are_evenly_spaced(numbers, wanted, chosen):
    assert evenly_spaced(numbers, wanted) == chosen


@pytest.mark.parametrize(
    ("iterations", "checkpoints", "kept"), [(30, 6, 5), (100, 8, 12), (7, 5, 1), (4, 4, 1)]
)
def test_as_many_are_kept_as_will_meet(iterations, checkpoints, kept):
    assert every(iterations, checkpoints) == kept
    assert -(-iterations // kept) >= checkpoints

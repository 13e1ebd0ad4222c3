"""A linear reward model and the habits of its annotators, fitted together, by the likelihood with
which the reward model of the pipeline is trained: `rlhf_core.functional.annotators`.

    r(answer) = w · features,    w ~ N(0, 1 / ridge)

With a simulation whose truth is known. Votes of K annotators on pairs of answers:

    features   ten that are worth something, w of length 1.9 in a random direction, and the length,
               which is worth nothing; differences between answers are standard normal
    usual      a ~ N(1, 0.3²) from 0.3 up, b ~ N(0, 0.7²), c ~ N(0.8, 0.3²)
    spammers   a = 0, b ~ N(0, 0.7²), c = 0: they do not look at the answers
    contrary   a = -1, b ~ N(0, 0.7²), c ~ N(0.8, 0.3²)
    clean      all have a = 1, b = c = 0

The length of w and the number of features were chosen so that pooled votes reach .857, and .97 when
all annotators are clean; nothing else was. A known answer is the truly better one. Accuracy: share
of 4,000 other pairs of which the truly better answer gets the higher reward.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.functional.annotators import (
    DEFAULT_PRIOR,
    CastVotes,
    Habits,
    Prior,
    fit_habits,
    habits_penalty,
    vote_logits,
    vote_nll,
)
from rlhf_core.training.annotators import GOLD_RELIABILITY

FEATURES, WORTH = 10, 1.9
ANNOTATORS, SPAMMERS, CONTRARY = 20, 0.15, 0.05
TEST_PAIRS = 4000
STEPS = 400  # of the optimizer, at most


class Linear(NamedTuple):
    """A linear reward model, and what was learnt of those whose votes it learnt from."""

    weights: Tensor  # (D,)
    habits: Habits  # of the K annotators


@dataclass(frozen=True)
class Votes:
    """Votes on pairs of answers; the first answer of a vote is the winner, or either of a tie."""

    features: Tensor  # (P, D) of the pairs: first answer minus second
    pair: Tensor  # (N,) number of the pair of each vote
    sign: Tensor  # (N,) 1 where the first answer of the pair won or it is a tie, else -1
    cast: CastVotes  # with gaps of 0
    annotators: int
    gold: int | None = None  # the annotator whose votes are known answers

    def gaps(self, weights: Tensor) -> CastVotes:
        """The votes with the rewards that these weights give."""
        return self.cast._replace(gap=self.sign * (self.features @ weights)[self.pair])


def fit_linear(
    votes: Votes,
    *,
    aware: bool,
    ridge: float = 1e-3,
    prior: Prior = DEFAULT_PRIOR,
    gold_reliability: float = GOLD_RELIABILITY,
) -> Linear:
    """The mode of the posterior of weights and habits; pooled leaves all habits at a = 1.

    The means of a and, without gold, of c are held as the pipeline holds them.
    """
    start = torch.zeros(votes.annotators, 3, dtype=torch.float64)
    start[:, 0] = 1.0
    free = torch.full(start.shape, aware)
    if votes.gold is not None:
        start[votes.gold, 0] = gold_reliability if aware else 1.0
        free[votes.gold] = False
    ties = votes.cast.tie.double().mean().item()
    begin = math.log(2 * ties / (1 - ties)) if ties else -math.inf
    weights = torch.zeros(votes.features.shape[1], dtype=votes.features.dtype, requires_grad=True)
    moved = torch.zeros_like(start, requires_grad=True)
    nu = torch.tensor(begin, dtype=torch.float64, requires_grad=ties > 0)
    count = torch.bincount(votes.cast.annotator, minlength=votes.annotators).double().unsqueeze(1)
    held = torch.tensor([True, False, votes.gold is None])
    share = count * free / (count * free).sum(0).clamp(min=1) * held

    def values() -> Tensor:
        step = moved * free
        return start + step - free * (share * step).sum(0)

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = vote_logits(votes.gaps(weights), values())
        total = vote_nll(logits, votes.cast.tie, nu).sum() + ridge / 2 * weights.square().sum()
        total = total + habits_penalty(values()[free.any(1)], prior)
        total.backward()
        return total

    learnt = [weights, *([moved] if aware else []), *([nu] if ties else [])]
    optimizer = torch.optim.LBFGS(
        learnt,
        max_iter=STEPS,
        max_eval=2 * STEPS,
        history_size=30,
        tolerance_grad=1e-7 * len(votes.pair),
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(loss)
    found = weights.detach()
    habits = fit_habits(
        votes.gaps(found),
        values().detach(),
        free,
        prior=prior,
        log_tie=nu.item(),
        anchor_reliability=True,
        anchor_length=votes.gold is None,
    )
    return Linear(found, habits)


@dataclass(frozen=True)
class SimulatedVotes:
    """Votes with the truth behind them."""

    votes: Votes
    truth: Tensor  # (D,) what the features are worth
    test: Tensor  # (M, D) other pairs
    spammer: Tensor  # (K,) bool; with gold one more
    usual: Tensor  # (K,) bool

    def accuracy(self, weights: Tensor) -> float:
        """Share of the other pairs of which the truly better answer gets the higher reward."""
        same = (self.test @ weights > 0) == (self.test @ self.truth > 0)
        return same.double().mean().item()


def simulate_votes(seed: int, *, labels: int, gold: float, clean: bool) -> SimulatedVotes:
    """Labels of one vote a pair, a share of which are known answers."""
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    direction = normal(FEATURES)
    truth = torch.cat([direction / direction.norm() * WORTH, torch.zeros(1, dtype=torch.float64)])
    x = normal(labels, FEATURES + 1)
    spammers = round(SPAMMERS * ANNOTATORS)
    contrary = spammers + round(CONTRARY * ANNOTATORS)
    kind = torch.arange(ANNOTATORS)
    spammer, usual = kind < spammers, kind >= contrary
    a, b, c = 1 + 0.3 * normal(ANNOTATORS), 0.7 * normal(ANNOTATORS), 0.8 + 0.3 * normal(ANNOTATORS)
    a = a.clamp(min=0.3).where(usual, -1.0).where(~spammer, 0.0)
    habits = torch.stack([a, b, c.where(~spammer, 0.0)], 1)
    if clean:
        habits = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).repeat(ANNOTATORS, 1)
    who = torch.randint(ANNOTATORS, (labels,), generator=draws)
    side = torch.randint(2, (labels,), generator=draws).double() * 2 - 1
    untied = torch.zeros(labels, dtype=torch.bool)
    logits = vote_logits(CastVotes(x @ truth, side, x[:, -1], untied, who), habits)
    first = torch.rand(labels, generator=draws, dtype=torch.float64) < logits.sigmoid()
    known = torch.arange(labels) < round(gold * labels)
    who, side = who.where(~known, ANNOTATORS), side.where(~known, 0.0)
    first = torch.where(known, x @ truth > 0, first)
    sign = torch.where(first, 1.0, -1.0).double()
    cast = CastVotes(torch.zeros_like(side), sign * side, sign * x[:, -1], untied, who)
    votes = Votes(
        features=x,
        pair=torch.arange(labels),
        sign=sign,
        cast=cast,
        annotators=ANNOTATORS + bool(gold),
        gold=ANNOTATORS if gold else None,
    )
    nobody = torch.zeros_like(spammer)
    return SimulatedVotes(
        votes,
        truth,
        normal(TEST_PAIRS, FEATURES + 1),
        nobody if clean else spammer,
        ~nobody if clean else usual,
    )

"""How many labels the design saves, measured on the labels that there are.

The random arm has m votes. Let L_R(n) and L_D(n) be the losses, on prompts that neither has seen,
of a last layer fitted to the first n votes of the random arm and of the design, each with all votes
from before. If the design needs the share 1 - s of the labels at every size, then

    L_D(n) = L_R(n / (1 - s))

and on the axis log n the two curves are one curve, shifted by δ = -log(1 - s). The shift is
estimated as the relative potency of a parallel-line assay, at sizes n₁ … n_K from m/4 to m in equal
ratios, with x = log n:

    b = Σₖ (xₖ - x̄)·(L_D(nₖ) + L_R(nₖ)) / (2·Σₖ (xₖ - x̄)²)      the slope of both curves
    δ = (mean L_D - mean L_R) / b,     s = 1 - exp(-δ)

so s is the share of the random arm's labels that the design did not need for the same loss.

What is compared is fair for these reasons. The three arms have different prompts, drawn by a hash,
and nearly equal prompts are in one arm, so no fit meets what it is tested on. The tests are the
hold-out and, with the random arm's own votes left out in turn (cross-fitting), the random arm; each
prompt counts once. Both fits have the same features, which may come from a model that was trained
on the votes of both.

The interval comes from samples without replacement (the delete-d jackknife): each takes a random
share f = 0.8 of the prompts of every arm and estimates δ again. The mean of such a part varies
about that of the whole with (1 - f) / f times the variance of the whole, and so

    δ ± z·√(f / (1 - f))·1.4826·median |δ* - median δ*|

The bootstrap would not do: it repeats votes, and a fit to repeated votes learns less.

References: Finney 1978, Statistical Method in Biological Assay, chapter 4 (parallel lines); Shao
and Wu 1989, https://doi.org/10.1214/aos/1176347263 (the delete-d jackknife); Chernozhukov et al.
2018, https://doi.org/10.1111/ectj.12097 (cross-fitting).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from rlhf_core.functional.interval import Interval
from rlhf_core.labelling.probe import Probe, fit_probe, no_votes
from rlhf_core.labelling.saved import SETTLED, Savings

SIZES, SPAN, FOLDS = 4, 4.0, 4
KEPT, PARTS = 0.8, 60  # share of the prompts in a part, and parts
FEWEST = 30  # votes of the design and of the random arm, and tested prompts
FLAT = 1e-6  # nats a vote for e times as many labels: nothing is learned
FURTHEST = math.log(10)  # |δ|: beyond it the curves do not meet, and the shift is a guess


@dataclass(frozen=True)
class Votes:
    """The votes of an arm in the order in which they were cast."""

    features: Tensor  # (N, k)
    outcomes: Tensor  # (N,) 1 if a won, 0 if b did, 0.5 for a tie
    groups: Tensor  # (N,) int64, which prompt; nearly equal prompts are one

    def __len__(self) -> int:
        return len(self.outcomes)

    def at(self, which: Tensor) -> "Votes":
        """Some of them, by mask or index."""
        return Votes(self.features[which], self.outcomes[which], self.groups[which])


def estimate_savings(
    design: Votes,
    control: Votes,
    hold_out: Votes,
    before: Votes | None = None,
    *,
    generator: torch.Generator,
    confidence: float = 0.95,
    parts: int = PARTS,
) -> Savings | None:
    """The share of labels that the design saves, with an interval (module docstring).

    Args:
        design, control, hold_out: the arms, without a prompt in common.
        before: votes that both orders started from.
        generator: random numbers for the parts, on the CPU.
        parts: how many parts are drawn.

    Returns: None while the design or the random arm has fewer than 30 votes, or while the hold-out
    and the random arm have fewer than 30 prompts.
    """
    m = min(len(design), len(control))
    tested = len(torch.cat([hold_out.groups, control.groups]).unique())
    if m < FEWEST or tested < FEWEST:
        return None
    start = no_votes(design.features.shape[1])
    if before is not None:
        start = fit_probe(before.features, before.outcomes)
    ours, theirs, sizes = _curves(design, control, hold_out, start)
    shift = _shift(ours, theirs, sizes)
    draws = []
    for _ in range(parts):
        part = [_part(votes, generator) for votes in (design, control, hold_out)]
        draws.append(_shift(*_curves(part[0], part[1], part[2], start)))
    spread = _spread(torch.tensor(draws, dtype=torch.float64)) * math.sqrt(KEPT / (1 - KEPT))
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    saved = Interval(*(-math.expm1(-(shift + k * z * spread)) for k in (0, -1, 1)))
    return Savings(
        saved,
        random_votes=len(control),
        design_votes=len(design),
        tested=tested,
        sizes=sizes,
        random_loss=tuple(theirs.tolist()),
        design_loss=tuple(ours.tolist()),
    )


def keeps_design(savings: Savings | None, votes: int) -> bool:
    """Whether the design goes on: until 500 votes in any case, then while the estimate is above 0.

    Args:
        votes: of all arms.
    """
    if votes < SETTLED or savings is None:
        return True
    return savings.saved.value > 0


def _sizes(most: int) -> tuple[int, ...]:
    """K sizes up to `most` in equal ratios, over the span."""
    ratio = SPAN ** (1 / (SIZES - 1))
    return tuple(max(1, round(most / ratio**k)) for k in reversed(range(SIZES)))


def _curves(
    design: Votes, control: Votes, hold_out: Votes, before: Probe
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(K,) mean losses of the design and of the random arm on the same prompts, and the sizes."""
    groups = control.groups.unique()
    fold = torch.searchsorted(groups, control.groups) % FOLDS
    rests = [control.at(fold != k) for k in range(FOLDS)]
    sizes = _sizes(min(len(design), *map(len, rests)))
    by_design = _fits(design, sizes, before)
    ours, theirs = torch.zeros(2, len(sizes), dtype=torch.float64)
    for k, rest in enumerate(rests):
        left_out = control.at(fold == k)
        # Votes of the random arm are as good in any order: each fold begins at another.
        turned = rest.at(torch.arange(len(rest)).roll(-(k * len(rest) // FOLDS)))
        by_chance = _fits(turned, sizes, before)
        # The hold-out is tested in every fold, and a prompt of the random arm in one.
        for tested, weight in ((hold_out, 1 / FOLDS), (left_out, 1.0)):
            theirs += weight * _losses(by_chance, tested)
            ours += weight * _losses(by_design, tested)
    prompts = len(groups) + len(hold_out.groups.unique())
    return ours / prompts, theirs / prompts, sizes


def _fits(votes: Votes, sizes: Sequence[int], before: Probe) -> list[Probe]:
    """Fits to the first votes, for each size."""
    fits: list[Probe] = []
    for n in sizes:
        near = fits[-1].mean if fits else None
        fits.append(fit_probe(votes.features[:n], votes.outcomes[:n], before, near=near))
    return fits


def _losses(fits: Sequence[Probe], tested: Votes) -> Tensor:
    """(K,) losses, summed over prompts; of several votes on a prompt the mean."""
    _, which, votes = tested.groups.unique(return_inverse=True, return_counts=True)
    shares = 1 / votes[which].double()
    losses = [fit.losses(tested.features, tested.outcomes) @ shares for fit in fits]
    return torch.stack(losses)


def _shift(design: Tensor, control: Tensor, sizes: Sequence[int]) -> float:
    """δ, at most `FURTHEST` either way; 0 if more votes do not lower the loss."""
    x = torch.tensor(sizes, dtype=torch.float64).log()
    x = x - x.mean()
    slope = float((x * (design + control)).sum() / (2 * x.square().sum()))
    if slope > -FLAT:
        return 0.0
    shift = float(design.mean() - control.mean()) / slope
    return min(max(shift, -FURTHEST), FURTHEST)


def _part(votes: Votes, generator: torch.Generator) -> Votes:
    """The votes on a random share of the prompts, in their order."""
    groups = votes.groups.unique()
    kept = max(round(KEPT * len(groups)), 1)
    drawn = groups[torch.randperm(len(groups), generator=generator)[:kept]]
    return votes.at(torch.isin(votes.groups, drawn))


def _spread(values: Tensor) -> float:
    """The standard deviation by the median deviation: a shift over a flat curve may be anything."""
    return 1.4826 * float((values - values.median()).abs().median())

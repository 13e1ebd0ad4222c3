"""The likelihood of a vote that knows who cast it: reliability, liking for a side, and for length.

    d = a·(r₁ - r₂) + b·s + c·(l₁ - l₂)          logit of a win of answer 1 over answer 2
    P(1 wins) = e^(d/2) / Z,  P(2 wins) = e^(-d/2) / Z,  P(tie) = ν / Z,  Z = e^(d/2) + e^(-d/2) + ν

    r       reward, in logits of a voter with a = 1
    a       reliability of the annotator: 1 votes as the rewards say, 0 at random, below 0 against
    s       1 where answer 1 was on the left (shown first), -1 on the right, 0 where unknown
    b       liking for the left, in logits; without effect where the sides are unknown
    l       length of an answer in a unit of the caller's choice
    c       liking for length, in logits a unit
    ν       how common ties are, shared by all annotators; 0 is the model without ties

Without ties this is Bradley-Terry with d, and with a = 1 and b = c = 0 plain Bradley-Terry. Only r
is a property of the answers, and only r is used once the votes have been learnt from.

a, b and c have independent normal priors, written as standard deviations: a ~ N(1, ½²),
b ~ N(0, 0.7²), c ~ N(0, 1²). What the votes cannot tell the priors decide: r and all a could be
scaled inversely, and a liking for length that all annotators share could be a part of r.

References: Davidson 1970 (ties), https://doi.org/10.1080/01621459.1970.10481082; reliability of a
voter: Chen et al. 2013 (Crowd-BT), https://doi.org/10.1145/2433396.2433420; a liking for the first
of a pair: Davidson and Beaver 1977, https://doi.org/10.2307/2529467.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.functional._contracts import check_shapes

STEPS, LONGEST = 100, 4.0  # of Newton's method: how many at most, and how far one may go
HALVINGS = 30  # of a step that would lower the posterior
TOLERANCE = 1e-9  # of the largest change
NOISE = 1e-12  # rounding of a sum over many votes, as a share of it


class Prior(NamedTuple):
    """Standard deviations of the normal priors; infinity is a flat prior."""

    reliability: float = 0.5  # of a, whose mean is 1
    side: float = 0.7  # of b, whose mean is 0
    length: float = 1.0  # of c, whose mean is 0


DEFAULT_PRIOR = Prior()


class CastVotes(NamedTuple):
    """Votes on pairs of answers. The winner is answer 1; of a tie it is either."""

    gap: Tensor  # (N,) r₁ - r₂
    side: Tensor  # (N,) 1 answer 1 was on the left, -1 on the right, 0 unknown
    length_gap: Tensor  # (N,) l₁ - l₂
    tie: Tensor  # (N,) bool
    annotator: Tensor  # (N,) int64 in [0, K)


class Habits(NamedTuple):
    """What is known of K annotators."""

    values: Tensor  # (K, 3) a, b and c
    deviations: Tensor  # (K, 3) their standard deviations, from the curvature; 0 where fixed
    log_tie: Tensor  # () log ν; -inf without ties


def vote_logits(votes: CastVotes, values: Tensor) -> Tensor:
    """The logit of a win of answer 1, as its annotator casts votes.

        d = a·(r₁ - r₂) + b·s + c·(l₁ - l₂)

    Args:
        votes: N votes.
        values: (K, 3) a, b and c of each annotator.

    Returns:
        (N,) in logits.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check(votes)
    check_shapes(values=(values, "KC"))
    if values.shape[1] != 3:
        raise ValueError(f"values must have a, b and c of each annotator, got {values.shape[1]}.")
    a, b, c = values[votes.annotator].unbind(1)
    return a * votes.gap + b * votes.side + c * votes.length_gap


def vote_nll(
    logits: Tensor, tie: Tensor, log_tie: Tensor | float, *, margin: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of each vote, by Davidson's model of ties.

        -log P = log(e^(d/2) + e^(-d/2) + ν) - (log ν if it is a tie, else d/2)

    Args:
        logits: (N,) d of the winner; of a tie, of either answer.
        tie: (N,) bool.
        log_tie: log ν; -inf where no vote is a tie.
        margin: (N,) is subtracted from d: by how many logits the winner should lead; 0 for a tie.

    Returns:
        (N,) in nats.

    Raises:
        ValueError: if the shapes differ.

    Reference: Davidson 1970, https://doi.org/10.1080/01621459.1970.10481082.
    """
    check_shapes(logits=(logits, "N"), tie=(tie, "N"))
    if margin is not None:
        check_shapes(logits=(logits, "N"), margin=(margin, "N"))
    half = (logits if margin is None else logits - margin) / 2
    nu = torch.as_tensor(log_tie, dtype=half.dtype, device=half.device).expand_as(half)
    total = torch.logaddexp(torch.logaddexp(half, -half), nu)
    return total - torch.where(tie, nu, half)


def habits_penalty(values: Tensor, prior: Prior = DEFAULT_PRIOR) -> Tensor:
    """Negative log of the priors of a, b and c, without the constant.

        Σₖ (aₖ - 1)² / 2σ_a² + bₖ² / 2σ_b² + cₖ² / 2σ_c²

    Shapes: values (K, 3). Returns: () in nats.
    """
    check_shapes(values=(values, "KC"))
    return (_precision(values, prior) * (values - _mean(values)).square()).sum() / 2


def fit_habits(
    votes: CastVotes,
    start: Tensor,
    free: Tensor,
    *,
    prior: Prior = DEFAULT_PRIOR,
    log_tie: float = -math.inf,
    anchor_reliability: bool = False,
    anchor_length: bool = False,
) -> Habits:
    """The mode of the posterior of a, b, c and ν for given rewards, by Newton's method.

    There is only one, since the negative log-posterior is convex in all of these at once.

    Args:
        votes: N votes; their gaps are constants.
        start: (K, 3) where a, b and c begin; what is not free stays there.
        free: (K, 3) bool, what is to be found.
        prior: of what is free.
        log_tie: where log ν begins; -inf for the model without ties. ν has no prior, and stays
            where it begins when no vote is a tie.
        anchor_reliability: hold the mean of the free a over the votes at 1, so that the scale of
            the rewards is that of the average voter.
        anchor_length: hold the mean of the free c over the votes at 0: what all share stays with
            the rewards.

    Returns:
        The mode, and standard deviations by Laplace's approximation with ν and the means held.

    Raises:
        ValueError: if the shapes differ, a gap is not finite, or there are ties and log_tie is
            -inf.
    """
    _check(votes)
    check_shapes(start=(start, "KC"), free=(free, "KC"))
    if not bool(votes.gap.isfinite().all() & votes.length_gap.isfinite().all()):
        raise ValueError("the gaps must be finite.")
    if log_tie == -math.inf and bool(votes.tie.any()):
        raise ValueError("log_tie must be finite, since there are ties.")
    fit = _Fit(votes, free, prior, anchor_reliability, anchor_length)
    values = fit.anchored(start.detach().double().cpu().clone())
    nu = torch.tensor(log_tie, dtype=torch.float64)
    objective = fit.objective(values, nu)
    for _ in range(STEPS):
        step, nu_step = fit.newton(values, nu)
        largest = float(torch.cat([step.flatten(), nu_step.view(1)]).abs().max())
        if largest < TOLERANCE:
            break
        share = min(1.0, LONGEST / largest)
        for _ in range(HALVINGS):
            found = values + share * step, nu + share * nu_step
            value = fit.objective(*found)
            if bool(value <= objective + NOISE * objective.abs()):
                break
            share /= 2
        else:
            break  # it cannot be improved in float64
        values, nu, objective = *found, value
    return Habits(values, fit.deviations(values, nu), nu)


class _Fit:
    """The posterior of the habits of annotators, with its derivatives, in float64 on the CPU.

    Next to what an annotator has alone there are three unknowns that annotators share: log ν, and
    the multipliers of the two means that may be held. So the curvature is a block for each
    annotator, with a border, and is solved block by block.
    """

    def __init__(
        self,
        votes: CastVotes,
        free: Tensor,
        prior: Prior,
        anchor_reliability: bool,
        anchor_length: bool,
    ) -> None:
        self._free = free.cpu()
        self._tie, self._who = votes.tie.cpu(), votes.annotator.cpu()
        features = [votes.gap, votes.side, votes.length_gap]
        self._features = torch.stack([x.detach().double().cpu() for x in features], 1)
        self._prior = _precision(self._features, prior) * self._free
        count = torch.bincount(self._who, minlength=len(free)).double().unsqueeze(1)
        held = torch.tensor([anchor_reliability, False, anchor_length])
        self._weights = count * self._free * held  # (K, 3) votes behind what has its mean held
        totals = self._weights.sum(0)
        self._means = self._weights / totals.clamp(min=1)
        self._used = torch.stack([self._tie.any(), totals[0] > 0, totals[2] > 0])

    def anchored(self, values: Tensor) -> Tensor:
        """The values with the means that are held put right."""
        target = _mean(values)
        shift = target - (self._means * values).sum(0)
        return values + torch.where((self._weights.sum(0) > 0) & self._free, shift, 0.0)

    def objective(self, values: Tensor, nu: Tensor) -> Tensor:
        """() the negative log-posterior, without constants."""
        logits = (self._features * values[self._who]).sum(1)
        penalty = (self._prior * (values - _mean(values)).square()).sum() / 2
        return vote_nll(logits, self._tie, nu).sum() + penalty

    def newton(self, values: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
        """The step of Newton's method, (K, 3) and (), along which the held means stay."""
        blocks, border, corner, slope, nu_slope = self._derivatives(values, nu)
        solved = torch.linalg.solve(blocks, torch.cat([slope.unsqueeze(2), border], 2))
        direct, across = solved[:, :, 0], solved[:, :, 1:]
        rest = corner - torch.einsum("kim,kin->mn", border, across)
        right = nu_slope - torch.einsum("kim,ki->m", border, direct)
        used, shared = self._used, torch.zeros_like(right)
        if bool(used.any()):
            shared[used] = torch.linalg.solve(rest[used][:, used], right[used])
        return direct - across @ shared, shared[0]

    def deviations(self, values: Tensor, nu: Tensor) -> Tensor:
        """(K, 3) from the inverse of the curvature of each annotator; 0 where nothing is free."""
        blocks = self._derivatives(values, nu)[0]
        variances = torch.linalg.inv(blocks).diagonal(dim1=1, dim2=2)
        return torch.where(self._free, variances.sqrt(), 0.0)

    def _derivatives(
        self, values: Tensor, nu: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Curvature of each annotator (K, 3, 3), with what is shared (K, 3, 3), of what is shared
        (3, 3); and the downward slopes (K, 3) and (3,)."""
        x = self._features * self._free[self._who]
        half = (self._features * values[self._who]).sum(1) / 2
        scores = torch.stack([half, -half, nu.expand_as(half)], 1)
        win, loss, tie = scores.softmax(1).unbind(1)
        lead = (win - loss) / 2
        won = torch.where(self._tie, 0.0, 0.5).double()

        def by_annotator(each: Tensor) -> Tensor:
            total = torch.zeros(len(values), *each.shape[1:], dtype=torch.float64)
            return total.index_add(0, self._who, each)

        weight = (win + loss) / 4 - lead.square()
        blocks = by_annotator(weight[:, None, None] * x.unsqueeze(2) * x.unsqueeze(1))
        # What is fixed, or neither votes nor prior say anything of, stays where it is.
        known = blocks.diagonal(dim1=1, dim2=2) + self._prior
        blocks = blocks + torch.diag_embed(torch.where(known > 0, self._prior, 1.0))
        slope = by_annotator((won - lead).unsqueeze(1) * x)
        slope = slope - self._prior * (values - _mean(values))
        border = torch.zeros(len(values), 3, 3, dtype=torch.float64)
        border[:, :, 0] = by_annotator((-tie * lead).unsqueeze(1) * x)
        border[:, 0, 1], border[:, 2, 2] = self._means[:, 0], self._means[:, 2]
        corner = torch.zeros(3, 3, dtype=torch.float64)
        corner[0, 0] = (tie * (1 - tie)).sum()
        nu_slope = torch.zeros(3, dtype=torch.float64)
        nu_slope[0] = self._tie.sum() - tie.sum()
        return blocks, border, corner, slope, nu_slope


def _check(votes: CastVotes) -> None:
    check_shapes(**{name: (x, "N") for name, x in votes._asdict().items()})


def _mean(values: Tensor) -> Tensor:
    """(3,) the means of the priors."""
    return torch.tensor([1.0, 0.0, 0.0], dtype=values.dtype, device=values.device)


def _precision(values: Tensor, prior: Prior) -> Tensor:
    """(3,) one over the variances of the priors."""
    deviations = torch.tensor(prior, dtype=values.dtype, device=values.device)
    return deviations.square().reciprocal()

"""Win rates at equal length: what is left of a win rate when longer answers have no advantage.

    logit P(m wins on i) = θₘ + φₘ·x + ψₘ·γᵢ,   x = tanh(length difference / its sd)

    γᵢ is how easily prompt i is won, shared by all candidates; the win rate at equal length is the
    mean over the prompts of σ(θₘ + ψₘ·γᵢ), which is the model read off at x = 0

The γ of a candidate come from one fit of others, in folds, with ψ = 1: a vote that had a part in
the difficulty of its own prompt would bias what few candidates show. Then θ, φ and ψ of the
candidate are fitted with γ fixed. Every coefficient but θ has a standard normal prior, so that few
prompts give no extremes.

Reference: Dubois et al. 2024, https://arxiv.org/abs/2404.04475, whose form this is. They share the
difficulty of a prompt between models, too, and regularise.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from rlhf_core.functional._contracts import check_shapes
from rlhf_core.functional.interval import Interval
from rlhf_core.functional.ranking import at_least_wilson

PRIOR = (0.01, 1.0, 1.0)  # 1 / variance of the normal priors of θ, φ and ψ; γ has that of ψ
FOLDS = 5  # of the candidates
STEPS, LONGEST = 50, 2.0  # of Newton's method: how many at most, and how long one may be


class Verdicts(NamedTuple):
    """Comparisons of candidates with one opponent, in any order."""

    preference: Tensor  # (N,) in [0, 1]: 1 the candidate wins, 0.5 a tie; a judge's probability
    length_difference: Tensor  # (N,) length of the candidate's answer minus the opponent's
    candidate: Tensor  # (N,) int64 in [0, M)
    prompt: Tensor  # (N,) int64 in [0, I)


def length_controlled_win_rates(
    verdicts: Verdicts,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    generator: torch.Generator,
) -> list[Interval]:
    """Win rate of each candidate at equal length, with a bootstrap over prompts.

    The difficulties γ are not drawn again, and the interval is at least as wide as Wilson's over
    the prompts.

    Args:
        verdicts: comparisons of M candidates on I prompts.
        confidence: probability that the interval should cover.
        resamples: number of bootstrap draws.
        generator: random numbers for the draws, on the CPU.

    Returns:
        M intervals, shares.

    Raises:
        ValueError: if the shapes differ, there is no verdict, or a preference is outside [0, 1].
    """
    check_shapes(
        preference=(verdicts.preference, "N"),
        length_difference=(verdicts.length_difference, "N"),
        candidate=(verdicts.candidate, "N"),
        prompt=(verdicts.prompt, "N"),
    )
    preference, y = verdicts.preference, verdicts.preference.double().cpu()
    if not len(preference) or not bool(((y >= 0) & (y <= 1)).all()):
        raise ValueError("a preference is needed, and each must lie in [0, 1].")
    candidate, prompt = verdicts.candidate.cpu(), verdicts.prompt.cpu()
    x = _scaled(verdicts.length_difference.double().cpu(), candidate)
    fold = candidate % min(FOLDS, int(candidate.max()) + 1)
    prompts = int(prompt.max()) + 1
    difficulties = [
        _difficulties(y[others], x[others], candidate[others], prompt[others], prompts)
        for others in (fold != number for number in fold.unique())
    ]
    tail = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    rates = []
    for number in range(int(candidate.max()) + 1):
        mine = (candidate == number).nonzero().squeeze(-1)
        if not len(mine):
            raise ValueError(f"candidate {number} has no verdict.")
        ids, member = torch.unique(prompt[mine], return_inverse=True)
        drawn = torch.randint(len(ids), (resamples, len(ids)), generator=generator)
        counts = torch.zeros(resamples, len(ids), dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        weights = torch.cat([torch.ones(1, len(mine), dtype=torch.float64), counts[:, member]])
        difficulty = difficulties[int(fold[mine[0]])][prompt[mine]]
        rate = _at_equal_length(y[mine], x[mine], difficulty, weights)
        low, high = rate[1:].quantile(tail).tolist()
        value = rate[0].item()
        interval = Interval(value, min(low, value), max(high, value))
        rates.append(at_least_wilson(interval, member, confidence=confidence))
    return rates


def _scaled(difference: Tensor, candidate: Tensor) -> Tensor:
    """(N,) tanh of the length difference in standard deviations of the candidate's differences."""
    scaled = torch.zeros_like(difference)
    for number in candidate.unique():
        mine = candidate == number
        spread = difference[mine].std(correction=0)
        if spread > 0:  # always the same difference cannot be told from the candidate's strength
            scaled[mine] = (difference[mine] / spread).tanh()
    return scaled


def _difficulties(y: Tensor, x: Tensor, candidate: Tensor, prompt: Tensor, prompts: int) -> Tensor:
    """(I,) γ of each prompt, mean 0, from one fit of these candidates; 0 where there are none."""
    if not len(y):
        return torch.zeros(prompts, dtype=torch.float64)
    sizes = int(candidate.max()) + 1, int(candidate.max()) + 1, prompts
    theta, phi, gamma = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in sizes)

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = theta[candidate] + phi[candidate] * x + gamma[prompt]
        total = binary_cross_entropy_with_logits(logits, y, reduction="sum")
        for prior, parameter in zip(PRIOR, (theta, phi, gamma), strict=True):
            total = total + prior / 2 * parameter.square().sum()
        total.backward()
        return total

    optimizer = torch.optim.LBFGS(
        [theta, phi, gamma], max_iter=500, tolerance_grad=1e-8, line_search_fn="strong_wolfe"
    )
    optimizer.step(loss)
    found = gamma.detach()
    return found - found.mean()


def _at_equal_length(y: Tensor, x: Tensor, difficulty: Tensor, weights: Tensor) -> Tensor:
    """(W,) win rate of a candidate at equal length, under each of W weightings of n verdicts.

    Shapes: y, x, difficulty (n,); weights (W, n).
    """
    features = torch.stack([torch.ones_like(x), x, difficulty], 1)
    products = (features.unsqueeze(2) * features.unsqueeze(1)).flatten(1)  # (n, 9)
    prior = torch.tensor(PRIOR, dtype=torch.float64)
    beta = torch.zeros(len(weights), 3, dtype=torch.float64)
    for _ in range(STEPS):
        p = (beta @ features.T).sigmoid()
        gradient = (weights * (y - p)) @ features - prior * beta
        curvature = ((weights * p * (1 - p)) @ products).view(-1, 3, 3)
        step = torch.linalg.solve(curvature + prior.diag(), gradient)
        # From afar Newton's step overshoots where the curvature is almost 0.
        beta = beta + step * (LONGEST / step.norm(dim=-1, keepdim=True)).clamp(max=1)
        if bool(step.abs().max() < 1e-9):
            break
    level = (beta[:, :1] + beta[:, 2:] * difficulty).sigmoid()
    return (weights * level).sum(1) / weights.sum(1)

"""The last layer of a reward model, fitted in an instant: logistic regression with a normal prior.

    P(a beats b) = σ(wᵀx),   x = h(a) - h(b),   w ~ N(0, τ²·I)

There is no intercept, so exchanging the answers of a pair changes nothing. Features are scaled so
that the mean of |x|² is 1: then τ is the standard deviation of a pair's log-odds before any vote.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PRIOR_SPREAD = 3.0  # τ, log-odds: 95 % of the pairs are won with a chance between .003 and .997
MOST_DIRECTIONS = 128  # that features are reduced to
_STEPS, _CLOSE, _SHORTEST = 100, 1e-7, 1e-6


class Space(NamedTuple):
    """The directions that features are read in, and their scale."""

    directions: Tensor  # (d, k) columns, orthonormal
    scale: float

    def __call__(self, features: Tensor) -> Tensor:
        """(N, d) -> (N, k) double."""
        return (features.double() @ self.directions) / self.scale


def space_of(features: Tensor, most: int = MOST_DIRECTIONS) -> Space:
    """The principal directions about 0 of differences, `most` at most, and their root mean square.

    About 0, since which answer is a is arbitrary: x and -x are the same pair.

    Args:
        features: (N, d) of the pool, finite.

    Raises:
        ValueError: if there are none, or one is not finite.
    """
    x = features.double()
    if x.dim() != 2 or not x.numel() or not bool(x.isfinite().all()):
        raise ValueError("space_of needs finite features of at least one pair.")
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    kept = int((values > values[-1] * 1e-10).sum())
    directions = vectors.flip(1)[:, : max(min(most, kept), 1)]
    size = (x @ directions).square().sum(1).mean().sqrt().item()
    return Space(directions, size or 1.0)


class Probe(NamedTuple):
    """What votes say about the last layer: a normal approximation at the mode (Laplace)."""

    mean: Tensor  # (k,) double
    precision: Tensor  # (k, k) double: of the prior and of the votes

    def logits(self, features: Tensor) -> Tensor:
        """(N,) log-odds that a beats b, at the mode."""
        return features @ self.mean

    def chances(self, features: Tensor) -> Tensor:
        """(N,) chance that a beats b, averaged over what w may be.

            σ(m / √(1 + π·v / 8)),   m the log-odds at the mode, v their variance

        Reference: MacKay 1992, https://doi.org/10.1162/neco.1992.4.5.720.
        """
        root = torch.linalg.cholesky(self.precision)
        spread = torch.linalg.solve_triangular(root, features.T, upper=False).square().sum(0)
        return torch.sigmoid(self.logits(features) / (1 + torch.pi / 8 * spread).sqrt())

    def information(self, features: Tensor) -> Tensor:
        """(N,) p·(1 - p): the weight of a vote on each pair."""
        p = self.chances(features)
        return p * (1 - p)

    def losses(self, features: Tensor, outcomes: Tensor) -> Tensor:
        """(N,) -log-likelihood of the votes at the averaged chances, nats; a tie counts as half."""
        p = self.chances(features).clamp(1e-12, 1 - 1e-12)
        return -(outcomes * p.log() + (1 - outcomes) * (-p).log1p())


def no_votes(size: int, spread: float = PRIOR_SPREAD) -> Probe:
    """The prior, N(0, τ²·I) in `size` directions."""
    return Probe(
        torch.zeros(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64) / spread**2
    )


def fit_probe(
    features: Tensor, outcomes: Tensor, prior: Probe | None = None, *, near: Tensor | None = None
) -> Probe:
    """The mode of w and its information, by Newton's method.

        E(w) = Σᵢ [log(1 + exp(wᵀxᵢ)) - yᵢ·wᵀxᵢ] + (w - w₀)ᵀ A₀ (w - w₀) / 2

    Args:
        features: (N, k), N may be 0.
        outcomes: (N,) 1 if a won, 0 if b did, 0.5 for a tie.
        prior: w₀ and A₀, for instance what earlier votes say; None = `no_votes`.
        near: (k,) where the search begins; the mode is the same, and sooner found from near by.

    Raises:
        ValueError: if the shapes differ, a value is not finite, or an outcome is not in [0, 1].
    """
    x, y = features.double(), outcomes.double()
    if x.dim() != 2 or y.shape != x.shape[:1]:
        raise ValueError("fit_probe needs features (N, k) and outcomes (N,).")
    if not bool(x.isfinite().all()) or not bool(((y >= 0) & (y <= 1)).all()):
        raise ValueError("fit_probe needs finite features, and outcomes between 0 and 1.")
    start, known = prior or no_votes(x.shape[1])
    w = start.clone() if near is None else near.clone()
    now = _energy(w, x, y, start, known)
    for _ in range(_STEPS):
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (p - y) + known @ (w - start)
        root = torch.linalg.cholesky((x * (p * (1 - p)).unsqueeze(1)).T @ x + known)
        step = torch.cholesky_solve(gradient.unsqueeze(1), root).squeeze(1)
        if float(step.abs().max()) < _CLOSE:
            break
        size = 1.0
        # Far from the mode a whole step may go too far; half of it, and so on, does not.
        while (then := _energy(w - size * step, x, y, start, known)) > now and size > _SHORTEST:
            size /= 2
        w, now = w - size * step, then
    p = torch.sigmoid(x @ w)
    return Probe(w, (x * (p * (1 - p)).unsqueeze(1)).T @ x + known)


def _energy(w: Tensor, x: Tensor, y: Tensor, start: Tensor, known: Tensor) -> float:
    z, off = x @ w, w - start
    return float((torch.nn.functional.softplus(z) - y * z).sum() + off @ known @ off / 2)

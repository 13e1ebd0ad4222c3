"""Rewards of the policy, token by token.

Results have the type of the input, or the wider of two. bfloat16 works with its 8 bits; pass
float32 for more.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.functional._contracts import check_shapes
from rlhf_core.functional.kinds import Combination, MissingEOS


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of each token: the KL penalty on every token, the score on the last.

        rₜ = -β·klₜ + 1[t = T]·score

    T is the last unmasked position of the row; a row without one gets no score.

    Args:
        scores: (B,) score of the whole response.
        kl: (B, R) KL estimate at each token in nats.
        mask: (B, R) True where a token counts.
        kl_coef: β, score per nat.

    Returns:
        (B, R) in the unit of the scores; 0 where masked.

    Raises:
        ValueError: if the shapes do not fit.

    Reference: Ziegler et al. 2019, equation 2, https://arxiv.org/abs/1909.08593.
    """
    check_shapes(scores=(scores, "B"), kl=(kl, "BR"), mask=(mask, "BR"))
    keep = mask.bool()
    still_to_come = keep.flip(-1).cumsum(-1).flip(-1)
    last = keep & (still_to_come == 1)
    penalty = -kl_coef * torch.where(keep, kl, 0)
    return penalty + torch.where(last, scores.unsqueeze(-1), 0)


def combine(parts: Tensor, *, how: Combination, variance_coef: float = 1.0) -> Tensor:
    """Combine several rewards into one; the methods differ in how they treat disagreement.

        sum:  Σₖ rₖ      mean:  r̄ = Σₖ rₖ / K      min:  minₖ rₖ
        mean_minus_variance:  r̄ - λ·Σₖ (rₖ - r̄)² / K

    Args:
        parts: (K, B) reward of each of B responses by each of K parts, weights included.
        how: which of the four.
        variance_coef: λ, per unit of the reward.

    Returns:
        (B,) in the unit of the parts.

    Raises:
        ValueError: if the shape does not fit, there is no part, or `how` is none of the four.

    Reference: Coste et al. 2023, section 3, https://arxiv.org/abs/2310.02743, where the last two
    are called worst-case and uncertainty-weighted optimisation.
    """
    check_shapes(parts=(parts, "KB"))
    if not len(parts):
        raise ValueError("there is no part to combine")
    if how == "sum":
        return parts.sum(0)
    if how == "mean":
        return parts.mean(0)
    if how == "min":
        return parts.amin(0)
    if how == "mean_minus_variance":
        return parts.mean(0) - variance_coef * parts.var(0, correction=0)
    raise ValueError(f"how must be sum, mean, min or mean_minus_variance, got {how!r}")


class Moments(NamedTuple):
    """Number, mean and spread of all values that were seen so far."""

    number: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # sum of the squared distances from the mean

    def with_values(self, values: Tensor) -> "Moments":
        """The moments of the values seen so far and of these, (N,).

            n = n₁ + n₂,  d = μ₂ - μ₁,  μ = μ₁ + d·n₂ / n,  S = S₁ + S₂ + d²·n₁·n₂ / n

        Reference: Chan et al. 1979, equation 2.1, http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773/CS-TR-79-773.pdf.
        """
        if not len(values):
            return self
        new = values.detach().double().cpu()
        n, mean = len(new), new.mean().item()
        total, apart = self.number + n, mean - self.mean
        return Moments(
            total,
            self.mean + apart * n / total,
            self.squares + (new - mean).square().sum().item() + apart**2 * self.number * n / total,
        )

    @property
    def std(self) -> float:
        """Standard deviation √(S / n); 0 for no value."""
        return math.sqrt(self.squares / self.number) if self.number else 0.0


def whiten(scores: Tensor, moments: Moments) -> Tensor:
    """Scores in standard deviations from the mean of all scores so far.

        (score - μ) / σ;   score - μ where σ is 0

    Shapes: (B,) -> (B,), without unit.

    Reference: Zheng et al. 2023, section 5.3.1, https://arxiv.org/abs/2307.04964.
    """
    return (scores - moments.mean) / (moments.std or 1.0)


def against_reference(scores: Tensor, reference: Tensor) -> Tensor:
    """How surely a response is better than reference responses to its prompt: bounded rewards.

        Σₘ σ(score - referenceₘ) / M

    Under a Bradley-Terry model with rewards in logits it is the probability that the response is
    preferred. It is steepest where both are alike and flat far above, where a hack would pay.

    Args:
        scores: (B,) score of the whole response.
        reference: (B, M) scores of M reference responses to the same prompt.

    Returns:
        (B,) in (0, 1).

    Raises:
        ValueError: if the shapes do not fit, or there is no reference.

    Reference: Fu et al. 2025, "preference as reward", https://arxiv.org/abs/2502.18770.
    """
    check_shapes(scores=(scores, "B"), reference=(reference, "BM"))
    if not reference.shape[1]:
        raise ValueError("there is no reference to compare with")
    return torch.sigmoid(scores.unsqueeze(-1) - reference).mean(-1)


def excess_length(lengths: Tensor, *, limit: int, coef: float) -> Tensor:
    """The penalty for tokens beyond a limit, to be subtracted from the score.

        coef·max(0, length - limit)

    Args:
        lengths: (B,) tokens of each response.
        limit: tokens that cost nothing.
        coef: price of each further token (reward units).

    Returns:
        (B,) in the unit of the scores, at least 0.

    Reference: Yu et al. 2025, equation 13, https://arxiv.org/abs/2503.14476, whose penalty also
    rises from a length on, and is 1 at the longest.
    """
    return coef * (lengths - limit).clamp(min=0)


def missing_eos(scores: Tensor, finished: Tensor, *, mode: MissingEOS, value: float) -> Tensor:
    """Change the scores of responses that never reached the end-of-sequence token.

        replace:  score = value          subtract:  score = score - value

    Args:
        scores: (B,) score of the whole response.
        finished: (B,) True where the end-of-sequence token was reached; these scores are unchanged.
        mode: whether `value` replaces the score or is subtracted from it.
        value: the new score, or the penalty (positive lowers the score), in the unit of the scores.

    Returns:
        (B,) in the unit of the scores.

    Raises:
        ValueError: if the shapes differ or the mode is unknown.

    Reference: Huang et al. 2024, "EOS trick", https://arxiv.org/abs/2403.17031.
    """
    check_shapes(scores=(scores, "B"), finished=(finished, "B"))
    match mode:
        case "replace":
            return torch.where(finished.bool(), scores, value)
        case "subtract":
            return torch.where(finished.bool(), scores, scores - value)
    raise ValueError(f"mode must be replace or subtract, got {mode!r}.")

"""Rewards of the policy, token by token.

Results have the type of the input, or the wider of two. bfloat16 works with its 8 bits; pass
float32 for more.
"""

from typing import Literal

import torch
from torch import Tensor

from rlhf_core.functional._contracts import check_shapes

Combination = Literal["sum", "mean", "min", "mean_minus_variance"]
MissingEOS = Literal["replace", "subtract"]


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

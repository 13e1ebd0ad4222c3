"""What the policy is paid for each token.

Results have the type of the input, the wider one where there are two. bfloat16 works, with its 8
bits; hand in float32 for more.
"""

from typing import Literal

import torch
from torch import Tensor

from rlhf_core.functional._contracts import check_shapes

MissingEOS = Literal["replace", "subtract"]


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of each token: the KL penalty everywhere, the score on the last token.

        rₜ = -β·klₜ + 1[t = T]·score

    T is the last place of the row that counts; a row without one gets nothing.

    Args:
        scores: (B,) score of the whole response.
        kl: (B, R) KL estimate at each token in nats.
        mask: (B, R) True where a token counts.
        kl_coef: β, score per nat.

    Returns:
        (B, R) in the unit of the scores; 0 in masked places.

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


def missing_eos(scores: Tensor, finished: Tensor, *, mode: MissingEOS, value: float) -> Tensor:
    """Judge the responses that never reached the end-of-sequence token.

        replace:  score = value          subtract:  score = score - value

    Args:
        scores: (B,) score of the whole response.
        finished: (B,) True where the end-of-sequence token was reached; such scores stay.
        mode: whether `value` stands in for the score or is taken off it.
        value: the stand-in, or the penalty (positive lowers the score), in the unit of the scores.

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

"""Statistics over unmasked positions. `mask` is True (or 1) where a position counts.

Masked values never matter, even NaN and infinity: they are replaced before any arithmetic, so that
they affect neither the result nor the gradient. Results have the type of `x`: pass float32 where
the 8 bits of bfloat16 are too few.
"""

import torch
from torch import Tensor

WHITEN_EPS = 1e-8


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of `x` over the unmasked positions; 0 if there are none.

        mean = Σᵢ mᵢ·xᵢ / max(Σᵢ mᵢ, 1)

    Args:
        x: any shape.
        mask: the shape of `x`, bool or 0/1.
        dim: the dimensions to reduce; all of them when None.

    Returns:
        The mean in the unit of `x`, without the reduced dimensions.

    Raises:
        ValueError: if the shapes differ.
    """
    keep = _as_bool(x, mask)
    return torch.where(keep, x, 0).sum(dim) / keep.sum(dim).clamp(min=1)


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = True
) -> Tensor:
    """Scale the unmasked positions to variance 1 and, by default, shift them to mean 0.

        y = (x - μ) / √(σ² + 1e-8)  [+ μ when the mean is kept]

    μ and σ² are the mean and the variance over all unmasked positions of the tensor; σ² is divided
    by n - 1 (`unbiased`) or by n. A single position has variance 0.

    Args:
        x: any shape.
        mask: the shape of `x`, bool or 0/1.
        shift_mean: False keeps the mean.
        unbiased: whether the variance is divided by n - 1.

    Returns:
        A tensor like `x`, without a unit; 0 where masked.

    Raises:
        ValueError: if the shapes differ.

    Reference: `whiten` of Ziegler et al. 2019, https://arxiv.org/abs/1909.08593.
    """
    keep = _as_bool(x, mask)
    mean = masked_mean(x, keep)
    centred = torch.where(keep, x - mean, 0)
    degrees = (keep.sum() - int(unbiased)).clamp(min=1)
    whitened = centred * torch.rsqrt(centred.square().sum() / degrees + WHITEN_EPS)
    return whitened if shift_mean else torch.where(keep, whitened + mean, 0)


def _as_bool(x: Tensor, mask: Tensor) -> Tensor:
    """The mask as bool, after checking that it has the shape of `x`."""
    if x.shape != mask.shape:
        raise ValueError(
            f"mask must have the shape {tuple(x.shape)} of x, got {tuple(mask.shape)}."
        )
    return mask.bool()

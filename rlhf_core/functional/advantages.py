"""Advantages: how much better a token was than the critic expected, or a response than its group.

Results have the type of the input, or the wider of two. bfloat16 works with its 8 bits; pass
float32 for more.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.functional._contracts import check_shapes

GROUP_EPS = 1e-4


class Advantages(NamedTuple):
    """The result of `gae`; masked positions are 0."""

    advantages: Tensor  # (B, R) Âₜ, not whitened
    returns: Tensor  # (B, R) Âₜ + V(sₜ), the target of the critic


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> Advantages:
    """Generalised advantage estimation.

        δₜ = rₜ + γ·V(sₜ₊₁) - V(sₜ),  Âₜ = δₜ + γλ·Âₜ₊₁,  returns = Â + V

    t + 1 is the next unmasked position: masked positions are skipped wherever they are, and V and Â
    after the last one are 0.

    Args:
        rewards: (B, R) rₜ.
        values: (B, R) V(sₜ), the critic's estimate before token t, in the unit of the rewards.
        mask: (B, R) True where a token counts.
        gamma: γ, the discount per token.
        lam: λ; 0 is the one-step error, 1 the full return.

    Returns:
        Advantages and returns, both (B, R) in the unit of the rewards.

    Raises:
        ValueError: if the shapes differ.

    Reference: Schulman et al. 2016, https://arxiv.org/abs/1506.02438.
    """
    check_shapes(rewards=(rewards, "BR"), values=(values, "BR"), mask=(mask, "BR"))
    keep = mask.bool()
    rewards, values = torch.where(keep, rewards, 0), torch.where(keep, values, 0)
    advantages = torch.zeros_like(rewards + values)  # the wider of the two types
    next_value = next_advantage = advantages.new_zeros(len(advantages))
    for t in reversed(range(advantages.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_value = torch.where(keep[:, t], values[:, t], next_value)
        next_advantage = torch.where(keep[:, t], advantages[:, t], next_advantage)
    advantages = torch.where(keep, advantages, 0)
    return Advantages(advantages, advantages + values)


def group_relative(scores: Tensor, group_size: int, *, scale: bool = True) -> Tensor:
    """How much better a response scored than its group: the advantage of GRPO.

        Aᵢ = (rᵢ - mean(r)) / (std(r) + 1e-4);  without `scale` Aᵢ = rᵢ - mean(r)

    mean and std (with n - 1) are over the responses to the same prompt. If all scores of a group
    are equal, its advantages are exactly 0.

    Args:
        scores: (B,) rᵢ, groups of consecutive rows.
        group_size: n, responses to each prompt.
        scale: False omits the division, which favours prompts whose scores are close (Dr. GRPO).

    Returns:
        (B,) without a unit; in that of the scores without `scale`.

    Raises:
        ValueError: if B is not a multiple of the group size, or that is below 2.

    References: Shao et al. 2024, section 4.1.2, https://arxiv.org/abs/2402.03300; without `scale`:
    Liu et al. 2025, https://arxiv.org/abs/2503.20783.
    """
    groups = _groups(scores, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale:
        centred = centred / (groups.std(1, keepdim=True) + GROUP_EPS)
    return centred.flatten()


def leave_one_out(scores: Tensor, group_size: int) -> Tensor:
    """How much better a response scored than the mean of the others: the advantage of RLOO.

        Aᵢ = rᵢ - Σⱼ≠ᵢ rⱼ / (n - 1)

    The others do not depend on response i, so the baseline is unbiased.

    Args:
        scores: (B,) rᵢ, groups of consecutive rows.
        group_size: n, responses to each prompt.

    Returns:
        (B,) in the unit of the scores; exactly 0 in a group with equal scores.

    Raises:
        ValueError: if B is not a multiple of the group size, or that is below 2.

    References: Kool et al. 2019, https://openreview.net/forum?id=r1lgTGL5DE; Ahmadian et al. 2024,
    https://arxiv.org/abs/2402.14740.
    """
    # rᵢ - (Σr - rᵢ) / (n - 1) = (rᵢ - mean) · n / (n - 1)
    return group_relative(scores, group_size, scale=False) * (group_size / (group_size - 1))


def _groups(scores: Tensor, group_size: int) -> Tensor:
    """(groups, n) scores, each less the first of its group, so that equal scores are exactly 0."""
    check_shapes(scores=(scores, "B"))
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2, got {group_size}.")
    if len(scores) % group_size:
        raise ValueError(f"{len(scores)} scores are not a multiple of the group_size {group_size}.")
    groups = scores.view(-1, group_size)
    return groups - groups[:, :1]

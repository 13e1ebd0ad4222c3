"""How much better a token was than the critic expected."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.functional._contracts import check_shapes


class Advantages(NamedTuple):
    """What `gae` gives back; masked places are 0."""

    advantages: Tensor  # (B, R) Âₜ, not whitened
    returns: Tensor  # (B, R) Âₜ + V(sₜ), the target of the critic


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> Advantages:
    """Generalised advantage estimation.

        δₜ = rₜ + γ·V(sₜ₊₁) - V(sₜ),  Âₜ = δₜ + γλ·Âₜ₊₁,  returns = Â + V

    t + 1 is the next place that counts: masked places are stepped over wherever they lie, and V
    and Â after the last one are 0.

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
    """PROVISIONAL (being replaced)."""
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4) if scale else centred).flatten()


def leave_one_out(scores: Tensor, group_size: int) -> Tensor:
    """PROVISIONAL (being replaced)."""
    groups = scores.view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()

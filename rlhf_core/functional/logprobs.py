"""From logits to log-probabilities, entropy and KL, all in nats.

Half-precision logits are raised to float32 first: bfloat16 keeps 8 bits, and a ratio of two
probabilities needs more.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from rlhf_core.functional._contracts import check_shapes

KLKind = Literal["k1", "k2", "k3"]
TokenLoss: TypeAlias = Callable[[Tensor, slice], Tensor]


class ChunkedLoss(NamedTuple):
    """A sum of losses over tokens, and what it was made of."""

    loss: Tensor  # ()
    logprobs: Tensor  # (N,) nats
    entropy: Tensor | None  # (N,) nats


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token under the logits that predict it.

        log π(aₜ|sₜ) = zₜ[aₜ] / τ - log Σᵥ exp(zₜ[v] / τ)

    Args:
        logits: (B, R, V), where `logits[:, t]` predicts `tokens[:, t]`: the shift is the caller's.
        tokens: (B, R) int64; a padded place may hold any id of the vocabulary.
        temperature: τ, the one that the tokens were sampled with.

    Returns:
        (B, R) in nats.

    Raises:
        ValueError: if the shapes do not fit or the temperature is not positive.
    """
    check_shapes(logits=(logits, "BRV"), tokens=(tokens, "BR"))
    return _log_softmax(logits, temperature).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def chunked_token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int = 256,
) -> Tensor:
    """PROVISIONAL (being replaced): plain autograd."""
    logits = torch.nn.functional.linear(hidden, lm_head_weight.to(hidden.dtype), bias)
    flat = token_logprobs(logits.flatten(0, -2)[None], tokens.flatten()[None], temperature=temperature)
    return flat.view(tokens.shape)


def chunked_token_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    tokens: Tensor,
    token_loss: TokenLoss,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int = 256,
    with_entropy: bool = False,
) -> ChunkedLoss:
    """PROVISIONAL (being replaced): plain autograd."""
    logits = torch.nn.functional.linear(hidden, lm_head_weight.to(hidden.dtype), bias)[None]
    logprobs = token_logprobs(logits, tokens[None], temperature=temperature)[0]
    spread = entropy(logits, temperature=temperature)[0].detach() if with_entropy else None
    return ChunkedLoss(token_loss(logprobs, slice(0, len(tokens))), logprobs.detach(), spread)


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy of the distribution over the next token.

        H = -Σᵥ π(v)·log π(v),  π = softmax(z / τ)

    A token with logit -∞ is impossible and adds nothing.

    Args:
        logits: (B, R, V).
        temperature: τ.

    Returns:
        (B, R) in nats, between 0 and log V.

    Raises:
        ValueError: if the shape does not fit or the temperature is not positive.
    """
    check_shapes(logits=(logits, "BRV"))
    logprobs = _log_softmax(logits, temperature)
    probs = logprobs.exp()
    # Filled before the product: 0·(-∞) is NaN, and so would be its gradient.
    return -(probs * logprobs.masked_fill(probs == 0, 0)).sum(-1)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, kind: KLKind = "k1") -> Tensor:
    """Estimate KL(π ‖ π_ref) at each token from the token that π sampled.

        d = log π - log π_ref;  k1 = d,  k2 = d² / 2,  k3 = exp(-d) - 1 + d

    k1 and k3 are unbiased; k2 and k3 are never negative; k3 has the variance of k2 when the two
    policies are close.

    Args:
        logprobs: log π(a|s), (B, R) in nats.
        ref_logprobs: log π_ref(a|s), (B, R) in nats.
        kind: which estimator.

    Returns:
        (B, R) in nats.

    Raises:
        ValueError: if the shapes differ or the kind is unknown.

    Reference: Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    check_shapes(logprobs=(logprobs, "BR"), ref_logprobs=(ref_logprobs, "BR"))
    d = logprobs - ref_logprobs
    match kind:
        case "k1":
            return d
        case "k2":
            return d.square() / 2
        case "k3":
            return torch.expm1(-d) + d  # expm1: exp(-d) - 1 loses every digit where d is small
    raise ValueError(f"kind must be k1, k2 or k3, got {kind!r}.")


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-softmax of the logits over the temperature, in float32 or better."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide / temperature, dim=-1)

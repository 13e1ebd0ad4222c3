"""Log-probabilities, entropy and KL from logits, all in nats.

Half-precision logits are converted to float32 first: bfloat16 has 8 bits, and a ratio of two
probabilities needs more.

The chunked functions start from the hidden states instead and never hold the logits of more than a
chunk of tokens; see `chunked_head`.
"""

import string

import torch
from torch import Tensor

from rlhf_core.functional._contracts import check_shapes
from rlhf_core.functional.chunked_head import (
    ChunkedLoss,
    Head,
    LogprobsInChunks,
    LossInChunks,
    TokenLoss,
)
from rlhf_core.functional.kinds import KLKind


def token_logprobs(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token under the logits that predict it.

        log π(aₜ|sₜ) = zₜ[aₜ] / τ - log Σᵥ exp(zₜ[v] / τ)

    Args:
        logits: (B, R, V), where `logits[:, t]` predicts `tokens[:, t]`: the caller shifts them.
        tokens: (B, R) int64; a padded position may have any id of the vocabulary.
        temperature: τ, with which the tokens were sampled.

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
    cast_weight: Tensor | None = None,
) -> Tensor:
    """`token_logprobs(hidden @ W.T + b, tokens)` and its gradient, a chunk of tokens at a time.

        log π(aₜ|sₜ) = zₜ[aₜ] - log Σᵥ exp(zₜ[v]),  zₜ = (W·hₜ + b) / τ

    The backward computes the logits again instead of storing them: four matrix products instead of
    three. If the loss is known, `chunked_token_loss` needs only three.

    Args:
        hidden: (..., d), where `hidden[t]` predicts `tokens[t]`: the caller shifts them. With
            bfloat16 the products are computed in bfloat16, with the weight cast to it; everything
            between them and the sum of the weight's gradient are in float32. With float16 the
            values are right, but small gradients vanish.
        lm_head_weight: W, (V, d).
        tokens: (...) int64.
        bias: b, (V,).
        temperature: τ, with which the tokens were sampled.
        chunk_size: most tokens whose logits exist at a time.
        cast_weight: W in the type of `hidden`, if the caller has it already; the gradient is W's.

    Returns:
        (...) in nats, float32 or wider. Gradients reach hidden, weight and bias.

    Raises:
        ValueError: if the shapes do not fit, or temperature or chunk size is not positive.
    """
    _check_head(hidden, lm_head_weight, bias, tokens, temperature, chunk_size, cast_weight)
    flat = hidden.reshape(-1, hidden.shape[-1])
    found: Tensor = LogprobsInChunks.apply(  # type: ignore[no-untyped-call]
        flat, lm_head_weight, bias, tokens.reshape(-1), temperature, chunk_size, cast_weight
    )
    return found.view(tokens.shape)


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
    cast_weight: Tensor | None = None,
) -> ChunkedLoss:
    """A loss that is a sum over tokens, and its gradient, in one sweep over chunks of tokens.

        loss = Σₜ ℓₜ(log π(aₜ|sₜ)),  zₜ = (W·hₜ + b) / τ
        ∂loss/∂zₜ = ℓₜ'·(1[v = aₜ] - π(v|sₜ))

    A chunk's loss is differentiated as soon as its logits are computed, so they are computed once
    and not stored: three matrix products, as many as with stored logits. The forward computes the
    gradient (if gradients are enabled); the backward only scales it.

    Args:
        hidden: (N, d), where `hidden[t]` predicts `tokens[t]`; bfloat16 as in
            `chunked_token_logprobs`.
        lm_head_weight: W, (V, d).
        tokens: (N,) int64.
        token_loss: maps the (n,) log-probabilities of a chunk, and their slice of the N tokens, to
            the () sum of their losses. Anything else it uses is a constant.
        bias: b, (V,).
        temperature: τ, with which the tokens were sampled.
        chunk_size: most tokens whose logits exist at a time.
        with_entropy: whether to return the entropy of each distribution too.
        cast_weight: as in `chunked_token_logprobs`.

    Returns:
        The loss (0 without tokens), and as constants log-probabilities and entropies in nats,
        float32 or wider. Gradients reach hidden, weight and bias.

    Raises:
        ValueError: if the shapes do not fit, or temperature or chunk size is not positive.
    """
    check_shapes(tokens=(tokens, "N"))
    _check_head(hidden, lm_head_weight, bias, tokens, temperature, chunk_size, cast_weight)
    if torch.is_grad_enabled():
        found = LossInChunks.apply(  # type: ignore[no-untyped-call]
            hidden,
            lm_head_weight,
            bias,
            tokens,
            temperature,
            chunk_size,
            token_loss,
            with_entropy,
            cast_weight,
        )
        return ChunkedLoss(*found)
    head = Head(hidden, lm_head_weight, bias, temperature, chunk_size, cast_weight=cast_weight)
    return head.sweep(tokens, token_loss, with_entropy)


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
    # Fill before the product: 0·(-∞) is NaN, and so is its gradient.
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


def _check_temperature(temperature: float) -> None:
    """At 0 the distribution is a point and has no gradient."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-softmax of the logits divided by the temperature, in float32 or wider."""
    _check_temperature(temperature)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide / temperature, dim=-1)


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    chunk_size: int,
    cast_weight: Tensor | None,
) -> None:
    """Check the input of both chunked functions."""
    leading = string.ascii_lowercase[: tokens.ndim]
    check_shapes(
        tokens=(tokens, leading),
        hidden=(hidden, leading + "D"),
        lm_head_weight=(weight, "VD"),
        **({} if bias is None else {"bias": (bias, "V")}),
        **({} if cast_weight is None else {"cast_weight": (cast_weight, "VD")}),
    )
    _check_temperature(temperature)
    if cast_weight is not None and cast_weight.dtype != hidden.dtype:
        raise ValueError(
            f"cast_weight must have the type of hidden, got {cast_weight.dtype} and {hidden.dtype}."
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")

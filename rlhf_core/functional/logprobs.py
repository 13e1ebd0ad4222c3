"""From logits to log-probabilities, entropy and KL, all in nats.

Half-precision logits are raised to float32 first: bfloat16 keeps 8 bits, and a ratio of two
probabilities needs more.

The chunked functions start from the hidden states instead, and never hold more logits than those of
a chunk of tokens: (T, V) is by far the largest tensor of a language model with a small trunk.
"""

import math
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_core.functional._contracts import check_shapes

KLKind = Literal["k1", "k2", "k3"]
PART = 1024  # rows of a (V, n) matrix that are worked on at a time
TokenLoss: TypeAlias = Callable[[Tensor, slice], Tensor]


class ChunkedLoss(NamedTuple):
    """What `chunked_token_loss` gives back; only the loss can be differentiated."""

    loss: Tensor  # () the sum over the tokens
    logprobs: Tensor  # (N,) nats
    entropy: Tensor | None  # (N,) nats, if it was asked for


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
    """`token_logprobs(hidden @ W.T + b, tokens)` and its gradient, a chunk of tokens at a time.

        log π(aₜ|sₜ) = zₜ[aₜ] - log Σᵥ exp(zₜ[v]),  zₜ = (W·hₜ + b) / τ

    The backward computes the logits again instead of keeping them: four matrix products where the
    plain way has three. Where the loss is known, `chunked_token_loss` does with three.

    Args:
        hidden: (..., d), where `hidden[t]` predicts `tokens[t]`: the shift is the caller's. In
            bfloat16 the products are computed in bfloat16, with the weight cast to it, everything
            between them and the sum of the weight's gradient in float32. In float16 the values are
            right, but small gradients vanish.
        lm_head_weight: W, (V, d).
        tokens: (...) int64.
        bias: b, (V,).
        temperature: τ, the one that the tokens were sampled with.
        chunk_size: tokens whose logits exist at a time, at most.

    Returns:
        (...) in nats, float32 or wider. Gradients reach hidden, weight and bias.

    Raises:
        ValueError: if the shapes do not fit, or temperature or chunk size is not positive.
    """
    _check_head(hidden, lm_head_weight, bias, tokens, temperature, chunk_size)
    flat = hidden.reshape(-1, hidden.shape[-1])
    found: Tensor = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        flat, lm_head_weight, bias, tokens.reshape(-1), temperature, chunk_size
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
) -> ChunkedLoss:
    """A loss that is a sum over tokens, and its gradient, in one sweep over chunks of tokens.

        loss = Σₜ ℓₜ(log π(aₜ|sₜ)),  zₜ = (W·hₜ + b) / τ
        ∂loss/∂zₜ = ℓₜ'·(1[v = aₜ] - π(v|sₜ))

    A chunk's loss can be differentiated as soon as its logits are there, so they are computed once
    and kept nowhere: three matrix products, as many as for logits that are stored. The gradient is
    made in the forward (if gradients are on); the backward only scales it.

    Args:
        hidden: (N, d), where `hidden[t]` predicts `tokens[t]`; bfloat16 as in
            `chunked_token_logprobs`.
        lm_head_weight: W, (V, d).
        tokens: (N,) int64.
        token_loss: from the (n,) log-probabilities of a chunk, and the slice of the N tokens that
            they are, to the () sum of their losses. What else it uses is a constant.
        bias: b, (V,).
        temperature: τ, the one that the tokens were sampled with.
        chunk_size: tokens whose logits exist at a time, at most.
        with_entropy: whether to return the entropy of each distribution as well.

    Returns:
        The loss, 0 without a token, and constants: log-probabilities and entropies in nats, float32
        or wider. Gradients reach hidden, weight and bias.

    Raises:
        ValueError: if the shapes do not fit, or temperature or chunk size is not positive.
    """
    check_shapes(tokens=(tokens, "N"))
    _check_head(hidden, lm_head_weight, bias, tokens, temperature, chunk_size)
    if torch.is_grad_enabled():
        loss, logprobs, spread = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            hidden, lm_head_weight, bias, tokens, temperature, chunk_size, token_loss, with_entropy
        )
        return ChunkedLoss(loss, logprobs, spread)
    head = _Head(hidden, lm_head_weight, bias, temperature, chunk_size)
    return _sweep(head, tokens, token_loss, with_entropy)


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


def _check_temperature(temperature: float) -> None:
    """At 0 the distribution is a point, and has no gradient."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-softmax of the logits over the temperature, in float32 or better."""
    _check_temperature(temperature)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide / temperature, dim=-1)


# --- the head, chunk by chunk ---


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    chunk_size: int,
) -> None:
    """What both chunked functions ask of their input."""
    leading = string.ascii_lowercase[: tokens.ndim]
    check_shapes(
        tokens=(tokens, leading),
        hidden=(hidden, leading + "D"),
        lm_head_weight=(weight, "VD"),
        **({} if bias is None else {"bias": (bias, "V")}),
    )
    _check_temperature(temperature)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")


class _Chunk(NamedTuple):
    """A chunk of tokens after the softmax. `weights` lies in a buffer that the next one reuses."""

    span: slice
    tokens: Tensor  # (n,)
    logprobs: Tensor  # (n,)
    entropy: Tensor | None  # (n,)
    weights: Tensor  # (V, n) exp(z - max z)
    total: Tensor  # (n,) their sum: π = weights / total


class _Head:
    """The head of a language model, and the gradients that it has collected, chunk by chunk.

    Logits are laid out (V, n): matrix libraries are up to twice as fast there as at (n, V). All
    chunks share one buffer, as touching fresh memory costs more than the arithmetic on it.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        chunk_size: int,
        wanted: Sequence[bool] = (False, False, False),  # gradients: hidden, weight, bias
    ) -> None:
        self.hidden = hidden
        self.weight = weight.to(hidden.dtype)
        self.bias = None if bias is None else bias.to(hidden.dtype)
        self.scale = 1 / temperature
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        chunks = math.ceil(len(hidden) / chunk_size)
        self.size = math.ceil(len(hidden) / max(chunks, 1))  # equal chunks, and no tiny last one
        room = len(weight) * self.size
        self._factors = hidden.new_empty(room)
        narrow = hidden.dtype != self.dtype
        self._logits = hidden.new_empty(room, dtype=self.dtype) if narrow else self._factors
        self.grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        # The first chunk writes and the others add: clearing it beforehand would cost a pass.
        self.grad_weight = torch.empty_like(weight, dtype=self.dtype) if wanted[1] else None
        if self.grad_weight is not None and not len(hidden):
            self.grad_weight.zero_()
        self.grad_bias = hidden.new_zeros(len(weight), dtype=self.dtype) if wanted[2] else None

    def chunks(self, tokens: Tensor, *, with_entropy: bool = False) -> Iterator[_Chunk]:
        """Log-probabilities of the tokens; a chunk is void when the next is asked for."""
        for start in range(0, len(tokens), max(self.size, 1)):
            span = slice(start, min(start + self.size, len(tokens)))
            yield self._chunk(span, tokens[span], with_entropy)

    def _chunk(self, span: slice, tokens: Tensor, with_entropy: bool) -> _Chunk:
        logits = self._project(self.hidden[span])
        highest = logits.amax(0)
        picked = logits.gather(0, tokens.unsqueeze(0)).squeeze(0) - highest
        total, expected = torch.zeros_like(highest), torch.zeros_like(highest)
        for part in logits.split(PART):  # small enough to stay in a cache from step to step
            part.sub_(highest)
            if with_entropy:
                weights = part.exp()
                # An impossible token adds 0·(-∞), which is NaN; other NaN are in the total as well.
                expected += part.mul_(weights).nansum(0)
                part.copy_(weights)
            else:
                part.exp_()
            total += part.sum(0)
        log_total = total.log()
        spread = log_total - expected / total if with_entropy else None
        return _Chunk(span, tokens, picked - log_total, spread, logits, total)

    def _project(self, hidden: Tensor) -> Tensor:
        """(V, n) logits over the temperature, in a buffer."""
        shape = torch.Size((len(self.weight), len(hidden)))
        out = _fold(self._factors, shape)
        start = out if self.bias is None else self.bias.unsqueeze(1)
        beta = 0 if self.bias is None else self.scale
        torch.addmm(start, self.weight, hidden.T, beta=beta, alpha=self.scale, out=out)
        return out if self._logits is self._factors else _fold(self._logits, shape).copy_(out)

    def add_gradient(self, chunk: _Chunk, upstream: Tensor) -> None:
        """Collect what d loss / d logprob of a chunk means for hidden, weight and bias.

        With e the weights and s their total, ∂/∂z = -(e - s·1[v = a])·upstream / s. The column
        factor upstream / s goes to the narrow side of each product: no pass over (V, n) for it.
        """
        weights, columns = chunk.weights, torch.arange(len(chunk.tokens), device=chunk.total.device)
        weights[chunk.tokens, columns] -= chunk.total
        factor = upstream * (-self.scale / chunk.total)
        if self.grad_bias is not None:
            self.grad_bias.addmv_(weights, factor)
        if weights.dtype != self.hidden.dtype:
            weights = _fold(self._factors, weights.shape).copy_(weights)
        if self.grad_hidden is not None:
            out = self.grad_hidden[chunk.span]
            torch.mm(weights.T, self.weight, out=out).mul_(factor.unsqueeze(1))
        if self.grad_weight is not None:
            scaled = (self.hidden[chunk.span] * factor.unsqueeze(1)).to(weights.dtype)
            first = chunk.span.start == 0
            if weights.dtype == self.dtype:
                self.grad_weight.addmm_(weights, scaled, beta=0 if first else 1)
            elif first:
                self.grad_weight.copy_(weights @ scaled)
            else:
                self.grad_weight += weights @ scaled


def _fold(buffer: Tensor, shape: torch.Size) -> Tensor:
    """The front of a flat buffer as a contiguous matrix."""
    return buffer[: shape.numel()].view(shape)


def _sweep(
    head: _Head,
    tokens: Tensor,
    token_loss: TokenLoss,
    with_entropy: bool,
    *,
    learns: bool = False,
) -> ChunkedLoss:
    """The losses of all chunks, and their gradients in the head."""
    loss = torch.zeros((), dtype=head.dtype, device=tokens.device)
    logprobs = torch.empty(tokens.shape, dtype=head.dtype, device=tokens.device)
    entropies = torch.empty_like(logprobs) if with_entropy else None
    for chunk in head.chunks(tokens, with_entropy=with_entropy):
        logprobs[chunk.span] = chunk.logprobs
        if entropies is not None and chunk.entropy is not None:
            entropies[chunk.span] = chunk.entropy
        with torch.set_grad_enabled(learns):
            leaf = chunk.logprobs.requires_grad_(learns)
            part = token_loss(leaf, chunk.span)
        loss += part.detach()
        if learns:
            head.add_gradient(chunk, *torch.autograd.grad(part, leaf))
    return ChunkedLoss(loss, logprobs, entropies)


class _ChunkedLogprobs(torch.autograd.Function):
    """Values now; logits once more, and the gradient, in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        chunk_size: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, tokens)
        ctx.settings = (temperature, chunk_size)
        head = _Head(hidden, weight, bias, temperature, chunk_size)
        parts = [chunk.logprobs for chunk in head.chunks(tokens)]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=head.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens = ctx.saved_tensors
        temperature, chunk_size = ctx.settings
        wanted = ctx.needs_input_grad[:3]
        head = _Head(hidden, weight, bias, temperature, chunk_size, wanted)
        for chunk in head.chunks(tokens):
            head.add_gradient(chunk, upstream[chunk.span])
        return head.grad_hidden, head.grad_weight, head.grad_bias, None, None, None


class _ChunkedLoss(torch.autograd.Function):
    """Values and gradient now; the backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        chunk_size: int,
        token_loss: TokenLoss,
        with_entropy: bool,
    ) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:3]
        head = _Head(hidden, weight, bias, temperature, chunk_size, wanted)
        out = _sweep(head, tokens, token_loss, with_entropy, learns=any(wanted))
        # Saved tensors are let go after use, so that autograd can take them over without a copy.
        ctx.save_for_backward(head.grad_hidden, head.grad_weight, head.grad_bias)
        ctx.mark_non_differentiable(*(part for part in out[1:] if part is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients: Sequence[Tensor | None] = ctx.saved_tensors
        # On a GPU the question would wait for the device, which costs more than the product.
        if upstream.is_cuda or upstream.item() != 1:
            gradients = [g if g is None else g * upstream for g in gradients]
        return (*gradients, *[None] * 5)

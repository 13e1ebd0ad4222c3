"""The head of a language model, computed a chunk of tokens at a time: `token_logprobs` and
`entropy` of `hidden @ W.T + b` and their gradient, without the (T, V) logits.

(T, V) is by far the largest tensor of a language model with a small trunk. The public functions are
`chunked_token_logprobs` and `chunked_token_loss` in `logprobs`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PART = 1024  # rows of a (V, n) matrix that are worked on at a time
NARROW_PART = 1 << 17  # numbers of a narrow (V, n) matrix that are widened at a time
TokenLoss: TypeAlias = Callable[[Tensor, slice], Tensor]


class ChunkedLoss(NamedTuple):
    """The result of `chunked_token_loss`; only the loss can be differentiated."""

    loss: Tensor  # () the sum over the tokens
    logprobs: Tensor  # (N,) nats
    entropy: Tensor | None  # (N,) nats, if requested


class Chunk(NamedTuple):
    """A chunk of tokens after the softmax. The next chunk reuses the buffer of `weights`."""

    span: slice
    tokens: Tensor  # (n,)
    logprobs: Tensor  # (n,)
    entropy: Tensor | None  # (n,)
    weights: Tensor  # (V, n) exp(z - max z), in the type of the hidden states
    total: Tensor  # (n,) their sum: π = weights / total


class Head:
    """The head of a language model, and its gradients, accumulated chunk by chunk.

    Logits have the layout (V, n), in which matrix libraries are up to twice as fast as in (n, V).
    All chunks share one buffer, since touching fresh memory costs more than the arithmetic on it.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        chunk_size: int,
        wanted: Sequence[bool] = (False, False, False),  # gradients: hidden, weight, bias
        cast_weight: Tensor | None = None,  # the weight in the type of `hidden`, if there is one
    ) -> None:
        self.hidden = hidden
        self.weight = weight.to(hidden.dtype) if cast_weight is None else cast_weight
        self.bias = None if bias is None else bias.to(hidden.dtype)
        self.scale = 1 / temperature
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        chunks = math.ceil(len(hidden) / chunk_size)
        self.size = math.ceil(len(hidden) / max(chunks, 1))  # equal chunks, and no tiny last one
        self._buffer = hidden.new_empty(len(weight) * self.size)
        self._narrow = hidden.dtype != self.dtype
        self.grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        # The first chunk writes and the others add: clearing it first would cost a pass.
        self.grad_weight = torch.empty_like(weight, dtype=self.dtype) if wanted[1] else None
        if self.grad_weight is not None and not len(hidden):
            self.grad_weight.zero_()
        self.grad_bias = hidden.new_zeros(len(weight), dtype=self.dtype) if wanted[2] else None

    def chunks(self, tokens: Tensor, *, with_entropy: bool = False) -> Iterator[Chunk]:
        """Log-probabilities of the tokens; a chunk is invalid once the next one is requested."""
        for start in range(0, len(tokens), max(self.size, 1)):
            span = slice(start, min(start + self.size, len(tokens)))
            yield self._chunk(span, tokens[span], with_entropy)

    def _chunk(self, span: slice, tokens: Tensor, with_entropy: bool) -> Chunk:
        logits = self._project(self.hidden[span])
        highest = logits.amax(0).to(self.dtype)
        picked = logits.gather(0, tokens.unsqueeze(0)).squeeze(0).to(self.dtype) - highest
        total, expected = torch.zeros_like(highest), torch.zeros_like(highest)
        rows = max(NARROW_PART // len(tokens), 1) if self._narrow else PART
        for part in logits.split(rows):  # small enough to stay in the cache
            wide = part.to(self.dtype).sub_(highest)
            weights = wide.exp() if with_entropy else wide.exp_()
            if with_entropy:
                # An impossible token adds 0·(-∞), which is NaN; any other NaN is in the total too.
                expected += wide.mul_(weights).nansum(0)
            total += weights.sum(0)
            if weights is not part:
                part.copy_(weights)
        log_total = total.log()
        entropy = log_total - expected / total if with_entropy else None
        return Chunk(span, tokens, picked - log_total, entropy, logits, total)

    def _project(self, hidden: Tensor) -> Tensor:
        """(V, n) logits divided by the temperature, in the buffer."""
        shape = torch.Size((len(self.weight), len(hidden)))
        out = _fold(self._buffer, shape)
        start = out if self.bias is None else self.bias.unsqueeze(1)
        beta = 0 if self.bias is None else self.scale
        return torch.addmm(start, self.weight, hidden.T, beta=beta, alpha=self.scale, out=out)

    def add_gradient(self, chunk: Chunk, upstream: Tensor) -> None:
        """Add the gradients of hidden, weight and bias, given d loss / d logprob of a chunk.

        With e the weights and s their total, ∂/∂z = -(e - s·1[v = a])·upstream / s. The column
        factor upstream / s is applied to the narrow side of each product, which saves a pass over
        (V, n).
        """
        weights, columns = chunk.weights, torch.arange(len(chunk.tokens), device=chunk.total.device)
        if self._narrow:  # one rounding, of the difference
            picked = chunk.logprobs.exp() * chunk.total - chunk.total
            weights[chunk.tokens, columns] = picked.to(weights.dtype)
        else:
            weights[chunk.tokens, columns] -= chunk.total
        factor = upstream * (-self.scale / chunk.total)
        if self.grad_bias is not None:
            rows = PART if self._narrow else len(weights)
            for part, into in zip(weights.split(rows), self.grad_bias.split(rows), strict=True):
                into.addmv_(part.to(self.dtype), factor)
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

    def sweep(
        self,
        tokens: Tensor,
        token_loss: TokenLoss,
        with_entropy: bool,
        *,
        learns: bool = False,
    ) -> ChunkedLoss:
        """The losses of all chunks; accumulates their gradients if `learns`."""
        loss = torch.zeros((), dtype=self.dtype, device=tokens.device)
        logprobs = torch.empty(tokens.shape, dtype=self.dtype, device=tokens.device)
        entropies = torch.empty_like(logprobs) if with_entropy else None
        for chunk in self.chunks(tokens, with_entropy=with_entropy):
            logprobs[chunk.span] = chunk.logprobs
            if entropies is not None and chunk.entropy is not None:
                entropies[chunk.span] = chunk.entropy
            with torch.set_grad_enabled(learns):
                leaf = chunk.logprobs.requires_grad_(learns)
                part = token_loss(leaf, chunk.span)
            loss += part.detach()
            if learns:
                self.add_gradient(chunk, *torch.autograd.grad(part, leaf))
        return ChunkedLoss(loss, logprobs, entropies)


class LogprobsInChunks(torch.autograd.Function):
    """The forward computes values; the backward computes the logits again, and the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        chunk_size: int,
        cast_weight: Tensor | None,
    ) -> Tensor:
        """(N,) log-probabilities."""
        ctx.save_for_backward(hidden, weight, bias, tokens, cast_weight)
        ctx.settings = (temperature, chunk_size)
        head = Head(hidden, weight, bias, temperature, chunk_size, cast_weight=cast_weight)
        parts = [chunk.logprobs for chunk in head.chunks(tokens)]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=head.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of each input of the forward."""
        hidden, weight, bias, tokens, cast_weight = ctx.saved_tensors
        temperature, chunk_size = ctx.settings
        wanted = ctx.needs_input_grad[:3]
        head = Head(hidden, weight, bias, temperature, chunk_size, wanted, cast_weight)
        for chunk in head.chunks(tokens):
            head.add_gradient(chunk, upstream[chunk.span])
        return head.grad_hidden, head.grad_weight, head.grad_bias, *[None] * 4


class LossInChunks(torch.autograd.Function):
    """The forward computes values and gradient; the backward only scales the gradient."""

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
        cast_weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """The fields of a `ChunkedLoss`."""
        wanted = ctx.needs_input_grad[:3]
        head = Head(hidden, weight, bias, temperature, chunk_size, wanted, cast_weight)
        out = head.sweep(tokens, token_loss, with_entropy, learns=any(wanted))
        # Saved tensors are released after use, so that autograd can reuse them without a copy.
        ctx.save_for_backward(head.grad_hidden, head.grad_weight, head.grad_bias)
        ctx.mark_non_differentiable(*(part for part in out[1:] if part is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of each input of the forward."""
        gradients: Sequence[Tensor | None] = ctx.saved_tensors
        # On a GPU `item` would wait for the device, which costs more than the product.
        if upstream.is_cuda or upstream.item() != 1:
            gradients = [g if g is None else g * upstream for g in gradients]
        return (*gradients, *[None] * 6)


def _fold(buffer: Tensor, shape: torch.Size) -> Tensor:
    """The front of a flat buffer as a contiguous matrix."""
    return buffer[: shape.numel()].view(shape)

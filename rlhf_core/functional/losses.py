"""The losses.

Sums and token counts are returned separately, or the count of the whole minibatch is passed in: a
mean per micro-batch, averaged over micro-batches of unequal length, would be another objective.

`completion_nll` converts half-precision logits to float32. The other losses have the widest type of
their inputs: a ratio of bfloat16 log-probabilities has already lost its digits, so pass float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rlhf_core.functional._contracts import check_shapes
from rlhf_core.functional.logprobs import token_logprobs

IGNORE_INDEX = -100
MAX_LOG_RATIO = 20.0


class TokenNLL(NamedTuple):
    """A sum over tokens, and their number; divide by the tokens of the whole minibatch."""

    total: Tensor  # () nats
    tokens: Tensor  # () int64


class ClippedLoss(NamedTuple):
    """A clipped loss. With a common `normalizer` both fields add up over micro-batches."""

    loss: Tensor  # ()
    clip_fraction: Tensor  # () share of the tokens with no gradient because of the clip


class DPOLoss(NamedTuple):
    """The result of `dpo`; only the loss can be differentiated."""

    loss: Tensor  # () nats
    chosen_rewards: Tensor  # (B,) implicit rewards
    rejected_rewards: Tensor  # (B,)


def token_nll(logprobs: Tensor, *, normalizer: Tensor | float | None = None) -> Tensor:
    """Negative log-likelihood of the target tokens: the loss of SFT.

        loss = -Σₜ log π(yₜ|sₜ) / n

    Args:
        logprobs: (N,) log π of these tokens in nats.
        normalizer: n, the tokens of the whole minibatch; N when None. At least 1.

    Returns:
        () in nats; 0 without tokens.

    Raises:
        ValueError: if the shape does not fit.
    """
    check_shapes(logprobs=(logprobs, "N"))
    n = torch.as_tensor(len(logprobs) if normalizer is None else normalizer)
    return -logprobs.sum() / n.clamp(min=1)


def completion_nll(logits: Tensor, labels: Tensor) -> TokenNLL:
    """Negative log-likelihood of the labelled tokens, summed: `token_nll` of `token_logprobs`.

        total = -Σₜ 1[labelₜ ≠ -100]·log π(labelₜ|sₜ)

    Nothing is shifted here: `logits[:, t]` must be the prediction of `labels[:, t]`, so a causal
    model's output goes in as `logits[:, :-1]` with `input_ids[:, 1:]`.

    Args:
        logits: (B, T, V).
        labels: (B, T) int64, -100 where a token is not trained on.

    Returns:
        The sum in nats and the number of tokens. It is the sum, not the mean, so that micro-batches
        can be added up and divided once.

    Raises:
        ValueError: if the shapes do not fit.
    """
    check_shapes(logits=(logits, "BTV"), labels=(labels, "BT"))
    keep = labels != IGNORE_INDEX
    # Copy only the labelled rows: less memory, and nothing else can reach the gradient.
    logprobs = token_logprobs(logits[keep].unsqueeze(0), labels[keep].unsqueeze(0)).squeeze(0)
    return TokenNLL(token_nll(logprobs, normalizer=1), keep.sum())


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    center_coef: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of preferences between pairs, mean over the pairs.

        d = r_chosen - r_rejected - margin
        loss = mean(-(1 - ε)·log σ(d) - ε·log σ(-d)) + c·mean((r_chosen + r_rejected)²)

    Args:
        chosen: (B,) reward of the preferred response.
        rejected: (B,) reward of the other response.
        margin: (B,) by how much chosen should win, in the unit of the rewards; 0 for a tie.
        label_smoothing: ε between 0 and 1, a number or (B,): the probability that the label is the
            wrong way round. 0.5 is a tie and pulls the two rewards together.
        center_coef: c, how strongly the rewards are kept near 0.

    Returns:
        () in nats.

    Raises:
        ValueError: if the shapes differ, there is no pair, or ε is a number outside [0, 1].

    References: Ouyang et al. 2022, https://arxiv.org/abs/2203.02155; margin: Touvron et al. 2023,
    https://arxiv.org/abs/2307.09288; centring: Eisenstein et al. 2023,
    https://arxiv.org/abs/2312.09244.
    """
    optional = {"margin": margin, "label_smoothing": label_smoothing}
    per_pair = {name: (x, "B") for name, x in optional.items() if isinstance(x, Tensor)}
    check_shapes(chosen=(chosen, "B"), rejected=(rejected, "B"), **per_pair)
    if len(chosen) == 0:
        raise ValueError("bradley_terry needs at least one pair.")
    if not isinstance(label_smoothing, Tensor) and not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}.")
    d = chosen - rejected if margin is None else chosen - rejected - margin
    nll = -(1 - label_smoothing) * functional.logsigmoid(d)
    nll = nll - label_smoothing * functional.logsigmoid(-d)
    return nll.mean() + center_coef * (chosen + rejected).square().mean()


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float | Tensor = 0.0,
) -> DPOLoss:
    """Direct preference optimisation: Bradley-Terry on the reward that a policy implies.

        r = β·(log π(y|x) - log π_ref(y|x)),  d = r_chosen - r_rejected
        loss = mean(-(1 - ε)·log σ(d) - ε·log σ(-d))

    Args:
        policy_chosen: (B,) log π of the preferred response, summed over its tokens, in nats.
        policy_rejected: (B,) log π of the other response.
        ref_chosen: (B,) log π_ref of the preferred response, a constant.
        ref_rejected: (B,) log π_ref of the other response.
        beta: β, the price of moving away from the reference, in reward per nat.
        label_smoothing: ε between 0 and 1, a number or (B,): the probability that the label is the
            wrong way round. 0.5 is a tie and pulls the two implicit rewards together.

    Returns:
        The loss, and both implicit rewards as constants.

    Raises:
        ValueError: if the shapes differ, there is no pair, β is not positive, or ε is a number
            outside [0, 1].

    References: Rafailov et al. 2023, equation 7, https://arxiv.org/abs/2305.18290; ε: Mitchell
    2023, https://ericmitchell.ai/cdpo.pdf.
    """
    check_shapes(
        policy_chosen=(policy_chosen, "B"),
        policy_rejected=(policy_rejected, "B"),
        ref_chosen=(ref_chosen, "B"),
        ref_rejected=(ref_rejected, "B"),
    )
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}.")
    chosen = beta * (policy_chosen - ref_chosen)
    rejected = beta * (policy_rejected - ref_rejected)
    loss = bradley_terry(chosen, rejected, label_smoothing=label_smoothing)
    return DPOLoss(loss, chosen.detach(), rejected.detach())


def pointwise_mse(scores: Tensor, targets: Tensor) -> Tensor:
    """Squared error between scores and ratings: for demonstration, not for learning preferences.

        loss = mean((score - target)²)

    Args:
        scores: (B,) output of the reward model.
        targets: (B,) ratings in the same unit.

    Returns:
        () in the unit of the scores, squared.

    Raises:
        ValueError: if the shapes differ or there is no score.
    """
    check_shapes(scores=(scores, "B"), targets=(targets, "B"))
    if len(scores) == 0:
        raise ValueError("pointwise_mse needs at least one score.")
    return (scores - targets).square().mean()


def clipped_policy(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float = 0.2,
    dual_clip: float | None = None,
    normalizer: Tensor | float | None = None,
    importance: Tensor | None = None,
) -> ClippedLoss:
    """Clipped surrogate objective of PPO, negated.

        ρₜ = exp(log πₜ - log π_oldₜ)
        Lₜ = min(ρₜ·Âₜ, clip(ρₜ, 1 - ε, 1 + ε)·Âₜ);  with a dual clip max(Lₜ, c·Âₜ) where Âₜ < 0
        loss = -Σₜ mₜ·wₜ·Lₜ / n

    ρ is capped at exp(20), far outside every clip, so that no overflow reaches the gradient.

    Args:
        logprobs: (B, R) log π of the policy being trained, in nats.
        old_logprobs: (B, R) log π of the policy that sampled, a constant.
        advantages: (B, R) Âₜ, constants.
        mask: (B, R) True where a token counts.
        clip_range: ε.
        dual_clip: c > 1, the largest ratio that a negative advantage is charged for; no bound when
            None.
        normalizer: n, the tokens of the whole minibatch; those of this mask when None. At least 1.
        importance: (B, R) wₜ, constants, as from `importance_weights`; 1 when None.

    Returns:
        The loss in the unit of the advantages, and the share of the n tokens that a clip leaves
        without a gradient.

    Raises:
        ValueError: if the shapes differ, or a clip is out of its range.

    References: Schulman et al. 2017, equation 7, https://arxiv.org/abs/1707.06347; dual clip: Ye et
    al. 2020, equation 5, https://arxiv.org/abs/1912.09729.
    """
    check_shapes(
        logprobs=(logprobs, "BR"),
        old_logprobs=(old_logprobs, "BR"),
        advantages=(advantages, "BR"),
        mask=(mask, "BR"),
    )
    _check_clip_range(clip_range)
    keep = mask.bool()
    log_ratio = torch.where(keep, logprobs - old_logprobs, 0)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    advantages = torch.where(keep, advantages, 0)
    unclipped = ratio * advantages
    objective = torch.min(unclipped, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    if dual_clip is not None:
        if not dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, got {dual_clip}.")
        bounded = torch.max(objective, dual_clip * advantages)
        objective = torch.where(advantages < 0, bounded, objective)
    n = _token_count(keep, normalizer)
    clip_fraction = (objective != unclipped).sum() / n
    if importance is not None:
        check_shapes(mask=(mask, "BR"), importance=(importance, "BR"))
        objective = torch.where(keep, importance.detach(), 1) * objective
    return ClippedLoss(-objective.sum() / n, clip_fraction)


def importance_weights(
    logprobs: Tensor, sampled_logprobs: Tensor, mask: Tensor, *, cap: float
) -> Tensor:
    """Truncated importance weights of tokens that another engine drew.

        wₜ = min(exp(log πₜ - log π_engineₜ), c)

    E[w·f] under the engine is E[f] under π, but for what the cap takes away: with it no token
    counts more than c times, so that the variance is bounded.

    Args:
        logprobs: (B, R) log π of the policy, in nats.
        sampled_logprobs: (B, R) log π_engine of the engine that drew the tokens.
        mask: (B, R) True where a token counts.
        cap: c, at least 1.

    Returns:
        (B, R) constants; 1 where masked.

    Raises:
        ValueError: if the shapes differ, or the cap is below 1.

    References: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training", https://fengyao.notion.site/off-policy-rl; truncation: Ionides 2008,
    https://doi.org/10.1198/106186008X320456.
    """
    check_shapes(
        logprobs=(logprobs, "BR"),
        sampled_logprobs=(sampled_logprobs, "BR"),
        mask=(mask, "BR"),
    )
    if not cap >= 1:
        raise ValueError(f"cap must be at least 1, got {cap}.")
    gap = torch.where(mask.bool(), logprobs - sampled_logprobs, 0).detach()
    return gap.clamp(max=MAX_LOG_RATIO).exp().clamp(max=cap)


def clipped_value(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float = 0.2,
    normalizer: Tensor | float | None = None,
) -> ClippedLoss:
    """Squared error of the critic, with the step away from its old estimate clipped.

        V̂ₜ = clip(Vₜ, V_oldₜ - ε, V_oldₜ + ε)
        loss = ½·Σₜ mₜ·max((Vₜ - Rₜ)², (V̂ₜ - Rₜ)²) / n

    Args:
        values: (B, R) V of the critic being trained, in the unit of the rewards.
        old_values: (B, R) V at roll-out, constants.
        returns: (B, R) Rₜ, constants.
        mask: (B, R) True where a token counts.
        clip_range: ε, in the unit of the rewards.
        normalizer: n, the tokens of the whole minibatch; those of this mask when None. At least 1.

    Returns:
        The loss in the unit of the rewards squared, with the ½ and without a coefficient, and the
        share of the n tokens that the clip leaves without a gradient.

    Raises:
        ValueError: if the shapes differ or the clip is not positive.

    Reference: `ppo2` of OpenAI Baselines; Huang et al. 2022, detail 9,
    https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/.
    """
    check_shapes(
        values=(values, "BR"),
        old_values=(old_values, "BR"),
        returns=(returns, "BR"),
        mask=(mask, "BR"),
    )
    _check_clip_range(clip_range)
    keep = mask.bool()
    values, old_values, returns = (torch.where(keep, x, 0) for x in (values, old_values, returns))
    clipped = values.clamp(old_values - clip_range, old_values + clip_range)
    unclipped_error = (values - returns).square()
    error = torch.max(unclipped_error, (clipped - returns).square())
    n = _token_count(keep, normalizer)
    return ClippedLoss(0.5 * error.sum() / n, (error != unclipped_error).sum() / n)


def _check_clip_range(clip_range: float) -> None:
    """A clip of 0 would remove every gradient."""
    if not clip_range > 0:
        raise ValueError(f"clip_range must be positive, got {clip_range}.")


def _token_count(keep: Tensor, normalizer: Tensor | float | None) -> Tensor:
    """The divisor of a sum over tokens: never 0, so that an empty minibatch has loss 0."""
    count = keep.sum() if normalizer is None else torch.as_tensor(normalizer)
    return count.clamp(min=1)
